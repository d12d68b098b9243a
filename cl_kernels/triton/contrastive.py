"""The `contrastive` ops by Triton's kernels (schemas and formulas: ops.py)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import configs
from ..problem import Contrast, flat
from . import launch
from .gradient import Incoming, Needs, gradient, residual
from .gradient_residual import gradient_from_residual
from .lse import log_sum_exp
from .lse_frozen import log_sum_exp_and_residual
from .pairs import contiguous, packed


@flat(Contrast)
def contrastive_forward(
    problem: Contrast, save_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if problem.by_mask:
        raise ValueError("Triton's kernels restrict denominators by labels, not by positive_mask")
    launch.require_features(problem.q)
    problem, q = packed(problem), problem.q
    if save_gradient and q.shape[1] <= configs.widest("lse_frozen", q):
        lse, positive_sum, positive_count, saved = log_sum_exp_and_residual(problem)
        return lse, lse.new_empty(0), positive_sum, positive_count, saved
    lse, lse_cols, positive_sum, positive_count = log_sum_exp(problem)
    saved = residual(problem, lse) if save_gradient else q.new_empty(0, dtype=problem.scale.dtype)
    return lse, lse_cols, positive_sum, positive_count, saved


@flat(Contrast, gradients=3)
def contrastive_backward(
    gradients: Sequence[Tensor | None],
    problem: Contrast,
    saved: tuple[Tensor, Tensor, Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    incoming, needed = Incoming(*map(contiguous, gradients)), Needs(*needs)
    launch.require_features(problem.q)
    problem = packed(problem)
    lse, lse_cols, rest = saved
    if problem.k is not None and rest.numel() > 0 and not (needed.k or needed.bias):
        grad, grad_scale = gradient_from_residual(incoming, problem, rest, needed)
        return grad, rest.new_empty(0), grad_scale, rest.new_empty(0)
    return gradient(incoming, problem, lse, lse_cols, needed)
