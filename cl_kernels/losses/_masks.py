"""SupCon's anchors by mask, where that is more than a sum over positives: weights within the logarithm, a
cap, denominators of the negatives or of each positive by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import autograd, dispatch, dtypes, reference
from ..autograd import ContrastiveStats
from ..distributed import engine, total
from ._common import in_chunks, settled
from ._valid import among_valid, rows_of_all
from ._views import Anchors, guarded_rows, view_major, warn_without_negatives, without

Rows = tuple[Tensor, Tensor]  # losses, and weights of positives


def mask_rows(given: Anchors, mask: Tensor, kept: int | None, summation: str, denominator: str) -> Rows:
    """The loss of each anchor, unscaled, and the weight of its positives: all, or those of its own sample and
    of `kept` others, the heaviest."""
    given = given._replace(rows=given.rows.to(dtypes.accumulate_dtype(given.rows.dtype)))
    by_engine = denominator != "one_positive" and dispatch.restricts_by_mask(given.rows)
    loss, count = (_of_log_sum_exps if by_engine else _of_chunks)(given, mask, kept, summation, denominator)
    if denominator != "only_negatives":
        loss = settled(loss, given.columns, mask)
    return loss, count


def _of_log_sum_exps(
    given: Anchors, mask: Tensor, kept: int | None, summation: str, denominator: str
) -> Rows:
    """From the engine: over the denominator, which leaves out what has a weight in a mask, and over the
    positives or their sum."""
    problem, ranks, valid = given.problem(), given.key_ranks, given.left_out
    weights = mask.to(given.rows.dtype)
    positive = weights if kept is None else _capped(given, weights, kept)
    left_out = weights if denominator == "only_negatives" else None if kept is None else weights - positive
    if left_out is not None:
        if valid is not None:
            left_out = left_out.masked_fill(~rows_of_all(valid, given.ranks), 1.0)
        over = problem._replace(among="different", positive_mask=left_out)
    else:
        over = among_valid(given.valid_rows(given.rows.shape[0]) if valid is not None else None, problem)
    stats = engine.contrastive(over, ranks)
    if denominator == "only_negatives":
        warn_without_negatives(without(given, stats.lse)[:, None])
    if summation == "in":
        inside = engine.contrastive(problem._replace(among="same", positive_mask=positive), ranks)
        return _inside(stats.lse, inside), inside.positive_count
    if left_out is not positive:
        sums = engine.contrastive(problem._replace(positive_mask=positive), ranks)
        stats = sums._replace(lse=stats.lse)
    return guarded_rows(stats), stats.positive_count


def _inside(lse: Tensor, positives: ContrastiveStats) -> Tensor:
    """-log of the mean over positives of e^S, over a denominator's sum: 0 where either is empty."""
    alone = (positives.lse == -torch.inf) & ~lse.isnan()
    alone = alone | ((lse == -torch.inf) & ~positives.positive_sum.isnan())
    loss = positives.positive_count.log() + (lse - positives.lse).masked_fill(alone, 0.0)
    return loss.masked_fill(alone, 0.0)


def _capped(given: Anchors, weights: Tensor, kept: int) -> Tensor:
    """The weights [B, samples] of an anchor's own sample and the `kept` heaviest others, 0 for the rest."""
    before = 0 if given.ranks is None else given.ranks.first

    def chunk(first: int, last: int, weights: Tensor) -> tuple[Tensor]:
        own = torch.arange(before + first, before + last, device=weights.device)
        return (reference.cap_positives(weights[first:last], own, kept),)

    return in_chunks(*weights.shape, chunk, weights)[0]


def _of_chunks(given: Anchors, mask: Tensor, kept: int | None, summation: str, denominator: str) -> Rows:
    """`reference.supcon_rows_of` chunks of the anchors, computed again in the backward: memory stays bounded
    beside the mask."""
    ranks, anchors, batch = given.ranks, given.anchors, given.samples
    keys, valid = _of_all_ranks(given)
    samples, before = total(batch, ranks), 0 if ranks is None else ranks.first
    if denominator == "only_negatives":
        warn_without_negatives(mask != 0)
    themselves = given.keys is None

    def chunk(
        first: int,
        last: int,
        queries: Tensor,
        keys: Tensor,
        scale: float | Tensor,
        mask: Tensor,
        valid: Tensor | None,
    ) -> Rows:
        own = torch.arange(first, last, device=keys.device)
        logits = autograd.similarity(queries[first:last], keys, scale, normalize=False)
        if themselves:
            if ranks is not None:
                own = own // batch * samples + own % batch + before
            pairs = reference.supcon_pairs(
                logits, own, samples, mask=mask, before=before, kept_samples=kept, valid=valid
            )
        else:
            pairs = reference.key_pairs(logits, own % batch, None, None, mask)
        return reference.supcon_rows_of(logits, *pairs, summation=summation, denominator=denominator)

    loss, count = in_chunks(
        anchors, keys.shape[0], chunk, given.rows[:anchors], keys, given.scale, mask, valid
    )
    return loss, count


def _of_all_ranks(given: Anchors) -> tuple[Tensor, Tensor | None]:
    """The keys of every rank, rows view-major over the samples of all, and which samples are valid."""
    keys, valid, ranks = given.rows, given.left_out, given.ranks
    if given.keys is not None:
        return rows_of_all(given.keys.rows.to(keys), given.keys.ranks), None
    if ranks is not None:
        by_sample = keys.reshape(-1, given.samples, keys.shape[1]).transpose(0, 1)
        keys = view_major(rows_of_all(by_sample, ranks))
        valid = None if valid is None else rows_of_all(valid, ranks)
    return keys, valid
