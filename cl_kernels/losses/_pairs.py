"""Positive pairs by label: what is to be known of each, from logits of blocks that hold them and no others.

Sorted by label the pairs of a class are a block of the matrix. Small classes share one, large ones are walked
in pieces of rows; where the pieces are many each is computed again in the backward, so that memory stays
bounded whatever the sizes of the classes. What a pair is held against comes from the engine, as one
log-sum-exp a row over its negatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import autograd, dtypes, validation
from ..distributed import engine
from ..problem import Contrast
from ._common import CHUNK_LOGITS, at_least_zero, in_chunks, log_add_any, warn_if_alone
from ._valid import of_other_labels, rows_of_all
from ._views import Anchors, warn_without_negatives, with_positives, without

Block = Callable[[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]]
"""A function of logits [R, C], which of them are pairs, bool [R, C], vectors [R] and vectors [C]."""


class Sizes(NamedTuple):
    """How much is worked on at a time: of small classes as many as make a block, of large pieces of rows."""

    rows: int
    columns: int
    chunk: int  # logits


SIZES = {"cpu": Sizes(128, 1024, 2**20), "other": Sizes(2048, 8192, 2**24)}


def sizes_on(device: torch.device) -> Sizes:
    return SIZES["cpu" if device.type == "cpu" else "other"]


class Plan(NamedTuple):
    """Blocks of rows and columns, sorted by label, that hold all positive pairs."""

    row_order: Tensor  # int64 [N]
    column_order: Tensor  # int64 [M]
    blocks: list[tuple[int, int, int, int]]  # first row, first column, and those after the last
    pairs: int  # in all, also those that are left out
    most: int  # of a row, likewise

    @staticmethod
    def of(problem: Contrast) -> Plan:
        """Blocks made of small classes; the sizes of the classes are waited for."""
        rows, columns = problem.row_labels, problem.col_labels
        assert rows is not None and columns is not None
        sizes = sizes_on(rows.device)
        sorted_rows, row_order = rows.sort(stable=True)
        sorted_columns, column_order = sorted_rows, row_order
        if columns is not rows:
            sorted_columns, column_order = columns.sort(stable=True)
        labels, counts = torch.unique_consecutive(sorted_rows, return_counts=True)
        firsts = torch.searchsorted(sorted_columns, labels)
        lasts = torch.searchsorted(sorted_columns, labels, right=True)
        blocks: list[tuple[int, int, int, int]] = []
        row, pairs, most = 0, 0, 0
        for count, first, last in torch.stack([counts, firsts, lasts], 1).tolist():
            if last > first:
                pairs, most = pairs + count * (last - first), max(most, last - first)
                start = blocks[-1] if blocks else None
                if start is None or row + count - start[0] > sizes.rows or last - start[1] > sizes.columns:
                    blocks.append((row, first, row + count, last))
                else:
                    blocks[-1] = (start[0], start[1], row + count, last)
            row += count
        return Plan(row_order, column_order, blocks, pairs, most)


class _Sides(NamedTuple):
    """Features, labels, numbers and whatever else there is of each row, and of each column."""

    rows: list[Tensor]
    columns: list[Tensor]

    @staticmethod
    def of(problem: Contrast, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> _Sides:
        assert problem.row_labels is not None and problem.col_labels is not None
        q, k = (x.to(dtypes.accumulate_dtype(x.dtype)) for x in (problem.q, problem.keys))
        row_ids, column_ids = (torch.arange(x.shape[0], device=x.device) for x in (q, k))
        return _Sides([q, problem.row_labels, row_ids, *rows], [k, problem.col_labels, column_ids, *columns])


def in_blocks(
    problem: Contrast, plan: Plan, block: Block, rows: Sequence[Tensor], columns: Sequence[Tensor]
) -> list[tuple[Tensor, ...]]:
    """`block` of parts of the plan's blocks, computed again in the backward where these are many.

    The vectors that it gets are the parts' numbers of rows and `rows` [N], numbers of columns and
    `columns` [M].
    """
    sides, chunk = _Sides.of(problem, rows, columns), sizes_on(problem.q.device).chunk
    parts = [
        (first, min(first + step, last), i)
        for i, (row, column, last, last_column) in enumerate(plan.blocks)
        for step in [max(1, chunk // (last_column - column))]
        for first in range(row, last, step)
    ]
    row_spans = [part[:2] for part in parts]
    column_spans = [(column, last) for _, column, _, last in plan.blocks]
    of_rows = [_cut(x[plan.row_order], row_spans) for x in sides.rows]
    of_columns = [_cut(x[plan.column_order], column_spans) for x in sides.columns]
    cells = sum((last - first) * (plan.blocks[i][3] - plan.blocks[i][1]) for first, last, i in parts)
    some = partial(_some_pairs, block, problem.exclude, len(of_rows))
    work = partial(autograd.recomputed, some) if cells > chunk else some
    return [
        work(problem.scale, *(x[j] for x in of_rows), *(x[i] for x in of_columns))
        for j, (_, _, i) in enumerate(parts)
    ]


def _cut(x: Tensor, spans: Sequence[tuple[int, int]]) -> list[Tensor]:
    """x[first:last] for ascending spans, by one split: slices would each have a gradient as long as x."""
    sizes, end = [], 0
    for first, last in spans:
        sizes += [first - end, last - first]
        end = last
    return list(x.split([*sizes, len(x) - end])[1::2])


def _some_pairs(
    block: Block, exclude: int | None, taken: int, scale: float | Tensor, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """`block` of some rows, the first `taken` tensors, and columns."""
    q, row_labels, row_ids, *rows = tensors[:taken]
    k, column_labels, column_ids, *columns = tensors[taken:]
    logits = autograd.similarity(q, k, scale, normalize=False)
    pairs = row_labels[:, None] == column_labels
    if exclude is not None:
        pairs = pairs & (row_ids[:, None] + exclude != column_ids)
    return block(logits, pairs, [row_ids, *rows], [column_ids, *columns])


def rows_in_blocks(
    problem: Contrast,
    block: Block,
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    without_pairs: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Vectors [N] of the rows, of which `block` makes parts [R]; `without_pairs` [N] is what stands for rows
    that are in no block.

    Where the sizes of the classes cannot be known, all columns are one block."""
    if not _sizes_known(problem):
        return _in_one_block(problem, block, rows, columns)
    plan = Plan.of(problem)
    if not plan.blocks:
        return tuple(without_pairs)
    spans = [(row, last) for row, _, last, _ in plan.blocks]
    places = torch.cat(_cut(plan.row_order, spans))
    parts = in_blocks(problem, plan, block, rows, columns)
    return tuple(
        absent.to(found[0].dtype).index_copy(0, places, torch.cat(found))
        for absent, found in zip(without_pairs, zip(*parts, strict=True), strict=True)
    )


