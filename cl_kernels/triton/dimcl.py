"""The `dimcl` ops by Triton's kernels (schemas and formulas: ops.py).

Two passes over z make x [N, 2D], whose columns are the standardised columns of both views; the engine runs on
x^T as it lies, rows of stride 1, and contracts over the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Contrast
from .columns import column_gradient, standardise
from .gradient import Incoming, Needs, gradient
from .lse import log_sum_exp
from .pairs import contiguous


def _problem(x: Tensor, partner: Tensor, scale: Tensor, positive_mask: Tensor | None) -> Contrast:
    if positive_mask is None:
        return Contrast(x.T, None, scale, 0, positive_index=partner)
    own = torch.arange(x.shape[1], device=x.device)
    return Contrast(x.T, None, scale, 0, positive_mask=positive_mask | (partner[:, None] == own))


def dimcl_forward(
    z0: Tensor, z1: Tensor, scale: Tensor, positive_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, mean, rnorm, partner = standardise(z0, z1)
    lse, _, positive_sum, positive_count = log_sum_exp(_problem(x, partner, scale, positive_mask))
    return lse, positive_sum, positive_count, mean, rnorm


def dimcl_backward(
    grad_lse: Tensor | None,
    grad_positive_sum: Tensor | None,
    z0: Tensor,
    z1: Tensor,
    scale: Tensor,
    positive_mask: Tensor | None,
    lse: Tensor,
    mean: Tensor,
    rnorm: Tensor,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, _, _, partner = standardise(z0, z1)
    incoming = Incoming(contiguous(grad_lse), None, contiguous(grad_positive_sum))
    problem, needs = _problem(x, partner, scale, positive_mask), Needs(True, False, needs_scale, False)
    grad_x, _, grad_scale, _ = gradient(incoming, problem, lse, lse, needs, torch.float32)
    grad_z0, grad_z1 = column_gradient(grad_x, x, rnorm, z0.dtype)
    return grad_z0, grad_z1, grad_scale
