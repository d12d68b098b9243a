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
from .pairs import index_range, mask_arguments, pair_gradient
from .tiles import LOG2E, NOTHING, half_lift, product, scalar

CHUNK_BYTES = 1 << 29  # of G; less where all of it is smaller


# Arguments whose values should not make kernels of their own.
SIZES = ["n", "m", "d", "exclude", "mask_rows", "mask_cols", "first_row", "last_row", "col_blocks"]


@triton.jit(do_not_specialize=SIZES)
def _tiles_kernel(
    x, y, out, bias_grad, scale, bias, own_labels, other_labels, own_index, other_index, mask,
    own_planes, other_planes, ranges, index_ranges, bound,
    n, m, d, exclude, stride_xn, stride_xd, stride_yn, stride_yd,
    mask_rows, mask_cols, stride_mask_row, stride_mask_col, first_row, last_row, col_blocks,
    OWN: tl.constexpr, OTHER: tl.constexpr, OWN_POSITIVES: tl.constexpr, OTHER_POSITIVES: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr, SCALE_TENSOR: tl.constexpr, EXCLUDE: tl.constexpr, AMONG: tl.constexpr,
    POSITIVES: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    LABELS: tl.constexpr = (POSITIVES == "labels") or (AMONG != "all")
    block_i, block_j = tl.program_id(0) // col_blocks, tl.program_id(0) % col_blocks
    first_i, first_j = first_row + block_i * BLOCK_M, block_j * BLOCK_N
    i, j = first_i + tl.arange(0, BLOCK_M), first_j + tl.arange(0, BLOCK_N)
    factor = scalar(scale, SCALE_TENSOR) * LOG2E
    lift = half_lift(bound) if x.dtype.element_ty == tl.float16 else 0.0
    s = product(
        x, y, i, i < last_row, j, j < m, d, stride_xn, stride_xd, stride_yn, stride_yd,
        BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, PRECISION,
    )  # fmt: skip
    b_own_label = i
    b_own_index = i
    if LABELS:
        b_own_label = tl.load(own_labels + i, mask=i < n, other=0)
    if POSITIVES == "index" and OWN_POSITIVES:
        b_own_index = tl.load(own_index + i, mask=i < n, other=-1).to(tl.int32)
    own_first, own_last = index_range(b_own_index, POSITIVES == "index" and OWN_POSITIVES)
    own_shift = tl.load(own_planes + i, mask=i < n, other=0.0)
    own_coef = tl.load(own_planes + n + i, mask=i < n, other=0.0)
    softmax, g = pair_gradient(
        s, factor, lift, i, j, first_i, first_j, last_row, m, exclude, bias, b_own_label, b_own_index,
        own_first, own_last, own_shift, own_coef, tl.load(own_planes + 2 * n + i, mask=i < n, other=0.0),
        tl.min(tl.where(own_coef == 0.0, -NOTHING, own_shift), 0),
        other_labels, other_index, other_planes,
        tl.load(ranges + block_j), tl.load(ranges + col_blocks + block_j),
        tl.load(index_ranges + block_j), tl.load(index_ranges + col_blocks + block_j),
        mask, mask_rows, mask_cols, stride_mask_row, stride_mask_col,
        OWN, OTHER, OWN_POSITIVES, OTHER_POSITIVES, EXCLUDE, AMONG, POSITIVES, BIAS, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    m_pair = (i < last_row)[:, None] & (j < m)[None, :]
    at = (out + (i - first_row).to(tl.int64) * m)[:, None] + j[None, :]
    tl.store(at, g.to(out.dtype.element_ty), mask=m_pair)
    if BIAS_GRADIENT:
        tl.store(bias_grad + block_i.to(tl.int64) * m + j, tl.sum(softmax, 0) * tl.exp2(-lift), mask=j < m)


def chunk_gradients(
    problem: Owners, *, into_rows: bool, into_columns: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(G y [1, n, D], G^T x [1, m, D], column sums of the softmax part [m]), float32, [0] what is not wanted;
    the owners of `problem` are the rows of S. float16's products are in the unit of the bound."""
    x, y = problem.x, problem.y
    (n, d), m = x.shape, y.shape[0]
    shape = configs.shape("gradient_tiles", x, d, problem.positives)
    rows_per_chunk = max(
        shape.block_m, CHUNK_BYTES // (m * x.element_size()) // shape.block_m * shape.block_m
    )
    by_rows = x.new_empty((1, n, d) if into_rows else (0,), dtype=torch.float32)
    by_columns = x.new_zeros((m, d) if into_columns else (0,), dtype=torch.float32)
    bias_grad = x.new_zeros(m if bias else 0, dtype=torch.float32)
    buffer = x.new_empty((min(n, rows_per_chunk), m))
    scale = launch.scalar(problem.scale)
    mask, *mask_layout = mask_arguments(problem.mask)
    col_blocks = launch.cdiv(m, shape.block_n)
    for first in range(0, n, rows_per_chunk):
        last = min(first + rows_per_chunk, n)
        row_blocks = launch.cdiv(last - first, shape.block_m)
        bias_part = x.new_empty((row_blocks, m) if bias else (0,), dtype=torch.float32)
        _tiles_kernel[(row_blocks * col_blocks,)](
            x, y, buffer, bias_part, scale, problem.bias, problem.own_labels, problem.other_labels,
            problem.own_index, problem.other_index, mask, problem.own.planes, problem.other.planes,
            problem.other.ranges, problem.other.index_ranges, problem.bound, n, m, d, problem.exclude or 0,
            *x.stride(), *y.stride(), *mask_layout, first, last, col_blocks,
            OWN=problem.own.softmax, OTHER=problem.other.softmax,
            OWN_POSITIVES=problem.own.positives, OTHER_POSITIVES=problem.other.positives,
            BIAS_GRADIENT=bias, SCALE_TENSOR=isinstance(scale, Tensor),
            EXCLUDE=problem.exclude is not None, AMONG=problem.among, POSITIVES=problem.positives,
            BIAS=problem.bias_of, PRECISION=launch.precision(x), EVEN_D=d % shape.block_d == 0,
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
