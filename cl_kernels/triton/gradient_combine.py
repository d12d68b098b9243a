"""The last step of a gradient: parts added up in a fixed order, scaled, rounded, and the scale's gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .tiles import half_unit, scalar

_ROWS = 16


@triton.jit(do_not_specialize=["n", "d", "parts"])
def _gradient_combine_kernel(
    part, x, scale, bound, grad, along, share, n, d, parts,
    WRITE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    s = scalar(scale)
    unit = half_unit(bound) if bound is not None else 1.0
    dots = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, d, BLOCK_D):
        i_d = first + tl.arange(0, BLOCK_D)
        m_x = (i < n)[:, None] & (i_d < d)[None, :]
        at = i[:, None] * d + i_d[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for index in range(parts):
            total += tl.load(part + (index * n + i)[:, None] * d + i_d[None, :], mask=m_x, other=0.0)
        total /= unit
        if along is not None:
            b_x = tl.load(x.at + i[:, None] * x.stride_row + i_d[None, :] * x.stride_col, mask=m_x, other=0.0)
            dots += b_x.to(tl.float32) * total
        if WRITE:
            tl.store(grad + at, (total * s).to(grad.dtype.element_ty), mask=m_x)
    if along is not None:
        tl.store(along + tl.program_id(0), tl.sum(tl.sum(dots, 1), 0) * share)


def combine(
    parts: Tensor,
    x: Tensor,
    scale: Tensor,
    needs: tuple[bool, bool],
    bound: Tensor | None = None,
    dtype: torch.dtype | None = None,
    share: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """scale times the sum of the parts [P, n, D] in `dtype` (that of x), and share sum(x . parts), []; [0]
    float32 what is not needed of the two. `bound`: the parts are in its unit."""
    n, d = x.shape
    programs = launch.cdiv(n, _ROWS)
    write, needs_along = needs
    grad = x.new_empty(x.shape, dtype=dtype or x.dtype) if write else parts.new_empty(0)
    along = parts.new_empty(programs) if needs_along else None
    _gradient_combine_kernel[(programs,)](
        parts, launch.matrix(x), launch.scalar(scale), bound, grad, along, share, n, d, parts.shape[0],
        WRITE=write, BLOCK_M=_ROWS, BLOCK_D=128,
    )  # fmt: skip
    return grad, parts.new_empty(0) if along is None else along.sum()
