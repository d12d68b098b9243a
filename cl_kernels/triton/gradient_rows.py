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

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..problem import Contrast
from . import launch
from .gradient_terms import Terms
from .pairs import Owner, Rules, Side, Tile, load_partners, load_terms, mask_arguments, pair_gradient
from .tiles import LOG2E, Matrix, dot, half_lift, load_rows, scalar


class Owners(NamedTuple):
    """A problem as seen from the owners of a gradient, the rows of S or its columns."""

    problem: Contrast
    own: Terms
    other: Terms
    bound: Tensor | None  # [1], for float16
    columns: bool = False  # the owners are the columns

    @property
    def features(self) -> tuple[Tensor, Tensor]:
        """Those of the owners [n, D] and of the others [m, D]."""
        q, k = self.problem.q, self.problem.keys
        return (k, q) if self.columns else (q, k)

    @property
    def exclude(self) -> int | None:
        """Other i + exclude is left out of owner i."""
        offset = self.problem.offset
        return -offset if self.columns and offset is not None else offset

    @property
    def vectors(self) -> tuple[tuple[Tensor | None, Tensor | None], ...]:
        """Biases, partners, planes and tags, each of the owners and of the others."""
        own, other, bias = self.own, self.other, self.problem.key_bias
        biases = (bias, None) if self.columns else (None, bias)
        return biases, (own.partner, other.partner), (own.planes, other.planes), (own.tags, other.tags)

    @property
    def rules(self) -> Rules:
        own, other, given = self.own, self.other, self.problem
        return Rules(own.softmax, other.softmax, own.positives, other.positives, given.among, given.positives)

    def transposed(self) -> Owners:
        return Owners(self.problem, self.other, self.own, self.bound, not self.columns)


@triton.jit(do_not_specialize=["n", "m", "d", "exclude", "mask_rows", "mask_cols", "steps"])
def _gradient_rows_kernel(
    x, y, out, bias_grad, scale, biases, partners, mask, planes, tags, ranges, index_ranges, bound,
    n, m, d, exclude, x_strides, y_strides, mask_rows, mask_cols, mask_strides, steps,
    TRIANGLE: tl.constexpr, FEATURES: tl.constexpr, BIAS_GRADIENT: tl.constexpr, EXCLUDE: tl.constexpr,
    RULES: tl.constexpr, PRECISION: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    x, y, mask = Matrix(x, *x_strides), Matrix(y, *y_strides), Matrix(mask, *mask_strides)
    own = Side(biases[0], partners[0], planes[0], tags[0])
    other = Side(biases[1], partners[1], planes[1], tags[1])
    sizes = (n, m, exclude if EXCLUDE else None)
    block_i = tl.program_id(0)
    split = tl.program_id(1)
    first_i = block_i * BLOCK_M
    i = first_i + tl.arange(0, BLOCK_M)
    i_d = tl.arange(0, BLOCK_D)
    b_x = load_rows(x, i, i < n, i_d, i_d < d, EVEN_D)
    factor = scalar(scale) * LOG2E
    lift = half_lift(bound) if bound is not None else 0.0
    terms = load_terms(own, i, n)
    owner = Owner(*load_partners(own, i, n, RULES), *terms)
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
        b_y = load_rows(y, j, j < m, i_d, i_d < d, EVEN_D)
        top, low = tl.load(ranges + block_j), tl.load(ranges + other_blocks + block_j)
        s = dot(b_x, tl.trans(b_y), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        softmax, g = pair_gradient(
            s, factor, lift, Tile(i, j, first_i, first_j), sizes, owner, own, other,
            (top, low, tl.load(index_ranges + block_j), tl.load(index_ranges + other_blocks + block_j)),
            mask, (mask_rows, mask_cols), RULES, BLOCK_M, BLOCK_N,
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
    owners: Owners, *, features: bool = True, bias: bool = False, triangle: bool = False
) -> tuple[Tensor, Tensor]:
    """Parts [splits, n, D] of sum_j G_ij y_j, and [splits, n] of the sums of the softmax part; float32, [0]
    what is not wanted. `triangle`: x is y, and the parts are one."""
    x, y = owners.features
    (n, d), m = x.shape, y.shape[0]
    kernel = "gradient_triangle" if triangle else "gradient_rows"
    shape = configs.shape(kernel, x, d, owners.problem.positives)
    row_blocks, col_blocks = launch.cdiv(n, shape.block_m), launch.cdiv(m, shape.block_n)
    steps = col_blocks // 2 + 1 if triangle else col_blocks
    splits = launch.splits(row_blocks, steps, x)
    if triangle:
        out = x.new_zeros((1, n, d), dtype=torch.float32)
    else:
        out = x.new_empty((splits, n, d) if features else (0,), dtype=torch.float32)
    bias_grad = x.new_empty((splits, n) if bias else (0,), dtype=torch.float32)
    mask, mask_sizes, mask_strides = mask_arguments(owners.problem.positive_mask)
    biases, partners, planes, tags = owners.vectors
    _gradient_rows_kernel[(row_blocks, splits)](
        x, y, out, bias_grad, launch.scalar(owners.problem.scale), biases, partners, mask, planes, tags,
        owners.other.ranges, owners.other.index_ranges, owners.bound,
        n, m, d, owners.exclude or 0, x.stride(), y.stride(), *mask_sizes, mask_strides,
        launch.cdiv(steps, splits),
        TRIANGLE=triangle, FEATURES=features, BIAS_GRADIENT=bias, EXCLUDE=owners.exclude is not None,
        RULES=owners.rules, PRECISION=launch.precision(x), EVEN_D=d == configs.padded(d),
        BLOCK_M=shape.block_m, BLOCK_N=shape.block_n, BLOCK_D=configs.padded(d), **launch.options(shape),
    )  # fmt: skip
    return out, bias_grad
