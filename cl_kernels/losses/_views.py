"""Anchors over the view-major rows of multi-view features: what SupCon and SelfCon share."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import autograd, dtypes, validation
from ..autograd import ContrastiveStats
from ..distributed import Ranks, engine, total
from ..problem import Contrast
from ._common import cross_entropy, log_add, reduced, settled, warn_of_nothing, wide

Memory = tuple[Tensor, Tensor]  # keys [K, D] and their labels [K]
EMPTY_COUNT = 1e-6


def view_major(features: Tensor) -> Tensor:
    """[B, V, D] -> [V*B, D]: row v*B + b is view v of sample b."""
    return features.transpose(0, 1).flatten(0, 1)


def anchor_rows(rows: Tensor, anchors: int, scale: float | Tensor) -> Contrast:
    """The first `anchors` rows against all but themselves; as keys, None keeps the symmetry of the whole."""
    if anchors == rows.shape[0]:
        return Contrast(rows, None, scale, exclude=0)
    return Contrast(rows[:anchors], rows, scale, exclude=0)


def with_samples(
    problem: Contrast, batch: int, labels: Tensor | None, among: str = "all", ranks: Ranks | None = None
) -> Contrast:
    """The same with positives: row r belongs to sample r % batch, and its positives are the other rows of its
    label (None: of its sample)."""
    before = 0 if ranks is None else ranks.first
    n, anchors = problem.keys.shape[0], problem.q.shape[0]
    if labels is None and n == 2 * batch and among == "all":
        partner = torch.arange(n, device=problem.q.device).roll(batch)
        return problem._replace(positive_index=partner[:anchors])
    if labels is None:
        labels = torch.arange(before, before + batch, device=problem.q.device)
    views = n // batch
    columns = validation.label_ids(
        torch.cat([labels] * views) if views > 1 else labels, before=before * views
    )
    own = columns if anchors == n else columns[:anchors]
    return problem._replace(row_labels=own, col_labels=columns, among=among, label_positives=True)


def statistics(problem: Contrast, ranks: Ranks | None, memory: Memory | None) -> ContrastiveStats:
    """Those of anchors with positives by label or among some labels, over the rows of all ranks and over a
    memory, which is the same on each."""
    stats = engine.contrastive(problem, ranks)
    if memory is None:
        return stats
    keys, labels = memory
    beside = autograd.contrastive(
        problem._replace(k=keys, exclude=None, col_labels=validation.label_ids(labels, columns=True))
    )
    return stats._replace(
        lse=log_add_any(stats.lse, beside.lse),
        positive_sum=stats.positive_sum + beside.positive_sum,
        positive_count=stats.positive_count + beside.positive_count,
    )


def other_columns(problem: Contrast, ranks: Ranks | None, memory: Memory | None) -> int:
    """How many rows there are beside an anchor."""
    return total(problem.keys.shape[0], ranks) - 1 + (0 if memory is None else memory[0].shape[0])


def log_add_any(x: Tensor, y: Tensor) -> Tensor:
    """`log_add`, also where one or both are -inf."""
    no_x, no_y = x == -torch.inf, y == -torch.inf
    both = log_add(x.masked_fill(no_x, 0.0), y.masked_fill(no_y, 0.0))
    return torch.where(no_x, y, torch.where(no_y, x, both))


def outside_rows(
    problem: Contrast,
    batch: int,
    labels: Tensor | None,
    mask: Tensor | None,
    among: str = "all",
    ranks: Ranks | None = None,
    memory: Memory | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The "out" loss of each anchor, unscaled, and the weight of its positives (None: all have some)."""
    n = problem.keys.shape[0]
    others = other_columns(problem, ranks, memory)
    if mask is None:
        problem = with_samples(problem, batch, labels, among, ranks)
    else:
        weights = mask.to(dtypes.accumulate_dtype(problem.q.dtype))
        problem = problem._replace(positive_mask=weights)
    stats = statistics(problem, ranks, memory)
    if problem.positive_index is not None:
        return cross_entropy(stats.lse, stats.positive_sum, others), None
    by_value = labels is not None and labels.is_floating_point()  # a NaN has no positives in other views
    if mask is None and among == "all" and n > batch and not by_value:
        loss = torch.addcdiv(stats.lse, stats.positive_sum, stats.positive_count, value=-1)
        return settled(loss, others), None
    loss = _guarded_rows(stats)
    if among == "different":
        warn_without_negatives((stats.lse == -torch.inf)[:, None])
    else:
        loss = settled(loss, others, mask)
    return loss, stats.positive_count


def warn_without_negatives(left_out: Tensor) -> None:
    """Warn where nothing is left of an anchor's denominator [A, columns]."""
    if validation.readable(left_out) and bool(left_out.all(1).any()):
        warn_of_nothing('denominator="only_negatives" leaves out all rows, which are its positives')


def _guarded_rows(stats: ContrastiveStats) -> Tensor:
    """As above where anchors may lack positives or a denominator: 0 for those, in value and gradient."""
    count = stats.positive_count
    divisor = count.masked_fill(count < EMPTY_COUNT, 1.0)
    loss = torch.addcdiv(stats.lse * (count / divisor), stats.positive_sum, divisor, value=-1)
    return loss.masked_fill((stats.lse == -torch.inf) & ~stats.positive_sum.isnan(), 0.0)


def reduce_anchors(
    loss: Tensor,
    count: Tensor | None,
    temperature: float | Tensor,
    base_temperature: float | Tensor,
    no_positive: str,
    reduction: str,
    like: Tensor,
    ranks: Ranks | None = None,
) -> Tensor:
    """The reduced loss times temperature / base_temperature; `count` None: every anchor has positives."""
    dtype = dtypes.accumulate_dtype(like.dtype)
    weight = count > 0 if count is not None and no_positive == "drop" else None
    ratio = wide(temperature, loss) / wide(base_temperature, loss)
    compiling = torch.compiler.is_compiling()  # a comparison would make another graph
    if not (compiling or isinstance(ratio, Tensor)) and ratio == 1.0:
        return reduced(loss, reduction, like, weight, ranks)
    if reduction == "mean" and weight is None and ranks is None:
        return (loss.sum() * (ratio / loss.shape[0])).to(dtype)
    return (reduced(loss, reduction, loss, weight, ranks) * ratio).to(dtype)
