"""The ops that Triton's kernels serve, by the names of their schemas."""

from cl_kernels.triton.soft_target import soft_target_forward
from cl_kernels.triton.soft_target_gradient import soft_target_backward

__all__ = ["soft_target_backward", "soft_target_forward"]
