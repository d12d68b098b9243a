"""Rows at unit length, and the gradient through that; a zero row stays zero and gets none."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .tiles import load_rows

_SHAPE = {"BLOCK_M": 16, "BLOCK_D": 128}


@triton.jit(do_not_specialize=["n"])
def _unit_rows_kernel(x, unit, rnorm, n, d, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    squares = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, d, BLOCK_D):
        i_d = first + tl.arange(0, BLOCK_D)
        b_x = load_rows(x, i, i < n, i_d, i_d < d, False).to(tl.float32)
        squares += b_x * b_x
    norm = tl.sqrt_rn(tl.sum(squares, 1))
    b_rnorm = tl.where(norm == 0, 0.0, tl.div_rn(1.0, tl.where(norm == 0, 1.0, norm)))
    tl.store(rnorm + i, b_rnorm, mask=i < n)
    for first in range(0, d, BLOCK_D):
        i_d = first + tl.arange(0, BLOCK_D)
        b_x = load_rows(x, i, i < n, i_d, i_d < d, False).to(tl.float32)
        at = unit + i.to(tl.int64)[:, None] * d + i_d[None, :]
        b_unit = (b_x * b_rnorm[:, None]).to(unit.dtype.element_ty)
        tl.store(at, b_unit, mask=(i < n)[:, None] & (i_d < d)[None, :])


# dz = (g - u (u . g)) / ||z||, u = z / ||z|| not rounded.
@triton.jit(do_not_specialize=["n"])
def _unit_rows_gradient_kernel(
    grad, x, rnorm, grad_x, n, d, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_rnorm = tl.load(rnorm + i, mask=i < n, other=0.0)[:, None]
    products = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, d, BLOCK_D):
        i_d = first + tl.arange(0, BLOCK_D)
        b_unit = load_rows(x, i, i < n, i_d, i_d < d, False).to(tl.float32) * b_rnorm
        products += b_unit * load_rows(grad, i, i < n, i_d, i_d < d, False).to(tl.float32)
    along = tl.sum(products, 1)[:, None]
    for first in range(0, d, BLOCK_D):
        i_d = first + tl.arange(0, BLOCK_D)
        b_unit = load_rows(x, i, i < n, i_d, i_d < d, False).to(tl.float32) * b_rnorm
        b_grad = load_rows(grad, i, i < n, i_d, i_d < d, False).to(tl.float32)
        at = grad_x + i.to(tl.int64)[:, None] * d + i_d[None, :]
        b_out = ((b_grad - along * b_unit) * b_rnorm).to(grad_x.dtype.element_ty)
        tl.store(at, b_out, mask=(i < n)[:, None] & (i_d < d)[None, :])


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, D] over the length of its rows, in its dtype, and 1 / length [N] float32, 0 for a zero row."""
    n, d = x.shape
    unit, rnorm = x.new_empty(n, d), x.new_empty(n, dtype=torch.float32)
    _unit_rows_kernel[(launch.cdiv(n, _SHAPE["BLOCK_M"]),)](launch.matrix(x), unit, rnorm, n, d, **_SHAPE)
    return unit, rnorm


def unit_rows_gradient(grad: Tensor, x: Tensor, rnorm: Tensor) -> Tensor:
    """The gradient of x, in its dtype, from that of its unit rows."""
    n, d = x.shape
    grad_x = x.new_empty(n, d)
    _unit_rows_gradient_kernel[(launch.cdiv(n, _SHAPE["BLOCK_M"]),)](
        launch.matrix(grad), launch.matrix(x), rnorm, grad_x, n, d, **_SHAPE
    )  # fmt: skip
    return grad_x
