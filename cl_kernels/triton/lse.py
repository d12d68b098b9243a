"""The log-sum-exp engine: row (and column) log-sum-exps of scale q k^T, and sums over positives.

The blocks of rows and of columns are gathered in groups. A program takes one group of each, walks their
tiles, and writes partial statistics of the rows and, where columns count too, of the columns into its slot. A
second kernel combines the slots, in a fixed order: no atomics, and the same bits each time.

With keys equal to queries the pairs above the diagonal stand for all: a tile's exponentials are added to its
rows and to its columns, N^2 D operations in all. One shift must then serve a tile's rows and columns. It
comes from a bound of the logits, |scale| times the largest norms of the rows and of the keys: none is needed
while that is at most 2^100, which keeps every sum in range. A program all of whose logits are so takes plain
sums (`_plain_sums`). Otherwise the shift is what exceeds, tile by tile, and where a sum came out too small,
one maximum for each row and each column is taken instead.

A partial statistic is a shift and a sum of 2^(S - shift), in base 2; sums over positives by label or mask,
and their counts, are two further planes, but for labels of many half rows (class_sums.py). In float32 the
whole parts of the positives' logits, which add up exactly, have a third, and the fractions that are left
keep their digits: so the sum over positives shares each logit's rounding with the log-sum-exp, and it
cancels in a converged row. Shifts that are no maxima are whole numbers for the same reason. The logits of
positives given by index the second kernel computes itself, from products of the same precision.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..problem import Contrast
from . import launch
from .class_sums import by_class_sums, class_positives
from .pairs import counted, label_numbers, mask_arguments, mask_tile, on_edge
from .tiles import LN2, LOG2E, NOTHING, Matrix, dot, load_rows, product, scalar

MOST_GROUPS = 128  # of rows or of columns: they times N floats stay small
MOST_BLOCKS = 32  # of rows, in a program, but for many rows
RESIDENT = 2  # programs at a time on a multiprocessor
OVERHEAD = 1  # of a column of tiles, in tiles
# Arguments whose values should not make kernels of their own.
SIZES = ["n", "m", "exclude", "groups_q", "groups_k", "blocks_q", "blocks_k"]
SAFE = tl.constexpr(100.0)  # |base-2 logits| up to which sums of 2^S neither overflow nor lose digits
TINY = tl.constexpr(2.0**-100)  # sums below this, relative to a shift, have lost digits


@triton.jit
def _norms_kernel(
    q, k, norms, labels, numbers, n, m, d, q_blocks, q_strides, k_strides,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The largest norm of a row in each block of q, then in each block of k; and numbers of q's labels."""
    block = tl.program_id(0)
    if block < q_blocks:
        if labels is not None:
            i = block * BLOCK_M + tl.arange(0, BLOCK_M)
            b_label = tl.load(labels + i, mask=i < n, other=0)
            tl.store(numbers + i, label_numbers(b_label, labels, n, BLOCK_M), mask=i < n)
        norm = _largest_norm(Matrix(q, *q_strides), block * BLOCK_M, n, d, BLOCK_M, BLOCK_D)
    else:
        first = (block - q_blocks) * BLOCK_N
        norm = _largest_norm(Matrix(k, *k_strides), first, m, d, BLOCK_N, BLOCK_D)
    tl.store(norms + block, norm)


