"""The ops by Triton's kernels, with the signatures of `ops.SCHEMAS`, and functions of rows around them."""

from .contrastive import contrastive_backward, contrastive_forward
from .dimcl import dimcl_backward, dimcl_forward
from .key_losses import key_losses
from .log_softmax import masked_log_softmax_backward, masked_log_softmax_forward
from .row_losses import row_losses
from .similarity import similarity_forward
from .similarity_gradient import similarity_backward
from .soft_target import soft_target_forward
from .soft_target_gradient import soft_target_backward
from .unit_rows import unit_rows, unit_rows_gradient

__all__ = [
    "contrastive_backward",
    "contrastive_forward",
    "dimcl_backward",
    "dimcl_forward",
    "key_losses",
    "masked_log_softmax_backward",
    "masked_log_softmax_forward",
    "row_losses",
    "similarity_backward",
    "similarity_forward",
    "soft_target_backward",
    "soft_target_forward",
    "unit_rows",
    "unit_rows_gradient",
]
