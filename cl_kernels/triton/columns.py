"""DimCL's columns: brought to mean 0 and unit length, and the gradient through that."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from . import launch, tiles


# A program owns a few columns of one view, axis 1 of the grid, and walks its rows three times: for the mean,
# for the norm about it, and for the output. Everything is relative to the first row: a mean much larger than
# the spread takes no digits, and a constant column is exactly one.
@triton.jit
def _standardise_kernel(
    z0, z1, x, mean, rnorm, partner, n, d, noise,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    view = tl.program_id(1)
    stride_n = tl.where(view == 0, z0.stride_row, z1.stride_row)
    stride_d = tl.where(view == 0, z0.stride_col, z1.stride_col)
    z = tiles.Matrix(tl.where(view == 0, z0.at, z1.at), stride_n, stride_d)
    i_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = i_d < d
    b_first = tl.load(z.at + i_d.to(tl.int64) * stride_d, mask=m_d, other=0.0).to(tl.float32)

    b_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, n, BLOCK_M):
        i_n = first + tl.arange(0, BLOCK_M)
        b_z = tiles.load_rows(z, i_n, i_n < n, i_d, m_d, EVEN_D).to(tl.float32)
        b_sum += tl.where((i_n < n)[:, None], b_z - b_first[None, :], 0.0)
    b_offset = tl.sum(b_sum, 0) / n
    b_mean = b_first + b_offset

    b_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, n, BLOCK_M):
        i_n = first + tl.arange(0, BLOCK_M)
        b_z = tiles.load_rows(z, i_n, i_n < n, i_d, m_d, EVEN_D).to(tl.float32)
        b_z = tl.where((i_n < n)[:, None], (b_z - b_first[None, :]) - b_offset[None, :], 0.0)
        b_sum += b_z * b_z
    b_norm = tl.sqrt_rn(tl.sum(b_sum, 0))
    constant = b_norm <= noise * tl.abs(b_mean)
    b_rnorm = tl.where(constant, 0.0, tl.div_rn(1.0, tl.where(constant, 1.0, b_norm)))
    tl.store(mean + view * d + i_d, b_mean, mask=m_d)
    tl.store(rnorm + view * d + i_d, b_rnorm, mask=m_d)
    tl.store(partner + view * d + i_d, (1 - view) * d + i_d, mask=m_d)

    for first in range(0, n, BLOCK_M):
        i_n = first + tl.arange(0, BLOCK_M)
        b_z = tiles.load_rows(z, i_n, i_n < n, i_d, m_d, EVEN_D).to(tl.float32)
        b_x = ((b_z - b_first[None, :]) - b_offset[None, :]) * b_rnorm[None, :]
        at = x + i_n.to(tl.int64)[:, None] * (2 * d) + view * d + i_d[None, :]
        tl.store(at, b_x.to(x.dtype.element_ty), mask=(i_n < n)[:, None] & m_d[None, :])


# dz = rnorm (g - x (x . g) - mean of that) of each column, three walks of its rows: for x . g, for the mean,
# and for the output. The mean goes last: rounding leaves x itself a mean where a column hardly varies.
@triton.jit
def _column_gradient_kernel(
    grad_x, x, rnorm, grad_z0, grad_z1, n, d,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    view = tl.program_id(1)
    grad_z = tl.where(view == 0, grad_z0, grad_z1)
    first_d = view.to(tl.int64) * d
    g = tiles.Matrix(grad_x.at + first_d * grad_x.stride_row, grad_x.stride_col, grad_x.stride_row)
    x = tiles.Matrix(x.at + first_d * x.stride_col, x.stride_row, x.stride_col)
    i_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = i_d < d
    b_rnorm = tl.load(rnorm + view * d + i_d, mask=m_d, other=0.0)

    b_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, n, BLOCK_M):
        i_n = first + tl.arange(0, BLOCK_M)
        b_g = tiles.load_rows(g, i_n, i_n < n, i_d, m_d, EVEN_D)
        b_x = tiles.load_rows(x, i_n, i_n < n, i_d, m_d, EVEN_D).to(tl.float32)
        b_sum += b_g * b_x
    b_dot = tl.sum(b_sum, 0)

    b_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, n, BLOCK_M):
        i_n = first + tl.arange(0, BLOCK_M)
        b_g = tiles.load_rows(g, i_n, i_n < n, i_d, m_d, EVEN_D)
        b_x = tiles.load_rows(x, i_n, i_n < n, i_d, m_d, EVEN_D).to(tl.float32)
        b_sum += b_g - b_x * b_dot[None, :]
    b_mean = tl.sum(b_sum, 0) / n

    for first in range(0, n, BLOCK_M):
        i_n = first + tl.arange(0, BLOCK_M)
        b_g = tiles.load_rows(g, i_n, i_n < n, i_d, m_d, EVEN_D)
        b_x = tiles.load_rows(x, i_n, i_n < n, i_d, m_d, EVEN_D).to(tl.float32)
        b_out = (b_g - b_x * b_dot[None, :] - b_mean[None, :]) * b_rnorm[None, :]
        at = grad_z + i_n.to(tl.int64)[:, None] * d + i_d[None, :]
        tl.store(at, b_out.to(grad_z.dtype.element_ty), mask=(i_n < n)[:, None] & m_d[None, :])


def standardise(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x [N, 2D], mean [2, D], rnorm [2, D], partner [2D]): the centred columns of both views at unit length,
    0 for a constant column, and the column of the other view for each."""
    n, d = z0.shape
    if n == 0 or d == 0:
        raise ValueError(f"z0 must be [N, D] and not empty, got [{n}, {d}]")
    shape = configs.shape("columns", z0, d)
    x = z0.new_empty(n, 2 * d)
    mean, rnorm = (z0.new_empty(2, d, dtype=torch.float32) for _ in range(2))
    partner = z0.new_empty(2 * d, dtype=torch.int64)
    noise = 4 * torch.finfo(torch.float32).eps * n**0.5
    _standardise_kernel[(launch.cdiv(d, shape.block_d), 2)](
        launch.matrix(z0), launch.matrix(z1), x, mean, rnorm, partner, n, d, noise,
        BLOCK_M=shape.block_m, BLOCK_D=shape.block_d, EVEN_D=d % shape.block_d == 0,
        **launch.options(shape),
    )  # fmt: skip
    return x, mean, rnorm, partner


def column_gradient(
    grad_x: Tensor,  # [2D, N] float32, of the rows of x^T
    x: Tensor,  # [N, 2D]
    rnorm: Tensor,  # [2, D]
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(grad_z0, grad_z1), [N, D] in `dtype`."""
    n, d = x.shape[0], x.shape[1] // 2
    shape = configs.shape("columns", x, d)
    grad_z0, grad_z1 = (x.new_empty(n, d, dtype=dtype) for _ in range(2))
    _column_gradient_kernel[(launch.cdiv(d, shape.block_d), 2)](
        launch.matrix(grad_x), launch.matrix(x), rnorm, grad_z0, grad_z1, n, d,
        BLOCK_M=shape.block_m, BLOCK_D=shape.block_d, EVEN_D=d % shape.block_d == 0,
        **launch.options(shape),
    )  # fmt: skip
    return grad_z0, grad_z1
