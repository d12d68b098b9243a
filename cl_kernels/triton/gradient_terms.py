"""The terms of the engine's gradient that each row (or column) brings: its softmax as coef 2^(S - shift).

A log-sum-exp L (float64, times log2(e) for base 2) is rounded to the float32 shift, and what rounding leaves
goes into the coefficient, so that exp(S - L) keeps its digits: coef = g 2^(shift - L). A row with nothing in
its denominator has coefficient 0. The weight is the gradient of the row's sum over positives.

Labels are compared in every tile: they become numbers of 32 bits here, which are equal where the labels are,
whatever those are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Contrast
from . import launch
from .pairs import index_range, label_numbers
from .tiles import LOG2E, NOTHING


class Terms(NamedTuple):
    """The terms of rows (or columns), as kernels take them."""

    planes: Tensor  # [4, n] float32: shifts, coefficients, weights, coefficients at the block's highest shift
    ranges: Tensor  # [2, blocks] float32: the highest and the lowest shift in each block
    index_ranges: Tensor  # [2, blocks] int32: the first and the last positive's index in each block
    softmax: bool  # whether any coefficient counts
    positives: bool  # whether any weight counts
    partner: Tensor | None = None  # [n]: the index of each one's positive
    tags: Tensor | None = None  # [n] int64: the label's number, and above it the bits of the weight


@triton.jit(do_not_specialize=["m"])
def _terms_kernel(
    lse, grad, weight_grad, index, labels, columns, planes, tags, ranges, index_ranges, bound, largest_weight,
    n, m, blocks, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    coef = tl.zeros((BLOCK,), tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    high = NOTHING
    low = -NOTHING
    if grad is not None:
        exact = tl.load(lse + i, mask=i < n, other=float("-inf")) * LOG2E
        empty = exact == float("-inf")
        shift = tl.where(empty, 0.0, exact).to(tl.float32)
        rest = (shift.to(tl.float64) - exact).to(tl.float32)
        g = tl.load(grad + i, mask=i < n, other=0.0).to(tl.float32)
        coef = tl.where(empty, 0.0, g * tl.exp2(rest))
        high = tl.max(tl.where(empty, NOTHING, shift), 0)
        low = tl.min(tl.where(empty, -NOTHING, shift), 0)
        tl.store(planes + i, shift, mask=i < n)
        level = tl.where(empty, 0.0, coef * tl.exp2(high - shift))
        tl.store(planes + 3 * n + i, level, mask=i < n)
    if weight_grad is not None:
        weight = tl.load(weight_grad + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(planes + n + i, coef, mask=i < n)
    tl.store(planes + 2 * n + i, weight, mask=i < n)
    tl.store(ranges + block, high)
    tl.store(ranges + blocks + block, low)
    if index is not None:
        first, last = index_range(tl.load(index + i, mask=i < n, other=-1).to(tl.int32), True)
        tl.store(index_ranges + block, first)
        tl.store(index_ranges + blocks + block, last)
    if labels is not None:
        number = label_numbers(tl.load(labels + i, mask=i < n, other=0), columns, m, BLOCK)
        above = weight.to(tl.int32, bitcast=True).to(tl.int64) << 32
        tl.store(tags + i, above | number.to(tl.uint32, bitcast=True).to(tl.int64), mask=i < n)
    if bound is not None:
        largest = tl.abs(weight)
        if largest_weight is not None:
            largest *= tl.load(largest_weight)
        tl.atomic_max(bound, tl.max(tl.maximum(tl.abs(coef), largest), 0), sem="relaxed")


def terms(
    problem: Contrast,
    lse: Tensor,
    grad: Tensor | None,
    weight_grad: Tensor | None,
    block: int,
    bound: Tensor | None,
    largest_weight: Tensor | None = None,
    columns: bool = False,
) -> Terms:
    """The terms of the rows (or columns) with these log-sum-exps and gradients, [n], None: no such term.

    `bound` [1], if given, rises to the largest of them (weights times `largest_weight`). `block`: of how many
    rows kernels look up a range."""
    n, m = problem.q.shape[0], problem.keys.shape[0]
    labels, index = problem.row_labels, problem.positive_index
    if columns:
        n, labels, index = m, problem.col_labels, None
    blocks = launch.cdiv(n, block)
    planes = lse.new_empty((4, n), dtype=torch.float32)
    ranges = lse.new_empty((2, blocks), dtype=torch.float32)
    index_ranges = lse.new_empty((2, blocks), dtype=torch.int32)
    tags = None if labels is None else torch.empty_like(labels)
    _terms_kernel[(blocks,)](
        lse, grad, weight_grad, index, labels, problem.col_labels, planes, tags, ranges, index_ranges, bound,
        largest_weight, n, m, blocks, BLOCK=block,
    )  # fmt: skip
    return Terms(planes, ranges, index_ranges, grad is not None, weight_grad is not None, index, tags)