@triton.jit
def _largest_norm(x, first, n, d, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    i = first + tl.arange(0, BLOCK)
    squared = tl.zeros((BLOCK,), tl.float32)
    for first_d in range(0, d, BLOCK_D):
        i_d = first_d + tl.arange(0, BLOCK_D)
        b_x = load_rows(x, i, i < n, i_d, i_d < d, False).to(tl.float32)
        squared += tl.sum(b_x * b_x, 1)
    return tl.sqrt(tl.max(squared, 0)) * (1 + 1e-5)


@triton.jit
def _plus(a, b, more_a, more_b):
    return a + more_a, b + more_b


@triton.jit
def _plus3(a, b, c, more_a, more_b, more_c):
    return a + more_a, b + more_b, c + more_c


@triton.jit
def _add(at, value, m_at, again):
    """Write values, or add them to what stands there."""
    value += tl.load(at, mask=m_at & again, other=0.0)
    tl.store(at, value, mask=m_at)


@triton.jit
def _add_columns(cols, j, m, peak, total, again):
    """Write the shifts and sums of columns, or merge them with what stands there."""
    if again:
        before = tl.load(cols + j, mask=j < m, other=NOTHING)
        after = tl.maximum(before, peak)
        total *= tl.exp2(peak - after)
        total += tl.load(cols + m + j, mask=j < m, other=0.0) * tl.exp2(before - after)
        peak = after
    tl.store(cols + j, peak, mask=j < m)
    tl.store(cols + m + j, total, mask=j < m)


@triton.jit
def _counted(i, j, sizes, MIRRORED: tl.constexpr):
    """Mask of the pairs of a tile that count; where tiles are mirrored, of the diagonal's those above it."""
    if MIRRORED:
        return (j < sizes[1])[None, :] & (j[None, :] > i[:, None])
    return counted(i, j, sizes)


@triton.jit
def _largest(norms, first, last):
    """The largest of norms[first:last]."""
    found = 0.0
    for block in range(first, last):
        found = tl.maximum(found, tl.load(norms + block))
    return found


@triton.jit
def _plain_sums(
    q, k, factor, labels, rows, cols, sizes, d, span,
    MIRRORED: tl.constexpr, AMONG: tl.constexpr, POSITIVES: tl.constexpr, PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Sums of 2^S over rows and columns, of logits that need no shift, and of S and 1 over positives by
    label. Down a column of tiles a thread adds up its own terms, which are reduced over lanes and warps once,
    at the end; a row's lie in one warp."""
    LABELS: tl.constexpr = (POSITIVES == "labels") or (AMONG != "all")
    n, m = sizes[0], sizes[1]
    begin_i, last_i, begin_j, last_j = span
    i_d = tl.arange(0, BLOCK_D)
    for block_j in range(begin_j, last_j):
        first_j = block_j * BLOCK_N
        j = first_j + tl.arange(0, BLOCK_N)
        if WHOLE:
            b_k = load_rows(k, j, j < m, i_d, i_d < d, EVEN_D)
        if LABELS:
            b_col_label = tl.load(labels[1] + j, mask=j < m, other=0)
        end_i = last_i
        if MIRRORED:
            end_i = tl.minimum(last_i, tl.cdiv(first_j + BLOCK_N - 1, BLOCK_M))
        if block_j != begin_j:
            tl.debug_barrier()  # what the column of tiles before wrote, by other threads
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        positive_total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        positive_count = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for block_i in tl.range(begin_i, end_i, disable_licm=True):
            first_i = block_i * BLOCK_M
            i = first_i + tl.arange(0, BLOCK_M)
            if WHOLE:
                b_q = load_rows(q, i, i < n, i_d, i_d < d, EVEN_D)
                s = dot(b_q, tl.trans(b_k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
            else:
                s = product(q, k, i, i < n, j, j < m, d, BLOCK_D, EVEN_D, PRECISION)
            e = tl.exp2(s * factor)
            if LABELS:
                b_row_label = tl.load(labels[0] + i, mask=i < n, other=0)
                same = b_row_label[:, None] == b_col_label[None, :]
                if AMONG != "all":
                    e = tl.where(same if AMONG == "same" else ~same, e, 0.0)
            if POSITIVES == "labels":
                # In the layout of S: what did not depend on it would be made again in another one.
                count = tl.where(same & ((s == s) | (s != s)), 1.0, 0.0)
            if on_edge(first_i, first_j, sizes, BLOCK_M, BLOCK_N):
                m_pair = _counted(i, j, sizes, MIRRORED)
                e = tl.where(m_pair, e, 0.0)
                if POSITIVES == "labels":
                    count = tl.where(m_pair, count, 0.0)
            total += e
            first_block = tl.maximum(begin_j, first_i // BLOCK_N) if MIRRORED else begin_j
            again = block_j != first_block
            if not again:
                tl.store(rows + i, tl.zeros((BLOCK_M,), tl.float32), mask=i < n)
            if POSITIVES == "labels":
                positive = tl.where(count != 0, s, 0.0)  # a NaN of weight 0 does not count
                positive_total += positive
                positive_count += count
                part, part_positive, part_count = tl.reduce((e, positive, count), 1, _plus3)
                _add(rows + 2 * n + i, part_positive * factor, i < n, again)
                _add(rows + 3 * n + i, part_count, i < n, again)
            else:
                part = tl.sum(e, 1)
            _add(rows + n + i, part, i < n, again)
        tl.store(cols + j, tl.zeros((BLOCK_N,), tl.float32), mask=j < m)
        tl.store(cols + m + j, tl.sum(total, 0), mask=j < m)
        if POSITIVES == "labels":
            of_column, count_of_column = tl.reduce((positive_total, positive_count), 0, _plus)
            tl.store(cols + 2 * m + j, of_column * factor, mask=j < m)
            tl.store(cols + 3 * m + j, count_of_column, mask=j < m)


@triton.jit(do_not_specialize=SIZES)
def _lse_kernel(
    q, k, scale, bias, row_labels, col_labels, mask, norms, rows, cols,
    n, m, d, exclude, q_strides, k_strides, mask_rows, mask_cols, mask_strides,
    groups_q, groups_k, blocks_q, blocks_k,
    MIRRORED: tl.constexpr, COLUMNS: tl.constexpr, EXCLUDE: tl.constexpr, AMONG: tl.constexpr,
    POSITIVES: tl.constexpr, PRECISION: tl.constexpr, EVEN_D: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    SUMS: tl.constexpr = (POSITIVES == "labels") or (POSITIVES == "mask")
    LABELS: tl.constexpr = (POSITIVES == "labels") or (AMONG != "all")
    WHOLES: tl.constexpr = SUMS and (q.dtype.element_ty == tl.float32)
    BASES: tl.constexpr = WHOLES and (POSITIVES == "mask")
    PLANES: tl.constexpr = 6 if BASES else 5 if WHOLES else 4 if SUMS else 2
    q, k, mask = Matrix(q, *q_strides), Matrix(k, *k_strides), Matrix(mask, *mask_strides)
    group = tl.program_id(0)
    if MIRRORED:
        # A group of rows meets those of columns from its diagonal on; the first and the last one together
        # meet as many as the second and the last but one.
        skipped = blocks_q * BLOCK_M // (blocks_k * BLOCK_N)  # groups of columns by a group of rows
        together = 2 * groups_k - (groups_q - 1) * skipped
        g, h = group // together, group % together
        h += g * skipped
        if h >= groups_k:
            h -= groups_k
            g = groups_q - 1 - g
            h += g * skipped
    else:
        g, h = group // groups_k, group % groups_k
    factor = scalar(scale) * LOG2E
    sizes = (n, m, exclude if EXCLUDE else None)
    rows += h.to(tl.int64) * PLANES * n
    cols += g.to(tl.int64) * PLANES * m
    q_blocks = tl.cdiv(n, BLOCK_M)
    last_i = tl.minimum((g + 1) * blocks_q, q_blocks)
    last_j = tl.minimum((h + 1) * blocks_k, tl.cdiv(m, BLOCK_N))
    if (MIRRORED or (COLUMNS and not SUMS)) and (not WHOLES) and (bias is None):
        bound = _largest(norms, g * blocks_q, last_i)
        bound *= _largest(norms + q_blocks, h * blocks_k, last_j) * tl.abs(factor)
        if bound <= SAFE:
            _plain_sums(
                q, k, factor, (row_labels, col_labels), rows, cols, sizes, d,
                (g * blocks_q, last_i, h * blocks_k, last_j),
                MIRRORED, AMONG, POSITIVES, PRECISION, EVEN_D, BLOCK_M, BLOCK_N, BLOCK_D, WHOLE,
            )  # fmt: skip
            last_i = g * blocks_q

    # What does not change from a row of tiles to the next is computed anew: kept, it fills the registers.
    for block_i in tl.range(g * blocks_q, last_i, disable_licm=True):
        first_i = block_i * BLOCK_M
        i = first_i + tl.arange(0, BLOCK_M)
        row_peak = tl.full((BLOCK_M,), NOTHING, tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        positive_sum = tl.zeros((BLOCK_M,), tl.float32)
        positive_count = tl.zeros((BLOCK_M,), tl.float32)
        positive_wholes = tl.zeros((BLOCK_M,), tl.float32)
        base = tl.zeros((BLOCK_M,), tl.float32)
        if WHOLE:
            i_d = tl.arange(0, BLOCK_D)
            b_q = load_rows(q, i, i < n, i_d, i_d < d, EVEN_D)
        if MIRRORED or COLUMNS:
            q_norm = tl.abs(factor) * tl.load(norms + block_i)
            if bias is not None:
                q_norm = float("inf")
        if LABELS:
            b_row_label = tl.load(row_labels + i, mask=i < n, other=0)
        again = block_i != g * blocks_q
        if MIRRORED or COLUMNS:
            if again:
                tl.debug_barrier()  # what the row of tiles above wrote, by other threads
        first_block = h * blocks_k
        if MIRRORED:
            first_block = tl.maximum(first_block, first_i // BLOCK_N)

        # So are, in each tile, the addresses of a mask's rows.
        for block_j in tl.range(first_block, last_j, disable_licm=POSITIVES == "mask"):
            first_j = block_j * BLOCK_N
            j = first_j + tl.arange(0, BLOCK_N)
            if WHOLE:
                b_k = load_rows(k, j, j < m, i_d, i_d < d, EVEN_D)
                s = dot(b_q, tl.trans(b_k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
            else:
                s = product(q, k, i, i < n, j, j < m, d, BLOCK_D, EVEN_D, PRECISION)
            s *= factor
            edge = on_edge(first_i, first_j, sizes, BLOCK_M, BLOCK_N)
            if LABELS:
                b_col_label = tl.load(col_labels + j, mask=j < m, other=0)
            if SUMS:
                if POSITIVES == "labels":
                    weight = tl.where(b_row_label[:, None] == b_col_label[None, :], 1.0, 0.0)
                else:
                    weight = mask_tile(mask, i, j, mask_rows, mask_cols)
                if edge:
                    weight = tl.where(_counted(i, j, sizes, MIRRORED), weight, 0.0)
                # A NaN of weight 0 does not count.
                positive = tl.where(weight != 0, s, 0.0)
                # All at once: to count apart, the compiler makes the weights again in a layout of its own.
                if WHOLES:
                    whole = tl.floor(positive + 0.5)
                    rest = weight * (positive - whole)
                    if BASES:
                        # By a weight that is no whole number only what is small is multiplied exactly enough.
                        top = tl.max(tl.where(weight != 0, whole, NOTHING), 1)
                        base = tl.where((positive_count == 0) & (top > NOTHING), top, base)
                        whole -= base[:, None]
                    terms = (rest, weight, weight * whole)
                    part_sum, part_count, part_wholes = tl.reduce(terms, 1, _plus3)
                    positive_wholes += part_wholes
                else:
                    part_sum, part_count = tl.reduce((weight * positive, weight), 1, _plus)
                positive_sum += part_sum
                positive_count += part_count
                if MIRRORED:
                    if WHOLES:
                        part_sum, part_count, part_wholes = tl.reduce(terms, 0, _plus3)
                        _add(cols + 4 * m + j, part_wholes, j < m, again)
                    else:
                        part_sum, part_count = tl.reduce((weight * positive, weight), 0, _plus)
                    _add(cols + 2 * m + j, part_sum, j < m, again)
                    _add(cols + 3 * m + j, part_count, j < m, again)

            if bias is not None:
                s += tl.load(bias + j, mask=j < m, other=0.0)[None, :] * LOG2E
            if AMONG == "same":
                s = tl.where(b_row_label[:, None] == b_col_label[None, :], s, float("-inf"))
            if AMONG == "different":
                s = tl.where(b_row_label[:, None] == b_col_label[None, :], float("-inf"), s)
            if edge:
                s = tl.where(_counted(i, j, sizes, MIRRORED), s, float("-inf"))

            if MIRRORED or COLUMNS:
                bound = q_norm * tl.load(norms + q_blocks + block_j)
                shift = tl.where(bound > SAFE, tl.ceil(bound - SAFE), 0.0)
                e = tl.exp2(s - shift)
                part, col_part = tl.sum(e, 1), tl.sum(e, 0)
                part_peak = tl.zeros((BLOCK_M,), tl.float32) + shift
                col_peak = tl.zeros((BLOCK_N,), tl.float32) + shift
                if not (bound <= SAFE):
                    least = tl.minimum(tl.min(part, 0), tl.min(col_part, 0))
                    if not ((least >= TINY) & (tl.max(part, 0) < float("inf"))):
                        part_peak = tl.maximum(tl.max(s, 1), NOTHING)
                        part = tl.sum(tl.exp2(s - part_peak[:, None]), 1)
                        col_peak = tl.maximum(tl.max(s, 0), NOTHING)
                        col_part = tl.sum(tl.exp2(s - col_peak[None, :]), 0)
                _add_columns(cols, j, m, col_peak, col_part, again)
                peak = tl.maximum(row_peak, part_peak)
                row_sum = row_sum * tl.exp2(row_peak - peak) + part * tl.exp2(part_peak - peak)
            else:
                peak = tl.maximum(row_peak, tl.max(s, 1))
                row_sum = row_sum * tl.exp2(row_peak - peak) + tl.sum(tl.exp2(s - peak[:, None]), 1)
            row_peak = peak

        tl.store(rows + i, row_peak, mask=i < n)
        tl.store(rows + n + i, row_sum, mask=i < n)
        if SUMS:
            tl.store(rows + 2 * n + i, positive_sum, mask=i < n)
            tl.store(rows + 3 * n + i, positive_count, mask=i < n)
        if WHOLES:
            tl.store(rows + 4 * n + i, positive_wholes, mask=i < n)
        if BASES:
            tl.store(rows + 5 * n + i, base, mask=i < n)


@triton.jit(do_not_specialize=["n", "m", "slots", "mirrored_slots", "group_rows", "mirrored_rows"])
def _lse_combine_kernel(
    parts, mirrored, q, k, scale, index, lse, positive_sum, positive_count,
    n, m, d, slots, mirrored_slots, group_rows, mirrored_rows, q_strides, k_strides,
    MIRRORED: tl.constexpr, POSITIVES: tl.constexpr, PLANES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    peak = tl.full((BLOCK_M,), NOTHING, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float64)
    weighted = tl.zeros((BLOCK_M,), tl.float64)
    count = tl.zeros((BLOCK_M,), tl.float64)
    for half in tl.static_range(2 if MIRRORED else 1):
        part = mirrored if half == 1 else parts
        count_slots = mirrored_slots if half == 1 else slots
        for first in range(0, count_slots, BLOCK_SLOTS):
            slot = first + tl.arange(0, BLOCK_SLOTS)[:, None]
            m_slot = (slot < count_slots) & (i < n)[None, :]
            if MIRRORED:
                # By rows the tiles right of the diagonal, by columns those above it.
                if half == 0:
                    m_slot = m_slot & (slot >= (i // group_rows)[None, :])
                else:
                    m_slot = m_slot & (slot <= (i // mirrored_rows)[None, :])
            at = part + slot.to(tl.int64) * PLANES * n + i[None, :]
            b_peak = tl.load(at, mask=m_slot, other=NOTHING)
            b_sum = tl.load(at + n, mask=m_slot, other=0.0)
            top = tl.maximum(peak, tl.max(b_peak, 0))
            total *= tl.exp2(peak - top).to(tl.float64)
            total += tl.sum((b_sum * tl.exp2(b_peak - top[None, :])).to(tl.float64), 0)
            peak = top
            if PLANES > 2:
                weighted += tl.sum(tl.load(at + 2 * n, mask=m_slot, other=0.0).to(tl.float64), 0)
                b_count = tl.load(at + 3 * n, mask=m_slot, other=0.0).to(tl.float64)
                count += tl.sum(b_count, 0)
            if PLANES > 4:
                weighted += tl.sum(tl.load(at + 4 * n, mask=m_slot, other=0.0).to(tl.float64), 0)
            if PLANES == 6:
                b_base = tl.load(at + 5 * n, mask=m_slot, other=0.0).to(tl.float64)
                weighted += tl.sum(b_base * b_count, 0)
    tl.store(lse + i, (peak.to(tl.float64) + tl.log2(total)) * LN2, mask=i < n)
    if POSITIVES == "index":
        b_index = tl.load(index + i, mask=i < n, other=-1)
        given = (b_index >= 0) & (b_index < m)
        q, k = Matrix(q, *q_strides), Matrix(k, *k_strides)
        s = product(q, k, i, i < n, b_index, given, d, BLOCK_D, False, PRECISION)
        own = tl.arange(0, BLOCK_M)
        s = tl.sum(tl.where(own[:, None] == own[None, :], s, 0.0), 1) * (scalar(scale) * LOG2E)
        weighted = tl.where(given, s, 0.0).to(tl.float64)
        count = given.to(tl.float64)
    if POSITIVES != "none":
        tl.store(positive_sum + i, weighted * LN2, mask=i < n)
        tl.store(positive_count + i, count, mask=i < n)


def _groups(
    row_blocks: int, col_blocks: int, tile: configs.Shape, q: Tensor, mirrored: bool
) -> tuple[int, int, int]:
    """Blocks of rows and of columns that a program visits where both are summed up, and how many programs.
    Few columns, and of rows, since a column's sum is reduced once for all of them, those with the least waves
    of programs times tiles of a program. A group of rows has whole groups of columns."""
    blocks_k = 1
    while blocks_k * MOST_GROUPS < col_blocks:
        blocks_k *= 2
    whole = max(1, blocks_k * tile.block_n // tile.block_m)
    least = launch.cdiv(launch.cdiv(row_blocks, MOST_GROUPS), whole) * whole
    together = RESIDENT * configs.device_of(q).processors

    def programs(blocks_q: int) -> int:
        groups_q, groups_k = launch.cdiv(row_blocks, blocks_q), launch.cdiv(col_blocks, blocks_k)
        # Of the groups of columns each group of rows leaves out so many more than the one before.
        skipped = blocks_q * tile.block_m // (blocks_k * tile.block_n) if mirrored else 0
        return groups_q * groups_k - skipped * (groups_q * (groups_q - 1) // 2)

    def cost(blocks_q: int) -> int:
        return launch.cdiv(programs(blocks_q), together) * (blocks_q + OVERHEAD)

    blocks_q = min(range(least, max(least, MOST_BLOCKS) + 1, whole), key=cost)
    return blocks_q, blocks_k, programs(blocks_q)


def log_sum_exp(problem: Contrast) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse [N], lse_cols [M] | [0], positive_sum [N] | [0], positive_count [N] | [0], float64."""
    if by_class_sums(problem):
        alone = problem._replace(row_labels=None, col_labels=None, label_positives=False)
        lse, lse_cols, _, _ = log_sum_exp(alone)
        return lse, lse_cols, *class_positives(problem)
    q, k = problem.q, problem.keys
    (n, d), m = q.shape, k.shape[0]
    positives = problem.positives
    sums = positives in ("labels", "mask")
    variant = "transposed" if q.stride(0) == 1 and d > 1 else ""
    tile = configs.shape("lse", q, d, "pairs" if sums or problem.among != "all" else variant)
    mirrored = problem.mirrored and problem.exclude == 0 and positives != "mask"
    columns = problem.both_axes
    row_blocks, col_blocks = launch.cdiv(n, tile.block_m), launch.cdiv(m, tile.block_n)
    if mirrored or columns:
        blocks_q, blocks_k, programs = _groups(row_blocks, col_blocks, tile, q, mirrored)
    else:
        blocks_q, blocks_k = 1, launch.cdiv(col_blocks, launch.splits(row_blocks, col_blocks, q))
        programs = row_blocks * launch.cdiv(col_blocks, blocks_k)
    groups_q, groups_k = launch.cdiv(row_blocks, blocks_q), launch.cdiv(col_blocks, blocks_k)
    norms = numbered = numbers = None
    row_labels, col_labels = problem.row_labels, problem.col_labels
    if mirrored and row_labels is not None:
        numbered, numbers = row_labels, row_labels.new_empty(n, dtype=torch.int32)
        row_labels = col_labels = numbers
    if mirrored or columns:
        norms = q.new_empty(row_blocks + col_blocks, dtype=torch.float32)
        _norms_kernel[(row_blocks + col_blocks,)](
            q, k, norms, numbered, numbers, n, m, d, row_blocks, q.stride(), k.stride(),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=32,
        )  # fmt: skip
    wholes = 0 if q.dtype != torch.float32 else 2 if positives == "mask" else 1
    planes = 4 + wholes if sums else 2  # as the kernel has it
    rows = q.new_empty((groups_k, planes, n), dtype=torch.float32)
    cols = q.new_empty((groups_q, planes, m), dtype=torch.float32) if mirrored or columns else rows
    mask, mask_sizes, mask_strides = mask_arguments(problem.positive_mask)
    _lse_kernel[(programs,)](
        q, k, launch.scalar(problem.scale), problem.key_bias,
        row_labels, col_labels, mask, norms, rows, cols,
        n, m, d, problem.offset or 0, q.stride(), k.stride(), *mask_sizes, mask_strides,
        groups_q, groups_k, blocks_q, blocks_k,
        MIRRORED=mirrored, COLUMNS=columns, EXCLUDE=problem.offset is not None, AMONG=problem.among,
        POSITIVES=positives, PRECISION=launch.precision(q), EVEN_D=d % tile.block_d == 0,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, WHOLE=d <= tile.block_d,
        **launch.options(tile),
    )  # fmt: skip

    lse, positive_sum, positive_count = combine_parts(
        rows, problem, cols if mirrored else None, (blocks_k * tile.block_n, blocks_q * tile.block_m)
    )
    lse_cols = combine_parts(cols)[0] if columns else q.new_empty(0, dtype=torch.float64)
    return lse, lse_cols, positive_sum, positive_count


def combine_parts(
    parts: Tensor,  # [slots, 2, 4 or 5, n]
    problem: Contrast | None = None,  # whose positives are asked for, None: no positives
    mirrored: Tensor | None = None,  # as parts, where columns stand for rows too
    group_rows: tuple[int, int] = (1, 1),  # rows that a slot of parts and one of mirrored are of
) -> tuple[Tensor, Tensor, Tensor]:
    """lse, positive_sum, positive_count, float64 [n] ([0] what was not asked for)."""
    slots, planes, n = parts.shape
    mirrored_slots = 0 if mirrored is None else mirrored.shape[0]
    positives = "none" if problem is None else problem.positives
    lse = parts.new_empty(n, dtype=torch.float64)
    positive_sum = parts.new_empty(n if positives != "none" else 0, dtype=torch.float64)
    positive_count = torch.empty_like(positive_sum)
    q = k = index = scale = q_strides = k_strides = None
    m, d, precision = 1, 1, "ieee"
    if problem is not None:
        (m, d), precision = problem.keys.shape, launch.precision(problem.q)
        q, k, index = problem.q, problem.keys, problem.positive_index
        q_strides, k_strides, scale = q.stride(), k.stride(), launch.scalar(problem.scale)
    _lse_combine_kernel[(launch.cdiv(n, 32),)](
        parts, mirrored, q, k, scale, index, lse, positive_sum, positive_count,
        n, m, d, slots, mirrored_slots, *group_rows, q_strides, k_strides,
        MIRRORED=mirrored is not None, POSITIVES=positives, PLANES=planes, PRECISION=precision,
        BLOCK_SLOTS=32, BLOCK_M=32, BLOCK_D=32, num_warps=4,
    )  # fmt: skip
    return lse, positive_sum, positive_count
