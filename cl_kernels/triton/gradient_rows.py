"""The gradient of the engine by rows: sum_j G_ij y_j for each owner i of x, a block of owners a program.

A program keeps its block of x on chip and the gradient in registers, walks the others y, recomputes the tile
of S, forms the tile of G in float32, P minus W before anything is rounded, rounds it once, and multiplies it
with the same tile of y. Owners are the rows of S (dq), its columns (dk: the transposed problem), or with keys
equal to queries both at once: G + G^T. Programs share no output, so nothing is atomic and results are the
same bits each time; where there are few owners, the others are split, and the parts added up by
`gradient_combine`.

With `TRIANGLE` each unordered pair of blocks is visited once and feeds both of its blocks by atomic
additions: 4 N^2 D operations with the log-sum-exps instead of 5, in an order that differs from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from . import launch
from .gradient_terms import Terms
from .pairs import index_range, mask_arguments, pair_gradient
from .tiles import LOG2E, NOTHING, dot, half_lift, load_rows, scalar


@dataclass(frozen=True)
class Owners:
    """One side of S as the owners of a gradient, the other side as the others."""

    x: Tensor  # [n, D]
    y: Tensor  # [m, D]
    scale: Tensor
    exclude: int | None  # other i + exclude is left out of owner i
    own_labels: Tensor | None  # [n]
    other_labels: Tensor | None  # [m]
    among: str
    positives: str
    own_index: Tensor | None  # [n]
    other_index: Tensor | None  # [m]
    mask: Tensor | None  # weight of owner i and other j at [i % R, j % C]
    bias: Tensor | None
    bias_of: str  # "none", "own" or "other"
    own: Terms
    other: Terms
    bound: Tensor | None  # [1], for float16


@triton.jit(do_not_specialize=["n", "m", "d", "exclude", "mask_rows", "mask_cols", "steps"])
def _rows_kernel(
    x, y, out, bias_grad, scale, bias, own_labels, other_labels, own_index, other_index, mask,
    own_planes, other_planes, ranges, index_ranges, bound,
    n, m, d, exclude, stride_xn, stride_xd, stride_yn, stride_yd,
    mask_rows, mask_cols, stride_mask_row, stride_mask_col, steps,
    TRIANGLE: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, OWN_POSITIVES: tl.constexpr,
    OTHER_POSITIVES: tl.constexpr, FEATURES: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
    SCALE_TENSOR: tl.constexpr, EXCLUDE: tl.constexpr, AMONG: tl.constexpr, POSITIVES: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    LABELS: tl.constexpr = (POSITIVES == "labels") or (AMONG != "all")
    HALF: tl.constexpr = x.dtype.element_ty == tl.float16
    block_i = tl.program_id(0)
    split = tl.program_id(1)
    first_i = block_i * BLOCK_M
    i = first_i + tl.arange(0, BLOCK_M)
    i_d = tl.arange(0, BLOCK_D)
    b_x = load_rows(x, i, i < n, i_d, i_d < d, stride_xn, stride_xd, EVEN_D)
    factor = scalar(scale, SCALE_TENSOR) * LOG2E
    lift = half_lift(bound) if HALF else 0.0
    own_shift = tl.load(own_planes + i, mask=i < n, other=0.0)
    own_coef = tl.load(own_planes + n + i, mask=i < n, other=0.0)
    own_weight = tl.load(own_planes + 2 * n + i, mask=i < n, other=0.0)
    own_low = tl.min(tl.where(own_coef == 0.0, -NOTHING, own_shift), 0)
    b_own_label = i
    b_own_index = i
    if LABELS:
        b_own_label = tl.load(own_labels + i, mask=i < n, other=0)
    if POSITIVES == "index" and OWN_POSITIVES:
        b_own_index = tl.load(own_index + i, mask=i < n, other=-1).to(tl.int32)
    own_first, own_last = index_range(b_own_index, POSITIVES == "index" and OWN_POSITIVES)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    bias_sum = tl.zeros((BLOCK_M,), tl.float32)
    other_blocks = tl.cdiv(m, BLOCK_N)
    last = other_blocks
    if TRIANGLE:
        # Around the circle half way; of two opposite blocks the lower one visits.
        last = (other_blocks + 2) // 2
        if (other_blocks % 2 == 0) & (block_i >= other_blocks // 2):
            last -= 1

    for step in range(split * steps, tl.minimum((split + 1) * steps, last)):
        block_j = (block_i + step) % other_blocks if TRIANGLE else step
        first_j = block_j * BLOCK_N
        j = first_j + tl.arange(0, BLOCK_N)
        b_y = load_rows(y, j, j < m, i_d, i_d < d, stride_yn, stride_yd, EVEN_D)
        top, low = tl.load(ranges + block_j), tl.load(ranges + other_blocks + block_j)
        s = dot(b_x, tl.trans(b_y), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        softmax, g = pair_gradient(
            s, factor, lift, i, j, first_i, first_j, n, m, exclude, bias, b_own_label, b_own_index,
            own_first, own_last, own_shift, own_coef, own_weight, own_low,
            other_labels, other_index, other_planes, top, low,
            tl.load(index_ranges + block_j), tl.load(index_ranges + other_blocks + block_j),
            mask, mask_rows, mask_cols, stride_mask_row, stride_mask_col,
            OWN, OTHER, OWN_POSITIVES, OTHER_POSITIVES, EXCLUDE, AMONG, POSITIVES, BIAS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if BIAS_GRADIENT:
            bias_sum += tl.sum(softmax, 1)
        if FEATURES:
            g = g.to(b_y.dtype)
            acc = dot(g, b_y, acc, PRECISION)
            if TRIANGLE:
                if block_j != block_i:
                    mirrored = dot(tl.trans(g), b_x, tl.zeros((BLOCK_N, BLOCK_D), tl.float32), PRECISION)
                    at = out + j.to(tl.int64)[:, None] * d + i_d[None, :]
                    m_out = (j < m)[:, None] & (i_d < d)[None, :]
                    tl.atomic_add(at, mirrored * tl.exp2(-lift), mask=m_out, sem="relaxed")

    if FEATURES:
        m_out = (i < n)[:, None] & (i_d < d)[None, :]
        if TRIANGLE:
            at = out + i.to(tl.int64)[:, None] * d + i_d[None, :]
            tl.atomic_add(at, acc * tl.exp2(-lift), mask=m_out, sem="relaxed")
        else:
            at = (out + split.to(tl.int64) * n * d + i.to(tl.int64) * d)[:, None] + i_d[None, :]
            tl.store(at, acc * tl.exp2(-lift), mask=m_out)
    if BIAS_GRADIENT:
        tl.store(bias_grad + split.to(tl.int64) * n + i, bias_sum * tl.exp2(-lift), mask=i < n)


def row_gradients(
    problem: Owners, *, features: bool = True, bias: bool = False, triangle: bool = False
) -> tuple[Tensor, Tensor]:
    """Parts [splits, n, D] of sum_j G_ij y_j, and [splits, n] of the sums of the softmax part; float32, [0]
    what is not wanted. `triangle`: x is y, and the parts are one."""
    x, y = problem.x, problem.y
    (n, d), m = x.shape, y.shape[0]
    shape = configs.shape("gradient_triangle" if triangle else "gradient_rows", x, d, problem.positives)
    row_blocks, col_blocks = launch.cdiv(n, shape.block_m), launch.cdiv(m, shape.block_n)
    steps = col_blocks // 2 + 1 if triangle else col_blocks
    splits = launch.splits(row_blocks, steps, x)
    if triangle:
        out = x.new_zeros((1, n, d), dtype=torch.float32)
    else:
        out = x.new_empty((splits, n, d) if features else (0,), dtype=torch.float32)
    bias_grad = x.new_empty((splits, n) if bias else (0,), dtype=torch.float32)
    scale = launch.scalar(problem.scale)
    mask, *mask_layout = mask_arguments(problem.mask)
    _rows_kernel[(row_blocks, splits)](
        x, y, out, bias_grad, scale, problem.bias, problem.own_labels, problem.other_labels,
        problem.own_index, problem.other_index, mask, problem.own.planes, problem.other.planes,
        problem.other.ranges, problem.other.index_ranges, problem.bound, n, m, d, problem.exclude or 0,
        *x.stride(), *y.stride(), *mask_layout, launch.cdiv(steps, splits),
        TRIANGLE=triangle, OWN=problem.own.softmax, OTHER=problem.other.softmax,
        OWN_POSITIVES=problem.own.positives, OTHER_POSITIVES=problem.other.positives,
        FEATURES=features, BIAS_GRADIENT=bias, SCALE_TENSOR=isinstance(scale, Tensor),
        EXCLUDE=problem.exclude is not None, AMONG=problem.among, POSITIVES=problem.positives,
        BIAS=problem.bias_of, PRECISION=launch.precision(x), EVEN_D=d == configs.padded(d),
        BLOCK_M=shape.block_m, BLOCK_N=shape.block_n, BLOCK_D=configs.padded(d), **launch.options(shape),
    )  # fmt: skip
    return out, bias_grad
