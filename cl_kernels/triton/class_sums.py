"""Sums over positives by label of rows in half precision, from sums of the rows of each class: O(N D) instead
of a compare, a select and two additions for each pair in the log-sum-exp's tiles.

The rows are walked in the order of their labels, in chunks. The positives of a row in its own chunk are
added up by a product with ones. Only the first and the last class of a chunk reach beyond it: of those, whole
chunks are added up by their sums, which a kernel made before, and of the chunk where the class begins or ends
the rows that belong to it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Contrast
from . import launch
from .tiles import Matrix, load_rows, scalar

FEWEST_ROWS = 8192  # below, the launches of the sort take longer than the tiles' own sums, by the model
CHUNK = 64  # rows in the order of labels
CHUNKS = 16  # whose sums are loaded at a time
FEATURES = 32


@triton.jit(do_not_specialize=["n"])
def _chunk_sums_kernel(
    x, order, sums, n, d, x_strides, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The sum of the rows of each chunk, float64 [chunks, D]."""
    block = tl.program_id(0)
    i_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = _rows_sum(Matrix(x, *x_strides), order, block * BLOCK, 0, n, i_d, d, BLOCK)
    tl.store(sums + block.to(tl.int64) * d + i_d, total, mask=i_d < d)


@triton.jit
def _rows_sum(x, order, first, begin, end, i_d, d, BLOCK: tl.constexpr):
    """The sum of the rows at places first ... first + BLOCK - 1 of an order, those in [begin, end)."""
    place = first + tl.arange(0, BLOCK)
    m_row = (place >= begin) & (place < end)
    i = tl.load(order + place, mask=m_row, other=0)
    return tl.sum(load_rows(x, i, m_row, i_d, i_d < d, False).to(tl.float64), 0)


@triton.jit
def _chunks_sum(sums, first, last, i_d, d, COUNT: tl.constexpr):
    """The sum of chunks first ... last - 1."""
    total = tl.zeros((i_d.shape[0],), tl.float64)
    for begin in range(first, last, COUNT):
        chunk = begin + tl.arange(0, COUNT)
        at = sums + chunk.to(tl.int64)[:, None] * d + i_d[None, :]
        total += tl.sum(tl.load(at, mask=(chunk < last)[:, None] & (i_d < d)[None, :], other=0.0), 0)
    return total


@triton.jit
def _place(labels, label, low, high, AFTER: tl.constexpr):
    """The first place in [low, high) of sorted labels with this label, or one above; high if there is none.
    `AFTER`: the first place with one above."""
    while low < high:
        middle = (low + high) // 2
        found = tl.load(labels + middle)
        before = found <= label if AFTER else found < label
        low, high = tl.where(before, middle + 1, low), tl.where(before, high, middle)
    return low


@triton.jit(do_not_specialize=["n"])
def _class_positives_kernel(
    x, order, labels, sums, scale, positive_sum, positive_count, n, d, x_strides,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    x = Matrix(x, *x_strides)
    block = tl.program_id(0)
    first = block * BLOCK
    last = tl.minimum(first + BLOCK, n)
    place = first + tl.arange(0, BLOCK)
    i = tl.load(order + place, mask=place < n, other=0)
    label = tl.load(labels + place, mask=place < n, other=0)
    low, high = tl.load(labels + first), tl.load(labels + last - 1)
    begin = _place(labels, low, tl.full((), 0, tl.int32), first, False)
    end = _place(labels, high, last, n, True)
    begin_chunk, end_chunk = begin // BLOCK, (end - 1) // BLOCK
    m_pair = (label[:, None] == label[None, :]) & (place[:, None] != place[None, :])
    m_pair = m_pair & (place < n)[:, None] & (place < n)[None, :]
    weighted = tl.zeros((BLOCK,), tl.float64)
    for first_d in range(0, d, BLOCK_D):
        i_d = first_d + tl.arange(0, BLOCK_D)
        left = _rows_sum(x, order, begin_chunk * BLOCK, begin, first, i_d, d, BLOCK)
        left += _chunks_sum(sums, begin_chunk + 1, block, i_d, d, COUNT)
        right = _rows_sum(x, order, end_chunk * BLOCK, last, end, i_d, d, BLOCK)
        right += _chunks_sum(sums, block + 1, end_chunk, i_d, d, COUNT)
        b_x = load_rows(x, i, place < n, i_d, i_d < d, False)
        total = tl.dot(m_pair.to(b_x.dtype), b_x).to(tl.float64)
        total += tl.where((label == low)[:, None], left[None, :], 0.0)
        total += tl.where((label == high)[:, None], right[None, :], 0.0)
        weighted += tl.sum(b_x.to(tl.float64) * total, 1)
    count = tl.sum(m_pair.to(tl.int32), 1)
    count += tl.where(label == low, first - begin, 0) + tl.where(label == high, end - last, 0)
    tl.store(positive_sum + i, weighted * scalar(scale), mask=place < n)
    tl.store(positive_count + i, count.to(tl.float64), mask=place < n)


def by_class_sums(problem: Contrast) -> bool:
    """Whether the sums over a problem's positives come from here: a large batch's with itself, half, by
    label."""
    by_label = problem.positives == "labels" and problem.among == "all"
    of_itself = problem.mirrored and problem.exclude == 0 and problem.q.shape[0] >= FEWEST_ROWS
    return by_label and of_itself and problem.q.itemsize == 2


def class_positives(problem: Contrast) -> tuple[Tensor, Tensor]:
    """positive_sum [N], positive_count [N], float64."""
    x = problem.q
    n, d = x.shape
    assert problem.row_labels is not None  # as by_class_sums found
    labels, order = problem.row_labels.sort(stable=True)
    chunks = launch.cdiv(n, CHUNK)
    sums = x.new_empty((chunks, d), dtype=torch.float64)
    positive_sum, positive_count = sums.new_empty(n), sums.new_empty(n)
    _chunk_sums_kernel[(chunks, launch.cdiv(d, FEATURES))](
        x, order, sums, n, d, x.stride(), BLOCK=CHUNK, BLOCK_D=FEATURES
    )
    _class_positives_kernel[(chunks,)](
        x, order, labels, sums, launch.scalar(problem.scale), positive_sum, positive_count, n, d, x.stride(),
        BLOCK=CHUNK, BLOCK_D=FEATURES, COUNT=CHUNKS,
    )  # fmt: skip
    return positive_sum, positive_count
