"""The `contrastive` ops by Triton's kernels (schemas and formulas: ops.py)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import configs
from .gradient import gradient, residual
from .gradient_residual import gradient_from_residual
from .lse import log_sum_exp
from .lse_frozen import log_sum_exp_and_residual
from .pairs import contiguous, contrast


def contrastive_forward(
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    exclude: int | None,
    row_labels: Tensor | None,
    col_labels: Tensor | None,
    among: str,
    label_positives: bool,
    positive_index: Tensor | None,
    positive_mask: Tensor | None,
    key_bias: Tensor | None,
    both_axes: bool,
    save_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = contrast(
        q, k, scale, exclude, row_labels, col_labels, among, label_positives, positive_index, positive_mask,
        key_bias, both_axes,
    )  # fmt: skip
    if save_gradient and q.shape[1] <= configs.widest("lse_frozen", q):
        lse, positive_sum, positive_count, saved = log_sum_exp_and_residual(problem)
        return lse, lse.new_empty(0), positive_sum, positive_count, saved
    lse, lse_cols, positive_sum, positive_count = log_sum_exp(problem)
    saved = residual(problem, lse) if save_gradient else q.new_empty(0, dtype=scale.dtype)
    return lse, lse_cols, positive_sum, positive_count, saved


def contrastive_backward(
    grad_lse: Tensor | None,
    grad_lse_cols: Tensor | None,
    grad_positive_sum: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    exclude: int | None,
    row_labels: Tensor | None,
    col_labels: Tensor | None,
    among: str,
    label_positives: bool,
    positive_index: Tensor | None,
    positive_mask: Tensor | None,
    key_bias: Tensor | None,
    both_axes: bool,
    lse: Tensor,
    lse_cols: Tensor,
    saved: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs_q, needs_k, needs_bias = needs
    grad_lse, grad_lse_cols, grad_positive_sum = map(contiguous, (grad_lse, grad_lse_cols, grad_positive_sum))
    if k is not None and saved.numel() > 0 and not (needs_k or needs_bias):
        grad, grad_scale = gradient_from_residual(
            saved, q, k, scale, contiguous(positive_index), grad_lse, grad_positive_sum, needs_q
        )
        return grad, saved.new_empty(0), grad_scale, saved.new_empty(0)
    problem = contrast(
        q, k, scale, exclude, row_labels, col_labels, among, label_positives, positive_index, positive_mask,
        key_bias, both_axes,
    )  # fmt: skip
    return gradient(
        problem, grad_lse, grad_lse_cols, grad_positive_sum, lse, lse_cols, needs_q, needs_k, needs_bias
    )
