"""The gradient of the engine for wide features: chunks of the final G in half, then library products.

Beyond the widths whose gradient fits into registers, a kernel recomputes the tiles of S for a chunk of
rows, walking the features, and writes G itself, P minus W formed in float32 and rounded once, into a buffer
of fixed size; two library products with float32 sums then give dq of those rows and add to dk. With keys
equal to queries the buffer holds G + G^T, and one product is enough. 8 N M D operations in all with the
log-sum-exps, where the products by rows and by columns would each recompute S.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from . import launch
from .gradient_rows import Owners
from .pairs import Owner, Side, Tile, load_partners, load_terms, mask_arguments, pair_gradient
from .tiles import LOG2E, Matrix, half_lift, product, scalar

CHUNK_BYTES = 1 << 29  # of G; less where all of it is smaller


# Arguments whose values should not make kernels of their own.
SIZES = ["n", "m", "d", "exclude", "mask_rows", "mask_cols", "first_row", "last_row", "col_blocks"]


@triton.jit(do_not_specialize=SIZES)
def _gradient_tiles_kernel(
    x, y, out, bias_grad, scale, biases, partners, mask, planes, tags, ranges, index_ranges, bound,
    n, m, d, exclude, x_strides, y_strides, mask_rows, mask_cols, mask_strides,
    first_row, last_row, col_blocks,
    BIAS_GRADIENT: tl.constexpr, EXCLUDE: tl.constexpr, RULES: tl.constexpr, PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    x, y, mask = Matrix(x, *x_strides), Matrix(y, *y_strides), Matrix(mask, *mask_strides)
    own = Side(biases[0], partners[0], planes[0], tags[0])
    other = Side(biases[1], partners[1], planes[1], tags[1])
    sizes = (last_row, m, exclude if EXCLUDE else None)
    block_i, block_j = tl.program_id(0) // col_blocks, tl.program_id(0) % col_blocks
    first_i, first_j = first_row + block_i * BLOCK_M, block_j * BLOCK_N
    i, j = first_i + tl.arange(0, BLOCK_M), first_j + tl.arange(0, BLOCK_N)
    factor = scalar(scale) * LOG2E
    lift = half_lift(bound) if bound is not None else 0.0
    s = product(x, y, i, i < last_row, j, j < m, d, BLOCK_D, EVEN_D, PRECISION)
    # In this order, unlike `gradient_rows`: the other one takes up to 35 registers more here.
    owner = Owner(*load_partners(own, i, n, RULES), *load_terms(own, i, n))
    top, low = tl.load(ranges + block_j), tl.load(ranges + col_blocks + block_j)
    softmax, g = pair_gradient(
        s, factor, lift, Tile(i, j, first_i, first_j), sizes, owner, own, other,
        (top, low, tl.load(index_ranges + block_j), tl.load(index_ranges + col_blocks + block_j)),
        mask, (mask_rows, mask_cols), RULES, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    m_pair = (i < last_row)[:, None] & (j < m)[None, :]
    at = (out + (i - first_row).to(tl.int64) * m)[:, None] + j[None, :]
    tl.store(at, g.to(out.dtype.element_ty), mask=m_pair)
    if BIAS_GRADIENT:
        tl.store(bias_grad + block_i.to(tl.int64) * m + j, tl.sum(softmax, 0) * tl.exp2(-lift), mask=j < m)


def chunk_gradients(
    owners: Owners, *, into_rows: bool, into_columns: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(G y [1, n, D], G^T x [1, m, D], column sums of the softmax part [m]), float32, [0] what is not wanted;
    the owners are the rows of S. float16's products are in the unit of the bound."""
    x, y = owners.features
    (n, d), m = x.shape, y.shape[0]
    shape = configs.shape("gradient_tiles", x, d, owners.problem.positives)
    rows_per_chunk = max(
        shape.block_m, CHUNK_BYTES // (m * x.element_size()) // shape.block_m * shape.block_m
    )
    by_rows = x.new_empty((1, n, d) if into_rows else (0,), dtype=torch.float32)
    by_columns = x.new_zeros((m, d) if into_columns else (0,), dtype=torch.float32)
    bias_grad = x.new_zeros(m if bias else 0, dtype=torch.float32)
    buffer = x.new_empty((min(n, rows_per_chunk), m))
    scale = launch.scalar(owners.problem.scale)
    mask, mask_sizes, mask_strides = mask_arguments(owners.problem.positive_mask)
    biases, partners, planes, tags = owners.vectors
    col_blocks = launch.cdiv(m, shape.block_n)
    for first in range(0, n, rows_per_chunk):
        last = min(first + rows_per_chunk, n)
        row_blocks = launch.cdiv(last - first, shape.block_m)
        bias_part = x.new_empty((row_blocks, m) if bias else (0,), dtype=torch.float32)
        _gradient_tiles_kernel[(row_blocks * col_blocks,)](
            x, y, buffer, bias_part, scale, biases, partners, mask, planes, tags,
            owners.other.ranges, owners.other.index_ranges, owners.bound,
            n, m, d, owners.exclude or 0, x.stride(), y.stride(), *mask_sizes, mask_strides,
            first, last, col_blocks,
            BIAS_GRADIENT=bias, EXCLUDE=owners.exclude is not None, RULES=owners.rules,
            PRECISION=launch.precision(x), EVEN_D=d % shape.block_d == 0,
            BLOCK_M=shape.block_m, BLOCK_N=shape.block_n, BLOCK_D=shape.block_d, **launch.options(shape),
        )  # fmt: skip
        g = buffer[: last - first]
        if into_rows:
            by_rows[0, first:last] = launch.mm_float32(g, y)
        if into_columns:
            by_columns = launch.mm_float32(g.T, x[first:last], onto=by_columns)
        if bias:
            bias_grad += bias_part.sum(0)
    return by_rows, by_columns[None], bias_grad
