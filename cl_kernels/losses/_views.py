"""Anchors over the view-major rows of multi-view features: what SupCon and SelfCon share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import autograd, dtypes, reference, validation
from ..autograd import ContrastiveStats
from ..distributed import Ranks, engine, total
from ..problem import Contrast
from ._common import (
    cross_entropy,
    inverse,
    log_add_any,
    makes_whole_losses,
    reduced,
    settled,
    warn_of_nothing,
    whole,
    wide,
)
from ._valid import among_valid, of_no_label, of_other_labels, zero_unless

Memory = tuple[Tensor, Tensor]  # keys [K, D] and their labels [K]


class Keys(NamedTuple):
    """Keys of their own, in place of the rows that the anchors are."""

    rows: Tensor  # [M, D]
    labels: Tensor | None  # [M], None with a mask
    ranks: Ranks | None  # among whose rows these are


class Anchors(NamedTuple):
    """The first so many `anchors` of the rows [V*B, D], view-major, and what they are contrasted with: all
    rows, or `keys`; and a memory, which is the same on all ranks."""

    rows: Tensor
    anchors: int
    samples: int  # B
    scale: float | Tensor
    labels: Tensor | None = None  # [B]
    mask: Tensor | None = None  # [B, B], over ranks a column for each sample of all; [B, M] with keys
    ranks: Ranks | None = None
    memory: Memory | None = None
    keys: Keys | None = None
    valid: Tensor | None = None  # [B]; the other rows are 0

    def problem(self) -> Contrast:
        """The anchors against the keys, or all rows but themselves; as keys, None keeps the symmetry of the
        whole."""
        own = self.rows if self.anchors == self.rows.shape[0] else self.rows[: self.anchors]
        if self.keys is not None:
            return Contrast(own, self.keys.rows, self.scale)
        return Contrast(own, None if own is self.rows else self.rows, self.scale, exclude=0)

    def repeated(self, x: Tensor, rows: int) -> Tensor:
        """`x` [B, ...] for each of so many view-major rows."""
        views = rows // self.samples
        return torch.cat([x] * views) if views > 1 else x

    def valid_rows(self, rows: int) -> Tensor | None:
        return None if self.valid is None else self.repeated(self.valid, rows)

    @property
    def left_out(self) -> Tensor | None:
        """`valid` where the rows are the keys: those that are not valid are in no denominator."""
        return self.valid if self.keys is None else None

    @property
    def key_ranks(self) -> Ranks | None:
        return self.ranks if self.keys is None else self.keys.ranks

    @property
    def columns(self) -> int:
        """How many rows an anchor is contrasted with, those that are not valid among them."""
        stored = 0 if self.memory is None else self.memory[0].shape[0]
        if self.keys is not None:
            return total(self.keys.rows.shape[0], self.keys.ranks) + stored
        return total(self.rows.shape[0], self.ranks) - 1 + stored


def view_major(features: Tensor) -> Tensor:
    """[B, V, D] -> [V*B, D]: row v*B + b is view v of sample b."""
    return features.transpose(0, 1).flatten(0, 1)


def with_positives(given: Anchors, among: str = "all") -> Contrast:
    """The problem with its positives by label or by sample: row r belongs to sample r % B, and its positives
    are the keys, or the other rows, of its label (None: of its sample)."""
    problem, batch, ranks = given.problem(), given.samples, given.ranks
    n, labels = given.rows.shape[0], given.labels
    if labels is None and n == 2 * batch and among == "all":
        partner = torch.arange(n, device=given.rows.device).roll(batch)
        problem = problem._replace(positive_index=partner[: given.anchors])
        return among_valid(given.valid_rows(n), problem)
    before = 0 if ranks is None else ranks.first
    if labels is None:
        labels = torch.arange(before, before + batch, device=given.rows.device)
    ids = validation.label_ids(given.repeated(labels, n), before=before * (n // batch))
    if given.keys is not None and given.keys.labels is not None:
        columns = validation.label_ids(given.keys.labels, columns=True)
    else:
        columns = ids = of_no_label(ids, given.valid_rows(n), ranks)
    own = ids if given.anchors == n else ids[: given.anchors]
    return problem._replace(row_labels=own, col_labels=columns, among=among, label_positives=True)


def with_mask(given: Anchors, mask: Tensor) -> Contrast:
    """The problem with its positives by their weights."""
    weights = mask.to(dtypes.accumulate_dtype(given.rows.dtype))
    problem = given.problem()._replace(positive_mask=weights)
    if given.left_out is None:
        return problem
    return among_valid(given.valid_rows(given.rows.shape[0]), problem)


def statistics(given: Anchors, problem: Contrast) -> ContrastiveStats:
    """Those of a problem of anchors, over the rows of all ranks and over the memory."""
    stats = _of_valid_keys(given, problem)
    if given.memory is None:
        return stats
    keys, labels = given.memory
    beside = autograd.contrastive(
        problem._replace(k=keys, exclude=None, col_labels=validation.label_ids(labels, columns=True))
    )
    return stats._replace(
        lse=log_add_any(stats.lse, beside.lse),
        positive_sum=stats.positive_sum + beside.positive_sum,
        positive_count=stats.positive_count + beside.positive_count,
    )


def _of_valid_keys(given: Anchors, problem: Contrast) -> ContrastiveStats:
    """The statistics without what is not valid: no label is that of such a key, so that it is nobody's
    positive. Positives and negatives are taken apart, as a bias does not go with positives."""
    ranks = given.key_ranks
    if given.left_out is None or problem.row_labels is None or problem.positives in ("index", "mask"):
        return engine.contrastive(problem, ranks)
    by_label = problem.positives == "labels"
    same = engine.contrastive(problem._replace(among="same"), ranks) if by_label else None
    if same is not None and problem.among == "same":
        return same
    others = of_other_labels(problem, given.repeated(given.left_out, given.rows.shape[0]), ranks)
    if same is None:
        return others
    lse = others.lse if problem.among == "different" else log_add_any(same.lse, others.lse)
    return same._replace(lse=lse)


def outside_rows(given: Anchors, among: str = "all") -> tuple[Tensor, Tensor | None]:
    """The "out" loss of each anchor, unscaled, and the weight of its positives (None: all have some)."""
    mask, labels = given.mask, given.labels
    problem = with_positives(given, among) if mask is None else with_mask(given, mask)
    stats = statistics(given, problem)
    if problem.positive_index is not None:
        return cross_entropy(stats.lse, stats.positive_sum, given.columns), None
    by_value = labels is not None and labels.is_floating_point()  # a NaN has no positives in other views
    other_views = given.keys is None and given.rows.shape[0] > given.samples
    if mask is None and among == "all" and other_views and not by_value and given.valid is None:
        loss = torch.addcdiv(stats.lse, stats.positive_sum, stats.positive_count, value=-1)
        return settled(loss, given.columns), None
    loss = guarded_rows(stats)
    if among == "different":
        warn_without_negatives(without(given, stats.lse)[:, None])
    else:
        loss = settled(loss, given.columns, mask)
    return loss, stats.positive_count


def outside_loss(
    given: Anchors,
    among: str,
    temperature: float | Tensor,
    base_temperature: float | Tensor,
    no_positive: str,
    reduction: str,
) -> Tensor:
    """The reduced "out" loss."""
    mask = given.mask
    absent = all(x is None for x in (given.valid, given.ranks, given.key_ranks, given.memory))
    simple = absent and makes_whole_losses(given.rows, reduction, by_rows=True)
    if simple and among == "all" and (mask is None or mask.dtype in (torch.bool, torch.uint8)):
        problem = with_positives(given) if mask is None else with_mask(given, mask)
        drop = no_positive == "drop" and problem.positive_index is None
        factor = _ratio(temperature, base_temperature, given.rows)
        loss = whole(problem, reduction, given.columns, factor, drop)
        if loss is not None:
            return loss
    rows, count = outside_rows(given, among)
    return reduce_anchors(given, rows, count, temperature, base_temperature, no_positive, reduction)


def loss_of_samples(
    features: Tensor,  # [B, V, D]
    labels: Tensor | None,  # [B]
    temperature: float | Tensor,
    base_temperature: float | Tensor,
    no_positive: str,
    reduction: str,
) -> Tensor | None:
    """The reduced "out" loss of all rows as they lie, the views of a sample together: a mean does not mind
    the order of rows, and contiguous features are not copied. None where there is no op for a whole loss."""
    if not makes_whole_losses(features, reduction, by_rows=True):
        return None
    batch, views, _ = features.shape
    n = batch * views
    problem = Contrast(features.flatten(0, 1), None, inverse(temperature, features), exclude=0)
    if labels is None and views == 2:
        problem = problem._replace(positive_index=torch.arange(n, device=features.device) ^ 1)
    else:
        if labels is None:
            labels = torch.arange(batch, device=features.device)
        ids = validation.label_ids(labels[:, None].expand(batch, views).reshape(n))
        problem = problem._replace(row_labels=ids, col_labels=ids, label_positives=True)
    drop = no_positive == "drop" and problem.positive_index is None
    return whole(problem, reduction, n - 1, _ratio(temperature, base_temperature, features), drop)


def _ratio(temperature: float | Tensor, base_temperature: float | Tensor, like: Tensor) -> float | Tensor:
    return wide(temperature, like) / wide(base_temperature, like)


def without(given: Anchors, lse: Tensor) -> Tensor:
    """Which valid anchors have nothing to sum, by their log-sum-exps."""
    valid = given.valid_rows(given.anchors)
    return lse == -torch.inf if valid is None else (lse == -torch.inf) & valid


def warn_without_negatives(left_out: Tensor) -> None:
    """Warn where nothing is left of an anchor's denominator [A, columns]."""
    if validation.readable(left_out) and bool(left_out.all(1).any()):
        warn_of_nothing('denominator="only_negatives" leaves out all rows, which are its positives')


