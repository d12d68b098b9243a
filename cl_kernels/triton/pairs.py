"""Which pairs of rows and columns count: the problem of a launcher, and device functions over a tile."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import LOG2E


@dataclass(frozen=True)
class Contrast:
    """The arguments of the `contrastive` ops (ops.py)."""

    q: Tensor  # [N, D]
    k: Tensor | None  # [M, D], None: q
    scale: Tensor
    exclude: int | None
    row_labels: Tensor | None  # [N]
    col_labels: Tensor | None  # [M]
    among: str
    label_positives: bool
    positive_index: Tensor | None  # [N]
    positive_mask: Tensor | None  # [R, C]
    key_bias: Tensor | None  # [M]
    both_axes: bool

    @property
    def keys(self) -> Tensor:
        return self.q if self.k is None else self.k

    @property
    def offset(self) -> int | None:
        """The excluded offset, None where no pair lies on it."""
        n, m = self.q.shape[0], self.keys.shape[0]
        return self.exclude if self.exclude is not None and -n < self.exclude < m else None

    @property
    def positives(self) -> str:
        if self.label_positives:
            return "labels"
        if self.positive_index is not None:
            return "index"
        return "none" if self.positive_mask is None else "mask"

    @property
    def mirrored(self) -> bool:
        """Whether S and the denominators are symmetric."""
        return (
            self.k is None
            and not self.both_axes
            and self.exclude in (None, 0)
            and self.key_bias is None
            and same_memory(self.row_labels, self.col_labels)
        )


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def contrast(*arguments: Any) -> Contrast:
    """The problem with its vectors contiguous, as kernels read them; labels that are the same stay so."""
    given = Contrast(*arguments)
    rows = contiguous(given.row_labels)
    cols = rows if same_memory(given.row_labels, given.col_labels) else contiguous(given.col_labels)
    return replace(
        given, row_labels=rows, col_labels=cols, positive_index=contiguous(given.positive_index),
        key_bias=contiguous(given.key_bias),
    )  # fmt: skip


def same_memory(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


def mask_arguments(mask: Tensor | None, transposed: bool = False) -> tuple[Any, ...]:
    """A positive mask [R, C] (or its transpose) as kernel arguments: memory, sizes, strides."""
    if mask is None:
        return None, 1, 1, 0, 0
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    mask = mask.T if transposed else mask
    return mask, *mask.shape, *mask.stride()


@triton.jit
def on_edge(
    first_i, first_j, n, m, exclude, EXCLUDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Whether a tile holds an excluded pair, or reaches past the last row or column."""
    edge = (first_i + BLOCK_M > n) | (first_j + BLOCK_N > m)
    if EXCLUDE:
        first = first_i + exclude
        edge = edge | ((first < first_j + BLOCK_N) & (first_j < first + BLOCK_M))
    return edge


@triton.jit
def counted(i, j, n, m, exclude, EXCLUDE: tl.constexpr):
    """Which pairs of a tile exist and are not excluded."""
    m_pair = (i < n)[:, None] & (j < m)[None, :]
    if EXCLUDE:
        m_pair = m_pair & ((i + exclude)[:, None] != j[None, :])
    return m_pair


@triton.jit
def mask_tile(mask, i, j, mask_rows, mask_cols, stride_row, stride_col):
    """mask[i % R, j % C] of all pairs, those that do not count too: every address is inside."""
    at_row = (i % mask_rows).to(tl.int64) * stride_row
    at_col = (j % mask_cols).to(tl.int64) * stride_col
    return tl.load(mask + at_row[:, None] + at_col[None, :]).to(tl.float32)


@triton.jit
def within(column, first, SIZE: tl.constexpr):
    """Whether any of the columns lies in [first, first + SIZE)."""
    return tl.max(((column >= first) & (column < first + SIZE)).to(tl.int32), 0) > 0


@triton.jit
def index_range(b_index, COUNTS: tl.constexpr):
    """The first and the last index of a block, without -1."""
    if COUNTS:
        return tl.min(tl.where(b_index < 0, 2147483647, b_index), 0), tl.max(b_index, 0)
    return 0, 0


