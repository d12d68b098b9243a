"""Which pairs of rows and columns count: device functions over a tile, and the problem as launchers see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cl_kernels.triton.tiles import LOG2E, NOTHING


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


def contrast(
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    exclude: int | None,
    row_labels: Tensor | None,
    col_labels: Tensor | None,
    among: str,
    label_positives: bool,
    positive_index: Tensor | None,
    positive_mask: Tensor | None,
    key_bias: Tensor | None,
    both_axes: bool,
) -> Contrast:
    """The problem with its vectors contiguous, as kernels read them; labels that are the same stay so."""
    rows = contiguous(row_labels)
    cols = rows if same_memory(row_labels, col_labels) else contiguous(col_labels)
    return Contrast(
        q, k, scale, exclude, rows, cols, among, label_positives, contiguous(positive_index), positive_mask,
        contiguous(key_bias), both_axes,
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
def mask_tile(mask, i, j, m_pair, mask_rows, mask_cols, stride_row, stride_col):
    """mask[i % R, j % C], 0 where a pair does not count."""
    at_row = (i % mask_rows).to(tl.int64) * stride_row
    at_col = (j % mask_cols).to(tl.int64) * stride_col
    return tl.load(mask + at_row[:, None] + at_col[None, :], mask=m_pair, other=0).to(tl.float32)


@triton.jit
def within(column, first, SIZE: tl.constexpr):
    """Whether any of the columns lies in [first, first + SIZE)."""
    return tl.max(((column >= first) & (column < first + SIZE)).to(tl.int32), 0) > 0


@triton.jit
def shift_range(shift, coef):
    """The highest and the lowest shift of rows that count."""
    counts = coef != 0.0
    return tl.max(tl.where(counts, shift, NOTHING), 0), tl.min(tl.where(counts, shift, -NOTHING), 0)


@triton.jit
def pair_gradient(
    s, i, j, first_i, first_j, n, m, exclude, bias, b_own_label, b_other_label, b_own_index, b_other_index,
    mask, mask_rows, mask_cols, stride_mask_row, stride_mask_col,
    own_shift, own_coef, own_weight, own_high, own_low,
    other_shift, other_coef, other_weight, other_high, other_low,
    OWN: tl.constexpr, OTHER: tl.constexpr, OWN_POSITIVES: tl.constexpr, OTHER_POSITIVES: tl.constexpr,
    EXCLUDE: tl.constexpr, AMONG: tl.constexpr, POSITIVES: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(softmax part, all of it) of G of a tile, owners i by others j, from its base-2 products s.

    The softmax part is coef 2^(s - shift) of the owner's row (OWN) and of the other's (OTHER). Where both are
    wanted and all the log-sum-exps of a tile lie within 2^60, one exponential serves both: what underflows
    then is below 2^-66 of any row. The positives' part is weight times w, the owner's and the other's.
    """
    edge = on_edge(first_i, first_j, n, m, exclude, EXCLUDE, BLOCK_M, BLOCK_N)
    if BIAS == "own":
        s += tl.load(bias + i, mask=i < n, other=0.0)[:, None] * LOG2E
    if BIAS == "other":
        s += tl.load(bias + j, mask=j < m, other=0.0)[None, :] * LOG2E
    if AMONG == "same":
        s = tl.where(b_own_label[:, None] == b_other_label[None, :], s, float("-inf"))
    if AMONG == "different":
        s = tl.where(b_own_label[:, None] != b_other_label[None, :], s, float("-inf"))
    if edge:
        s = tl.where(counted(i, j, n, m, exclude, EXCLUDE), s, float("-inf"))

    if OWN and OTHER:
        high = tl.maximum(own_high, other_high)
        high = tl.where(high == NOTHING, 0.0, high)
        if high - tl.minimum(own_low, other_low) <= 60.0:
            # The bound is for rows that do not count: their coefficient is 0, their shift anything.
            own = own_coef * tl.exp2(tl.minimum(high - own_shift, 60.0))
            other = other_coef * tl.exp2(tl.minimum(high - other_shift, 60.0))
            softmax = tl.exp2(s - high) * (own[:, None] + other[None, :])
        else:
            softmax = tl.exp2(s - own_shift[:, None]) * own_coef[:, None]
            softmax += tl.exp2(s - other_shift[None, :]) * other_coef[None, :]
    elif OWN:
        softmax = tl.exp2(s - own_shift[:, None]) * own_coef[:, None]
    elif OTHER:
        softmax = tl.exp2(s - other_shift[None, :]) * other_coef[None, :]
    else:
        softmax = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    g = softmax
    if OWN_POSITIVES or OTHER_POSITIVES:
        if POSITIVES == "labels":
            weight = own_weight[:, None] + other_weight[None, :]
            positive = b_own_label[:, None] == b_other_label[None, :]
            if edge:
                positive = positive & counted(i, j, n, m, exclude, EXCLUDE)
            g += tl.where(positive, weight, 0.0)
        if POSITIVES == "mask":
            m_pair = counted(i, j, n, m, exclude, EXCLUDE)
            if OWN_POSITIVES:
                g += own_weight[:, None] * mask_tile(
                    mask, i, j, m_pair, mask_rows, mask_cols, stride_mask_row, stride_mask_col
                )
            if OTHER_POSITIVES:
                g += other_weight[None, :] * tl.trans(
                    mask_tile(
                        mask, j, i, tl.trans(m_pair), mask_rows, mask_cols, stride_mask_row, stride_mask_col
                    )
                )
        if POSITIVES == "index":
            if OWN_POSITIVES:
                if within(b_own_index, first_j, BLOCK_N):
                    g += tl.where(b_own_index[:, None] == j[None, :], own_weight[:, None], 0.0)
            if OTHER_POSITIVES:
                if within(b_other_index, first_i, BLOCK_M):
                    g += tl.where(b_other_index[None, :] == i[:, None], other_weight[None, :], 0.0)
    return softmax, g
