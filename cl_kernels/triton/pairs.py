"""The pairs of rows and columns that count: a problem's vectors and mask as kernels take them, and device
functions over a tile."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Contrast, same_memory
from .tiles import LOG2E, NOTHING

_COLUMNS = tl.constexpr(64)  # whose labels are looked through at a time


class Rules(NamedTuple):
    """The constants of a gradient's kernels: which terms there are, and which pairs count."""

    own: bool  # softmax of the owners' rows
    other: bool  # softmax of the others' rows
    own_positives: bool
    other_positives: bool
    among: str
    positives: str


class Side(NamedTuple):
    """The vectors of a gradient's owners or others, the rows of S or its columns, as kernels take them."""

    bias: Any
    partner: Any  # index of each one's positive
    planes: Any  # as in gradient_terms.Terms
    tags: Any


class Owner(NamedTuple):
    """A block of owners, in registers."""

    label: Any
    partner: Any
    first: Any  # and last of the partners' indices
    last: Any
    shift: Any
    coef: Any
    weight: Any
    low: Any  # the lowest shift of coefficients that are not 0


class Tile(NamedTuple):
    """Indices of a tile's owners and others, and the first ones."""

    i: Any
    j: Any
    first_i: Any
    first_j: Any


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def packed(problem: Contrast) -> Contrast:
    """The problem with its vectors contiguous, as kernels read them; labels that are the same stay so."""
    rows = contiguous(problem.row_labels)
    cols = rows if same_memory(problem.row_labels, problem.col_labels) else contiguous(problem.col_labels)
    return problem._replace(
        row_labels=rows, col_labels=cols, positive_index=contiguous(problem.positive_index),
        key_bias=contiguous(problem.key_bias),
    )  # fmt: skip


def mask_arguments(mask: Tensor | None) -> tuple[Tensor | None, tuple[int, ...], tuple[int, ...]]:
    """A positive mask [R, C] as kernel arguments: itself, (R, C), its strides."""
    if mask is None:
        return None, (1, 1), (0, 0)
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask, mask.shape, mask.stride()