def _sizes_known(problem: Contrast) -> bool:
    """Whether the labels can be looked at, and it pays: a GPU is waited for where there are many logits."""
    labels = [x for x in (problem.row_labels, problem.col_labels) if x is not None]
    if all(map(validation.readable, labels)):
        return True
    many = problem.q.shape[0] * problem.keys.shape[0] > CHUNK_LOGITS["other"]
    waits = many and problem.q.is_cuda and all(map(validation.eager, labels))
    return waits and not torch.cuda.is_current_stream_capturing()


def _in_one_block(
    problem: Contrast, block: Block, rows: Sequence[Tensor], columns: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    sides = _Sides.of(problem, rows, columns)
    taken, exclude = len(sides.rows), problem.exclude

    def chunk(first: int, last: int, scale: float | Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        some = (x[first:last] for x in tensors[:taken])
        return _some_pairs(block, exclude, taken, scale, *some, *tensors[taken:])

    sizes = (problem.q.shape[0], problem.keys.shape[0])
    return in_chunks(*sizes, chunk, problem.scale, *sides.rows, *sides.columns)


def pair_rows(given: Anchors, kept: int | None, summation: str, denominator: str) -> tuple[Tensor, Tensor]:
    """The loss of each anchor by class labels, unscaled, and the number of its positives.

    For what is particular to a pair: a denominator of its own ("one_positive"), or a cap, which keeps the
    other views of the anchor's sample and those of `kept` other samples, the first by index.
    """
    local = with_positives(given, "different")._replace(label_positives=False)
    others = engine.with_all_keys(local, given.key_ranks)
    valid = given.left_out
    if valid is not None:
        valid = rows_of_all(given.repeated(valid, given.rows.shape[0]), given.ranks)
    rows, columns = ([], []) if kept is None else _places(given, local)
    if others.q.shape[0] == 0:  # after all that ranks tell each other
        nothing = engine.no_rows(others).lse
        return nothing, nothing.detach()
    negatives = _negatives(given, others, valid)
    if denominator == "only_negatives":
        warn_without_negatives(without(given, negatives)[:, None])
    else:
        warn_if_alone(given.columns)
    alone = negatives.masked_fill(negatives == -torch.inf, 0.0) * 0.0
    loss, count = rows_in_blocks(
        _with_memory(given, others), partial(_losses, kept, summation, denominator), [negatives, *rows],
        columns, [alone, torch.zeros_like(negatives)],
    )  # fmt: skip
    return (loss if denominator == "only_negatives" else at_least_zero(loss)), count


def _negatives(given: Anchors, others: Contrast, valid: Tensor | None) -> Tensor:
    """The log-sum-exps [A] over the keys of other labels, those of the memory among them; `valid` [M] are the
    rows of all ranks that count."""
    lse = (autograd.contrastive(others) if valid is None else of_other_labels(others, valid, None)).lse
    if given.memory is None:
        return lse
    keys, labels = given.memory
    stored = others._replace(k=keys, exclude=None, col_labels=validation.label_ids(labels, columns=True))
    return log_add_any(lse, autograd.contrastive(stored).lse)


def _with_memory(given: Anchors, problem: Contrast) -> Contrast:
    """The problem with the rows of the memory as further columns."""
    if given.memory is None or problem.col_labels is None:
        return problem
    keys, labels = given.memory
    columns = torch.cat([problem.col_labels, validation.label_ids(labels, columns=True)])
    return problem._replace(k=torch.cat([problem.keys, keys]), col_labels=columns)


def _places(given: Anchors, problem: Contrast) -> tuple[list[Tensor], list[Tensor]]:
    """The sample of each anchor and its place among those of its label; then of the rows of all ranks."""
    assert problem.col_labels is not None
    ranks = given.ranks
    before = 0 if ranks is None else ranks.first
    samples = torch.arange(before, before + given.samples, device=given.rows.device)
    samples = given.repeated(samples, given.rows.shape[0])
    labels, order = rows_of_all(problem.col_labels[: given.samples], ranks).sort(stable=True)
    own = torch.arange(order.shape[0], device=order.device)
    places = torch.zeros_like(order).scatter(0, order, own - torch.searchsorted(labels, labels))
    rows, columns = samples[: given.anchors], rows_of_all(samples, ranks)
    return [rows, places[rows]], [columns, places[columns]]


def _losses(
    kept: int | None,
    summation: str,
    denominator: str,
    logits: Tensor,
    pairs: Tensor,
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Losses [R] and numbers of positives [R], as `reference.supcon_rows_of`, from the log-sum-exps over
    negatives; 0 without positives or without a denominator, but for what is NaN."""
    _, negatives, *places = rows
    if kept is not None:
        pairs = pairs & _first(kept, places, columns[1:])
    count = pairs.sum(1).to(logits.dtype)
    negatives = negatives.to(logits.dtype)
    empty = negatives == -torch.inf
    finite = negatives.masked_fill(empty, 0.0)
    if denominator == "one_positive":
        log_ratio = F.logsigmoid(logits - negatives[:, None])
    elif denominator == "only_negatives":
        log_ratio = logits - finite[:, None]
    else:
        whole = log_add_any(_log_sum_exp(logits, pairs), negatives)
        log_ratio = logits - whole.masked_fill(whole == -torch.inf, 0.0)[:, None]
    if summation == "out":
        loss = -log_ratio.masked_fill(~pairs, 0.0).sum(1) / count.clamp(min=1.0)
    else:
        loss = count.log() - _log_sum_exp(log_ratio, pairs)
    if denominator == "only_negatives":
        loss = loss.masked_fill(empty & ~loss.isnan(), 0.0)
    return torch.where(count == 0, finite * 0.0, loss), count


def _log_sum_exp(x: Tensor, pairs: Tensor) -> Tensor:
    """LSEs of the pairs of each row; -inf, with gradient 0, where there are none."""
    none = ~pairs.any(1)
    x = x.masked_fill(~pairs, -torch.inf).masked_fill(none[:, None], 0.0)
    return x.logsumexp(1).masked_fill(none, -torch.inf)


def _first(kept: int, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """Which columns are of a row's own sample, or of the first `kept` others of its label."""
    (row_samples, row_places), (column_samples, column_places) = rows, columns
    before = column_places - (row_places[:, None] < column_places).to(column_places.dtype)
    return (row_samples[:, None] == column_samples) | (before < kept)
