"""The engine over the rows of all ranks: columns stand in the order of the ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .. import autograd, dtypes
from ..autograd import ContrastiveStats, SoftTargetStats
from ..problem import Contrast, SoftTarget
from . import ring
from .collectives import all_to_all, gather
from .ranks import Ranks, mask_columns, total


def mean(loss: Tensor, ranks: Ranks, weight: Tensor | None = None) -> Tensor:
    """W / N times the sum of this rank's losses: its mean over the W ranks is the mean of all N losses.

    `weight` [n] (bool or 0/1) marks the losses that count."""
    if weight is None:
        return loss.sum() * (ranks.world / total(loss.shape[0], ranks))
    count = weight.sum()
    dist.all_reduce(count, group=ranks.group)
    return (loss * weight).sum() * ranks.world / count.clamp(min=1)


def contrastive(
    problem: Contrast, ranks: Ranks | None, first_positive: int | None = None
) -> ContrastiveStats:
    """`autograd.contrastive` with the keys of every rank, and their labels and biases, beside this one's, to
    which indices and offsets refer. A bias gets no gradient.

    A mask of positives is [R, samples of all ranks]. With both axes the columns are this rank's own keys,
    over the rows of all.
    """
    if ranks is None:
        return autograd.contrastive(problem, first_positive)
    if ranks.exchange == "ring":
        return ring.contrastive(problem, ranks)
    sizes = ranks.rows(problem.keys.shape[0])
    first = sum(sizes[: ranks.rank])
    everyone = with_all_keys(problem, ranks)
    if problem.q.shape[0] == 0:
        return no_rows(everyone)
    stats = autograd.contrastive(everyone, None if first_positive is None else first_positive + first)
    if not problem.both_axes:
        return stats
    own = problem.keys.shape[0]
    parts = all_to_all(stats.lse_cols, sizes, (own,) * ranks.world, ranks.group)
    return stats._replace(lse_cols=parts.view(ranks.world, own).logsumexp(0))


def with_all_keys(problem: Contrast, ranks: Ranks | None) -> Contrast:
    """The problem whose keys, labels, biases and mask are those of all ranks: `contrastive` of one process
    then is that over the ranks."""
    if ranks is None:
        return problem
    sizes = ranks.rows(problem.keys.shape[0])
    first = sum(sizes[: ranks.rank])
    index, labels, mask = problem.positive_index, problem.col_labels, problem.positive_mask
    bias = problem.key_bias
    return problem._replace(
        k=gather(problem.keys, sizes, ranks.group),
        exclude=None if problem.exclude is None else problem.exclude + first,
        col_labels=None if labels is None else gather(labels, sizes, ranks.group),
        positive_index=None if index is None else index + first,
        positive_mask=None if mask is None else _spread(mask, ranks, sizes),
        key_bias=None if bias is None else gather(bias, sizes, ranks.group),
    )


def soft_target(
    problem: SoftTarget, ranks: Ranks | None, first_positive: int | None = None
) -> SoftTargetStats:
    """`autograd.soft_target` whose first segment is followed by that of the other ranks; the rest of the keys
    is the same everywhere."""
    if ranks is None:
        return autograd.soft_target(problem, first_positive)
    if ranks.exchange == "ring":
        return ring.soft_target(problem, ranks)
    problem, first = _with_gathered_keys(problem, ranks)
    return autograd.soft_target(problem, None if first_positive is None else first_positive + first)


def soft_target_means(problem: SoftTarget, ranks: Ranks | None) -> tuple[Tensor, Tensor]:
    """`autograd.soft_target_means`, likewise."""
    if ranks is None:
        return autograd.soft_target_means(problem)
    if ranks.exchange == "ring":
        return ring.soft_target_means(problem, ranks)
    return autograd.soft_target_means(_with_gathered_keys(problem, ranks)[0])


def _with_gathered_keys(problem: SoftTarget, ranks: Ranks) -> tuple[SoftTarget, int]:
    """The problem over the keys of all ranks, and where this one's begin."""
    sizes = ranks.rows(problem.k[0].shape[0])
    first = sum(sizes[: ranks.rank])
    k = gather(problem.k[0], sizes, ranks.group)
    same = problem.same_keys(0)
    target_k = k if same else gather(problem.target_k[0], sizes, ranks.group)
    positive = None if problem.positive is None else problem.positive + first
    k_all, target_all = [k, *problem.k[1:]], [target_k, *problem.target_k[1:]]
    return problem._replace(k=k_all, target_k=target_all, positive=positive), first


def _spread(mask: Tensor, ranks: Ranks, rows: Sequence[int]) -> Tensor:
    """A mask [R, samples] with a column for each row of every rank."""
    return torch.cat([mask_columns(mask, ranks, i, slice(0, n)) for i, n in enumerate(rows)], 1)


def no_rows(problem: Contrast) -> ContrastiveStats:
    """The statistics of no rows, in the graph of the keys and the scale: all ranks sum the gradients of
    keys."""
    nothing = problem.keys.flatten()[:0].to(dtypes.statistics_dtype(problem.q))
    nothing = nothing * dtypes.scalar_tensor(problem.scale, nothing.dtype, nothing.device)
    return ContrastiveStats(nothing, nothing, nothing, nothing)
