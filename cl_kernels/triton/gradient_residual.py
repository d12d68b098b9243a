"""The gradient of the queries of frozen keys from the residual of the forward: no pass over the pairs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..problem import Contrast
from . import launch
from .gradient import Incoming, Needs
from .tiles import scalar

_ROWS = 16


@triton.jit(do_not_specialize=["n", "d"])
def _residual_gradient_kernel(
    residual, q, k, scale, index, grad_lse, grad_positive, grad, along, n, d, q_strides, k_strides,
    WRITE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    s = scalar(scale)
    of_lse = tl.zeros((BLOCK_M,), tl.float64)
    of_positive = tl.zeros((BLOCK_M,), tl.float64)
    if grad_lse is not None:
        of_lse = tl.load(grad_lse + i, mask=i < n, other=0.0).to(tl.float64)
    if grad_positive is not None:
        of_positive = tl.load(grad_positive + i, mask=i < n, other=0.0).to(tl.float64)
    weight = (of_lse + of_positive).to(tl.float32)
    factor = of_lse.to(tl.float32)
    dots = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, d, BLOCK_D):
        i_d = first + tl.arange(0, BLOCK_D)
        m_x = (i < n)[:, None] & (i_d < d)[None, :]
        at = i[:, None] * d + i_d[None, :]
        total = factor[:, None] * tl.load(residual + at, mask=m_x, other=0.0)
        if index is not None:
            b_index = tl.load(index + i, mask=i < n, other=-1)
            at_k = k + b_index[:, None] * k_strides[0] + i_d[None, :] * k_strides[1]
            b_k = tl.load(at_k, mask=m_x & (b_index >= 0)[:, None], other=0.0)
            total += weight[:, None] * b_k.to(tl.float32)
        if along is not None:
            b_q = tl.load(q + i[:, None] * q_strides[0] + i_d[None, :] * q_strides[1], mask=m_x, other=0.0)
            dots += b_q.to(tl.float32) * total
        if WRITE:
            tl.store(grad + at, (total * s).to(grad.dtype.element_ty), mask=m_x)
    if along is not None:
        tl.store(along + tl.program_id(0), tl.sum(tl.sum(dots, 1), 0))


def gradient_from_residual(
    incoming: Incoming, problem: Contrast, residual: Tensor, needs: Needs
) -> tuple[Tensor, Tensor]:
    """grad_q = scale (g_lse residual + (g_lse + g_positive) k[index]), and grad_scale []; [0] what is not
    needed."""
    q, k, index = problem.q, problem.keys, problem.positive_index
    n, d = q.shape
    programs = launch.cdiv(n, _ROWS)
    grad = q.new_empty(q.shape) if needs.q else residual.new_empty(0)
    along = residual.new_empty(programs) if needs.scale else None
    _residual_gradient_kernel[(programs,)](
        residual, q, k, launch.scalar(problem.scale), index, incoming.lse, incoming.positive_sum,
        grad, along, n, d, q.stride(), k.stride(),
        WRITE=needs.q, BLOCK_M=_ROWS, BLOCK_D=128,
    )  # fmt: skip
    return grad, residual.new_empty(0) if along is None else along.sum()
