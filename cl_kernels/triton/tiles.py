"""Device functions that the kernels share: loads, products, and running log-sum-exps of tiles.

Names: i_* are indices of rows, columns or features (int32 blocks, int64 where they meet a stride), m_* masks,
b_* blocks in registers. Logits are in base 2: times log2(e), so that each exponential is one exp2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Stands for the maximum of nothing: finite, so that no difference of two of them is NaN.
NOTHING = tl.constexpr(-1e30)


class Matrix(NamedTuple):
    """A matrix in memory, as kernels take one (`launch.matrix`)."""

    at: Any
    stride_row: Any
    stride_col: Any


@triton.jit
def scalar(x):
    """A scalar argument, from memory where it is a tensor."""
    if isinstance(x, tl.tensor) and x.dtype.is_ptr():  # a number is one too, but to the interpreter
        x = tl.load(x)
    return x


@triton.jit
def load_rows(x, i_row, m_row, i_col, m_col, EVEN: tl.constexpr):
    """Elements [i_row, i_col] of a Matrix, 0 outside; `EVEN`: no column is outside."""
    at = x.at + i_row.to(tl.int64)[:, None] * x.stride_row + i_col.to(tl.int64)[None, :] * x.stride_col
    if EVEN:
        return tl.load(at, mask=m_row[:, None], other=0.0)
    return tl.load(at, mask=m_row[:, None] & m_col[None, :], other=0.0)


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr):
    """acc + x y, float32 sums. `PRECISION` (launch.precision) is for float32 tiles."""
    if PRECISION == "bf16":
        acc = tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16), acc)
    else:  # not after a return: Triton would compile it, and refuse "bf16"
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    return acc


@triton.jit
def product(
    x, y, i_x, m_x, i_y, m_y, d, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr
):
    """x[i_x] y[i_y]^T of two Matrices, walking the d features in chunks."""
    acc = tl.zeros((i_x.shape[0], i_y.shape[0]), tl.float32)
    for first in range(0, d, BLOCK_D):
        i_d = first + tl.arange(0, BLOCK_D)
        b_x = load_rows(x, i_x, m_x, i_d, i_d < d, EVEN_D)
        b_y = load_rows(y, i_y, m_y, i_d, i_d < d, EVEN_D)
        acc = dot(b_x, tl.trans(b_y), acc, PRECISION)
    return acc


@triton.jit
def half_lift(bound):
    """The exponent of `half_unit`."""
    return 10.0 - tl.ceil(tl.log2(tl.maximum(tl.load(bound), 1e-30)))


@triton.jit
def half_unit(bound):
    """A power of two that brings terms up to `bound` (its address) to 2^10, so that the products made of them
    and rounded to float16 neither overflow nor, down to 2^-24 of the largest, lose digits."""
    return tl.exp2(half_lift(bound))