def guarded_rows(stats: ContrastiveStats) -> Tensor:
    """As above where anchors may lack positives or a denominator: 0 for those, in value and gradient."""
    count = stats.positive_count
    divisor = count.masked_fill(count < reference.EMPTY_COUNT, 1.0)
    loss = torch.addcdiv(stats.lse * (count / divisor), stats.positive_sum, divisor, value=-1)
    return loss.masked_fill((stats.lse == -torch.inf) & ~stats.positive_sum.isnan(), 0.0)


def reduce_anchors(
    given: Anchors,
    loss: Tensor,
    count: Tensor | None,
    temperature: float | Tensor,
    base_temperature: float | Tensor,
    no_positive: str,
    reduction: str,
) -> Tensor:
    """The reduced loss times temperature / base_temperature; `count` None: every anchor has positives."""
    like, ranks = given.rows, given.ranks
    dtype = dtypes.accumulate_dtype(like.dtype)
    weight = valid = given.valid_rows(given.anchors)
    loss = zero_unless(valid, loss)
    if count is not None and no_positive == "drop":
        weight = count > 0 if valid is None else (count > 0) & valid
    ratio = _ratio(temperature, base_temperature, loss)
    compiling = torch.compiler.is_compiling()  # a comparison would make another graph
    if not (compiling or isinstance(ratio, Tensor)) and ratio == 1.0:
        return reduced(loss, reduction, like, weight, ranks)
    if reduction == "mean" and weight is None and ranks is None:
        return (loss.sum() * (ratio / loss.shape[0])).to(dtype)
    return (reduced(loss, reduction, loss, weight, ranks) * ratio).to(dtype)
