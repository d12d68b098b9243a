"""Gradient of the similarity matrix: products of its gradient G with the rows of the other side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from . import launch, tiles

MAX_PARTS = 32  # of the columns: each is a float32 copy of the gradient


# acc_i = sum_j G_ij y_j for a block of rows and of features, over one part of the columns; the kernel below
# adds the parts up. The rows y are brought to unit length in float32 in the tile: so they fit float16, while
# G times a reciprocal norm might not. BOTH adds sum_j G_ji y_j. The strides of G are free: the columns' side
# passes its transpose.
@triton.jit
def _similarity_product_kernel(
    grad, y, y_rnorm, acc, n, m, d, part, grad_strides, y_strides,
    BOTH: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    grad, y = tiles.Matrix(grad, *grad_strides), tiles.Matrix(y, *y_strides)
    blocks_d = tl.cdiv(d, BLOCK_D)
    i_n = tl.program_id(0) // blocks_d * BLOCK_M + tl.arange(0, BLOCK_M)
    i_d = tl.program_id(0) % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_n, m_d = i_n < n, i_d < d
    begin = tl.program_id(1) * part
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(begin, tl.minimum(begin + part, m), BLOCK_N):
        i_m = first + tl.arange(0, BLOCK_N)
        m_m = i_m < m
        b_y = tiles.load_rows(y, i_m, m_m, i_d, m_d, EVEN_D)
        if NORMALIZE:
            b_rnorm = tl.load(y_rnorm + i_m, mask=m_m, other=0.0)
            b_y = (b_y.to(tl.float32) * b_rnorm[:, None]).to(y.at.dtype.element_ty)
        b_g = tiles.load_rows(grad, i_n, m_n, i_m, m_m, EVEN_M)
        if BOTH:  # half of the sum, so that it fits float16
            b_t = tl.trans(tiles.load_rows(grad, i_m, m_m, i_n, m_n, False))
            b_g = ((b_g.to(tl.float32) + b_t.to(tl.float32)) * 0.5).to(y.at.dtype.element_ty)
        b_acc = tiles.dot(b_g, b_y, b_acc, PRECISION)
    if BOTH:
        b_acc *= 2
    at = acc + (tl.program_id(1).to(tl.int64) * n + i_n)[:, None] * d + i_d[None, :]
    tl.store(at, b_acc, mask=m_n[:, None] & m_d[None, :])


@triton.jit
def _load_sum_and_row(
    acc, x, b_rnorm, i_n, m_n, i_d, n, d, parts, NORMALIZE: tl.constexpr, EVEN_D: tl.constexpr
):
    """The sum of the parts, and x at unit length, both float32."""
    b_acc = tl.zeros((i_n.shape[0], i_d.shape[0]), tl.float32)
    for i in range(parts):
        b_acc += tiles.load_rows(tiles.Matrix(acc, d, 1), i * n + i_n, m_n, i_d, i_d < d, EVEN_D)
    b_x = tiles.load_rows(x, i_n, m_n, i_d, i_d < d, EVEN_D).to(tl.float32)
    if NORMALIZE:
        b_x *= b_rnorm[:, None]
    return b_acc, b_x


# out_i = scale acc_i; with NORMALIZE scale rnorm_i (acc_i - x_i (x_i . acc_i)), x at unit length. SUMMED: the
# sum over the program's rows of x_i . acc_i, for the gradient of scale. Rows that fit one block (WHOLE) are
# read once.
@triton.jit
def _similarity_rows_kernel(
    acc, x, x_rnorm, scale, out, sums, share, n, d, parts, x_strides,
    NORMALIZE: tl.constexpr, NEEDED: tl.constexpr, SUMMED: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    x = tiles.Matrix(x, *x_strides)
    i_n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_d = tl.arange(0, BLOCK_D)
    m_n = i_n < n
    b_rnorm = tl.full((BLOCK_M,), 1.0, tl.float32)
    if NORMALIZE:
        b_rnorm = tl.load(x_rnorm + i_n, mask=m_n, other=0.0)
    b_acc, b_x = _load_sum_and_row(acc, x, b_rnorm, i_n, m_n, i_d, n, d, parts, NORMALIZE, EVEN_D)
    b_dot = tl.sum(b_acc * b_x, 1)
    if not WHOLE:
        for first in range(BLOCK_D, d, BLOCK_D):
            b_acc, b_x = _load_sum_and_row(
                acc, x, b_rnorm, i_n, m_n, first + i_d, n, d, parts, NORMALIZE, EVEN_D
            )
            b_dot += tl.sum(b_acc * b_x, 1)
    if SUMMED:
        tl.store(sums + tl.program_id(0), tl.sum(b_dot, 0) * share)
    if NEEDED:
        b_factor = b_rnorm * tiles.scalar(scale)
        for first in range(0, d, BLOCK_D):
            if not WHOLE:
                b_acc, b_x = _load_sum_and_row(
                    acc, x, b_rnorm, i_n, m_n, first + i_d, n, d, parts, NORMALIZE, EVEN_D
                )
            b_out = b_acc - b_x * b_dot[:, None] if NORMALIZE else b_acc
            at = out + i_n.to(tl.int64)[:, None] * d + (first + i_d)[None, :]
            m_out = m_n[:, None] & (first + i_d < d)[None, :]
            tl.store(at, (b_out * b_factor[:, None]).to(out.dtype.element_ty), mask=m_out)


def _products(grad: Tensor, y: Tensor, y_rnorm: Tensor, normalize: bool, both: bool) -> Tensor:
    """[parts, N, D] float32, which add up to grad [N, M] times the (unit) rows of y [M, D]; `both`: to
    (grad + grad^T) times them."""
    (n, m), d = grad.shape, y.shape[1]
    shape = configs.shape("similarity_gradient", y, d)
    programs = launch.cdiv(n, shape.block_m) * launch.cdiv(d, shape.block_d)
    steps = launch.cdiv(m, shape.block_n)
    wanted = 2 * configs.device_of(y).processors // programs  # rounded down: two waves, not a little more
    steps_each = launch.cdiv(steps, max(1, min(wanted, MAX_PARTS)))
    parts = launch.cdiv(steps, steps_each)
    acc = y.new_empty(parts, n, d, dtype=torch.float32)
    _similarity_product_kernel[(programs, parts)](
        grad, y, y_rnorm, acc, n, m, d, steps_each * shape.block_n, grad.stride(), y.stride(),
        BOTH=both, NORMALIZE=normalize,
        BLOCK_M=shape.block_m, BLOCK_N=shape.block_n, BLOCK_D=shape.block_d,
        EVEN_M=m % shape.block_n == 0, EVEN_D=d % shape.block_d == 0, PRECISION=launch.precision(y),
        **launch.options(shape),
    )  # fmt: skip
    return acc


def _rows(
    acc: Tensor,  # [parts, N, D] float32
    x: Tensor,  # [N, D]
    x_rnorm: Tensor,  # [N]
    scale: Tensor,
    normalize: bool,
    needed: bool,
    share: float | None,
) -> tuple[Tensor, Tensor]:
    """(gradient of x, [0] where it is not needed; share times the sum of x . acc over blocks of rows)."""
    parts, n, d = acc.shape
    shape = configs.shape("similarity_rows", x, d)
    blocks = launch.cdiv(n, shape.block_m)
    out = x.new_empty(n, d) if needed else acc.new_empty(0)
    sums = acc.new_empty(0 if share is None else blocks)
    _similarity_rows_kernel[(blocks,)](
        acc, x, x_rnorm, launch.scalar(scale), out, sums, share or 0.0, n, d, parts, x.stride(),
        NORMALIZE=normalize, NEEDED=needed, SUMMED=share is not None, WHOLE=d <= shape.block_d,
        BLOCK_M=shape.block_m, BLOCK_D=shape.block_d, EVEN_D=d % shape.block_d == 0,
        **launch.options(shape),
    )  # fmt: skip
    return out, sums


def similarity_backward(
    grad: Tensor,  # [N, M]
    q: Tensor,  # [N, D]
    k: Tensor | None,  # [M, D]
    scale: Tensor,
    normalize: bool,
    q_rnorm: Tensor,  # [N]
    k_rnorm: Tensor,  # [M]
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_q, grad_k, grad_scale); the gradient of scale comes with the products of one side."""
    launch.require_features(q)
    needs_q, needs_k = needs
    grad_q, grad_k = (q.new_empty(0, dtype=torch.float32) for _ in range(2))
    if k is None:
        acc = _products(grad, q, q_rnorm, normalize, both=needs_q)
        grad_q, sums = _rows(acc, q, q_rnorm, scale, normalize, needs_q, 0.5 if needs_q else 1.0)
        return grad_q, grad_k, sums.sum()
    if needs_k:
        acc = _products(grad.T, q, q_rnorm, normalize, both=False)
        grad_k, sums = _rows(acc, k, k_rnorm, scale, normalize, True, None if needs_q else 1.0)
    if needs_q or not needs_k:
        acc = _products(grad, k, k_rnorm, normalize, both=False)
        grad_q, sums = _rows(acc, q, q_rnorm, scale, normalize, needs_q, 1.0)
    return grad_q, grad_k, sums.sum()
