"""The ops by Triton's kernels, with the signatures of `ops.SCHEMAS`."""

from cl_kernels.triton.log_softmax import masked_log_softmax_backward, masked_log_softmax_forward
from cl_kernels.triton.similarity import similarity_forward
from cl_kernels.triton.similarity_gradient import similarity_backward

__all__ = [
    "masked_log_softmax_backward",
    "masked_log_softmax_forward",
    "similarity_backward",
    "similarity_forward",
]