@triton.jit
def on_edge(first_i, first_j, sizes, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether a tile holds an excluded pair, or reaches past the last row or column; `sizes`: n, m, and the
    excluded offset or None."""
    n, m, exclude = sizes
    edge = (first_i + BLOCK_M > n) | (first_j + BLOCK_N > m)
    if exclude is not None:
        first = first_i + exclude
        edge = edge | ((first < first_j + BLOCK_N) & (first_j < first + BLOCK_M))
    return edge


@triton.jit
def counted(i, j, sizes):
    """Mask of a tile: its pairs that exist and are not excluded."""
    n, m, exclude = sizes
    m_pair = (i < n)[:, None] & (j < m)[None, :]
    if exclude is not None:
        m_pair = m_pair & ((i + exclude)[:, None] != j[None, :])
    return m_pair


@triton.jit
def mask_tile(mask, i, j, mask_rows, mask_cols):
    """mask[i % R, j % C] of all pairs, those that do not count too: every address is inside."""
    at_row = (i % mask_rows).to(tl.int64) * mask.stride_row
    at_col = (j % mask_cols).to(tl.int64) * mask.stride_col
    return tl.load(mask.at + at_row[:, None] + at_col[None, :]).to(tl.float32)


@triton.jit
def index_range(b_index, COUNTS: tl.constexpr):
    """The first and the last index of a block, without -1."""
    if COUNTS:
        return tl.min(tl.where(b_index < 0, 2147483647, b_index), 0), tl.max(b_index, 0)
    return 0, 0


@triton.jit
def label_numbers(b_label, columns, m, BLOCK: tl.constexpr):
    """int32 that are equal where int64 labels are: themselves from -2^31 to below 2^31 - 1 - m; for others,
    from there on, the first of the m columns that has the label, m where none has."""
    beyond = 2147483647 - m
    large = (b_label >= beyond) | (b_label < -2147483648)
    number = b_label.to(tl.int32)
    if tl.max(large.to(tl.int32), 0) > 0:
        column = tl.full((BLOCK,), 0, tl.int32) + m
        for first in range(0, m, _COLUMNS):
            j = first + tl.arange(0, _COLUMNS)
            of_column = tl.load(columns + j, mask=j < m, other=0)
            same = (b_label[:, None] == of_column[None, :]) & (j < m)[None, :]
            column = tl.minimum(column, tl.min(tl.where(same, j[None, :], m), 1))
        number = tl.where(large, beyond + column, number)
    return number


@triton.jit
def load_terms(own, i, n):
    """Shifts, coefficients, weights and the lowest shift of the owners i, as in Owner."""
    shift = tl.load(own.planes + i, mask=i < n, other=0.0)
    coef = tl.load(own.planes + n + i, mask=i < n, other=0.0)
    weight = tl.load(own.planes + 2 * n + i, mask=i < n, other=0.0)
    return shift, coef, weight, tl.min(tl.where(coef == 0.0, -NOTHING, shift), 0)


@triton.jit
def load_partners(own, i, n, RULES: tl.constexpr):
    """Labels, partners and the first and the last partner of the owners i, as in Owner."""
    label = i
    partner = i
    if RULES.positives == "labels" or RULES.among != "all":
        label = tl.load(own.tags + i, mask=i < n, other=0).to(tl.int32)
    if RULES.positives == "index" and RULES.own_positives:
        partner = tl.load(own.partner + i, mask=i < n, other=-1).to(tl.int32)
    first, last = index_range(partner, RULES.positives == "index" and RULES.own_positives)
    return label, partner, first, last


@triton.jit
def pair_gradient(
    s, factor, lift, tile, sizes, owner, own, other, ranges, mask, mask_sizes,
    RULES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(softmax part, all of it) of G of a tile, owners i by others j, from its products s; times 2^lift.

    The softmax part is coef 2^(S - shift) of the owner's row and of the other's. No logit that counts exceeds
    `top`, the highest shift of the others, so where no shift of either lies further below it, 2^(S - top)
    serves both: what underflows then is below 2^-66 of any row. The positives' part is weight times w, the
    owner's and the other's; indices are compared where their range, [first, last] of the owners' and of the
    others', meets the tile. What the others bring is loaded where it is used, not before: a thread holds a
    quarter of the columns, and each vector of them costs as many registers.
    """
    i, j, first_i, first_j = tile
    n, m = sizes[0], sizes[1]
    top, low, first, last = ranges
    if own.bias is not None:
        s = s * factor + tl.load(own.bias + i, mask=i < n, other=0.0)[:, None] * LOG2E
        factor = 1.0
    if other.bias is not None:
        s = s * factor + tl.load(other.bias + j, mask=j < m, other=0.0)[None, :] * LOG2E
        factor = 1.0
    if RULES.other:
        level = tl.load(other.planes + 3 * m + j, mask=j < m, other=0.0)
        s = s * factor + (lift - top)
        if top - tl.minimum(owner.low, low) <= 60.0:
            levels = level[None, :]
            if RULES.own:
                # At most 60 by now, but for rows whose coefficient is 0.
                levels += (owner.coef * tl.exp2(tl.minimum(top - owner.shift, 60.0)))[:, None]
            softmax = tl.exp2(s) * levels
        else:
            shift = tl.load(other.planes + j, mask=j < m, other=0.0)
            if RULES.own:
                softmax = tl.exp2(s + (top - owner.shift)[:, None]) * owner.coef[:, None]
            s = tl.exp2(s + (top - shift)[None, :])
            coef = tl.load(other.planes + m + j, mask=j < m, other=0.0)
            if RULES.own:
                softmax += s * coef[None, :]
            else:
                softmax = s * coef[None, :]
    elif RULES.own:
        softmax = tl.exp2(s * factor + (lift - owner.shift)[:, None]) * owner.coef[:, None]
    else:
        softmax = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    unit = tl.exp2(lift)
    g = softmax
    if RULES.among != "all" or RULES.positives == "labels":
        tag = tl.load(other.tags + j, mask=j < m, other=0)
        same = owner.label[:, None] == tag.to(tl.int32)[None, :]
        if RULES.among == "same":
            g = tl.where(same, g, 0.0)
        if RULES.among == "different":
            g = tl.where(same, 0.0, g)
        softmax = g
        if RULES.positives == "labels" and (RULES.own_positives or RULES.other_positives):
            weight = (tag >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            g = tl.where(same, g + ((owner.weight * unit)[:, None] + (weight * unit)[None, :]), g)
    if RULES.positives == "mask":
        rows, cols = mask_sizes
        if rows > 0:  # always: but what is loaded under a condition is not staged in shared memory
            if RULES.own_positives:
                g += (owner.weight * unit)[:, None] * mask_tile(mask, i, j, rows, cols)
            if RULES.other_positives:
                times = mask_tile(mask, j, i, rows, cols)
                weight = tl.load(other.planes + 2 * m + j, mask=j < m, other=0.0)
                g += (weight * unit)[None, :] * tl.trans(times)
    if on_edge(first_i, first_j, sizes, BLOCK_M, BLOCK_N):
        m_pair = counted(i, j, sizes)
        g = tl.where(m_pair, g, 0.0)
        softmax = tl.where(m_pair, softmax, 0.0)
    if RULES.positives == "index" and RULES.own_positives:
        if (owner.last >= first_j) & (owner.first < first_j + BLOCK_N):
            g += tl.where(owner.partner[:, None] == j[None, :], (owner.weight * unit)[:, None], 0.0)
    if RULES.positives == "index" and RULES.other_positives:
        if (last >= first_i) & (first < first_i + BLOCK_M):
            partner = tl.load(other.partner + j, mask=j < m, other=-1).to(tl.int32)
            weight = tl.load(other.planes + 2 * m + j, mask=j < m, other=0.0)
            g = tl.where(partner[None, :] == i[:, None], g + (weight * unit)[None, :], g)
    return softmax, g