@triton.jit
def pair_gradient(
    s, factor, lift, i, j, first_i, first_j, n, m, exclude, bias, b_own_label, b_own_index,
    own_first, own_last, own_shift, own_coef, own_weight, own_low,
    other_labels, other_index, other_planes, top, low, other_first, other_last,
    mask, mask_rows, mask_cols, stride_mask_row, stride_mask_col,
    OWN: tl.constexpr, OTHER: tl.constexpr, OWN_POSITIVES: tl.constexpr, OTHER_POSITIVES: tl.constexpr,
    EXCLUDE: tl.constexpr, AMONG: tl.constexpr, POSITIVES: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(softmax part, all of it) of G of a tile, owners i by others j, from its products s; times 2^lift.

    The softmax part is coef 2^(S - shift) of the owner's row (OWN) and of the other's (OTHER). No logit that
    counts exceeds `top`, the highest shift of the others, so where no shift of either lies further below it,
    2^(S - top) serves both: what underflows then is below 2^-66 of any row. The positives' part is weight
    times w, the owner's and the other's; indices are compared where their range, [first, last] of the owners'
    and of the others', meets the tile. What the others bring is loaded where it is used, not before: a
    thread holds a quarter of the columns, and each vector of them costs as many registers.
    """
    if BIAS == "own":
        s = s * factor + tl.load(bias + i, mask=i < n, other=0.0)[:, None] * LOG2E
        factor = 1.0
    if BIAS == "other":
        s = s * factor + tl.load(bias + j, mask=j < m, other=0.0)[None, :] * LOG2E
        factor = 1.0
    if OTHER:
        level = tl.load(other_planes + 3 * m + j, mask=j < m, other=0.0)
        s = s * factor + (lift - top)
        if top - tl.minimum(own_low, low) <= 60.0:
            levels = level[None, :]
            if OWN:
                # At most 60 by now, but for rows whose coefficient is 0.
                levels += (own_coef * tl.exp2(tl.minimum(top - own_shift, 60.0)))[:, None]
            softmax = tl.exp2(s) * levels
        else:
            shift = tl.load(other_planes + j, mask=j < m, other=0.0)
            if OWN:
                softmax = tl.exp2(s + (top - own_shift)[:, None]) * own_coef[:, None]
            s = tl.exp2(s + (top - shift)[None, :])
            coef = tl.load(other_planes + m + j, mask=j < m, other=0.0)
            if OWN:
                softmax += s * coef[None, :]
            else:
                softmax = s * coef[None, :]
    elif OWN:
        softmax = tl.exp2(s * factor + (lift - own_shift)[:, None]) * own_coef[:, None]
    else:
        softmax = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    unit = tl.exp2(lift)
    g = softmax
    if AMONG != "all" or POSITIVES == "labels":
        same = b_own_label[:, None] == tl.load(other_labels + j, mask=j < m, other=0)[None, :]
        if AMONG == "same":
            g = tl.where(same, g, 0.0)
        if AMONG == "different":
            g = tl.where(same, 0.0, g)
        softmax = g
        if POSITIVES == "labels" and (OWN_POSITIVES or OTHER_POSITIVES):
            other_weight = tl.load(other_planes + 2 * m + j, mask=j < m, other=0.0)
            g += tl.where(same, (own_weight * unit)[:, None] + (other_weight * unit)[None, :], 0.0)
    if POSITIVES == "mask":
        if mask_rows > 0:  # always: but what is loaded under a condition is not staged in shared memory
            if OWN_POSITIVES:
                weight = mask_tile(mask, i, j, mask_rows, mask_cols, stride_mask_row, stride_mask_col)
                g += (own_weight * unit)[:, None] * weight
            if OTHER_POSITIVES:
                weight = mask_tile(mask, j, i, mask_rows, mask_cols, stride_mask_row, stride_mask_col)
                other_weight = tl.load(other_planes + 2 * m + j, mask=j < m, other=0.0)
                g += (other_weight * unit)[None, :] * tl.trans(weight)
    if on_edge(first_i, first_j, n, m, exclude, EXCLUDE, BLOCK_M, BLOCK_N):
        m_pair = counted(i, j, n, m, exclude, EXCLUDE)
        g = tl.where(m_pair, g, 0.0)
        softmax = tl.where(m_pair, softmax, 0.0)
    if POSITIVES == "index" and OWN_POSITIVES:
        if (own_last >= first_j) & (own_first < first_j + BLOCK_N):
            g += tl.where(b_own_index[:, None] == j[None, :], (own_weight * unit)[:, None], 0.0)
    if POSITIVES == "index" and OTHER_POSITIVES:
        if (other_last >= first_i) & (other_first < first_i + BLOCK_M):
            b_other_index = tl.load(other_index + j, mask=j < m, other=-1).to(tl.int32)
            other_weight = tl.load(other_planes + 2 * m + j, mask=j < m, other=0.0)
            hit = b_other_index[None, :] == i[:, None]
            g = tl.where(hit, g + (other_weight * unit)[None, :], g)
    return softmax, g
