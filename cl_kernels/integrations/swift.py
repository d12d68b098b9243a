"""The InfoNCE loss of ms-swift's embedding training, fused; the module is usable without ms-swift."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import autograd, dtypes
from ..distributed import gather_rows
from ..losses._common import in_chunks, log_add, own_similarity
from ..problem import Contrast
from ._dtypes import cross_entropy_dtype
from ._formulas import with_others
from ._swap import Unfused, fused

_TRUE, _FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")


class InfonceLoss:
    r"""ms-swift's loss of that name, without its matrices.

    The rows of `last_hidden_state` are groups of an anchor q, its positive d and any number of negatives;
    `labels` has a 1 for each positive and a 0 for each negative. With all documents of the batch as keys and
    logits :math:`q_i \cdot d_j / \tau` the loss is the mean cross-entropy of the positives, where

    - INFONCE_USE_BATCH=false leaves a group its own documents alone,
    - INFONCE_HARD_NEGATIVES takes so many negatives of each group, drawn again where there are fewer,
    - INFONCE_INCLUDE_QQ and INFONCE_INCLUDE_DD add to row i's denominator the other anchors and, seen from
      its positive, all documents but the positive,
    - INFONCE_MASK_FAKE_NEGATIVE leaves out documents and anchors that are more similar to the anchor than
      its positive is by INFONCE_FAKE_NEG_MARGIN: rows are then walked in chunks.

    Over several processes the keys and anchors are those of all, as far as torch.distributed alone is
    concerned: not with Megatron or sequence parallelism.
    """

    def __init__(self, args: Any, trainer: Any) -> None:
        self.args = args
        self.trainer = trainer
        self.is_megatron = "BaseMegatronTrainer" in [kind.__name__ for kind in type(trainer).__mro__]

    @fused("swift.loss.embedding:InfonceLoss.__call__")
    def __call__(self, outputs: dict[str, Tensor], labels: Tensor, **kwargs: Any) -> Tensor:
        options = _Options.of_environment()
        sentences = outputs["last_hidden_state"]
        if self.is_megatron:
            raise Unfused("the trainer is Megatron's")
        if sentences.dim() != 2:
            raise Unfused("last_hidden_state is not a matrix")
        world = _world_size() if options.use_batch else 1
        if world > 1:
            sentences, labels = _of_all(sentences, labels)
        loss = _mean_loss(sentences, labels, options)
        return loss.detach() + world * (loss - loss.detach()) if world > 1 else loss


class _Options(NamedTuple):
    """ms-swift's environment variables."""

    temperature: float
    use_batch: bool
    hard_negatives: int | None
    mask_fake_negative: bool
    fake_neg_margin: float
    include_qq: bool
    include_dd: bool

    @classmethod
    def of_environment(cls) -> _Options:
        def read(name: str, default: str, kind: Callable[[str], Any]) -> Any:
            return kind(os.environ.get(f"INFONCE_{name}", default))

        found = cls(
            read("TEMPERATURE", "0.1", float),
            read("USE_BATCH", "True", _flag),
            read("HARD_NEGATIVES", "", lambda text: int(text) if text else None),
            read("MASK_FAKE_NEGATIVE", "False", _flag),
            read("FAKE_NEG_MARGIN", "0.1", float),
            read("INCLUDE_QQ", "False", _flag),
            read("INCLUDE_DD", "False", _flag),
        )
        if not found.temperature > 0:
            raise Unfused("INFONCE_TEMPERATURE is not positive")
        if found.mask_fake_negative and not found.fake_neg_margin >= 0:
            raise Unfused("INFONCE_FAKE_NEG_MARGIN is negative, and masks positives")
        return found


class _Groups(NamedTuple):
    """Anchors and their documents."""

    queries: Tensor  # [B, D]
    docs: Tensor  # [M, D], group by group, the positive first
    of: Tensor  # [M], the group of each
    first: Tensor  # [B], the positive of each group
    sizes: list[int]  # documents of each group


def _flag(text: str) -> bool:
    if text.lower() not in (*_TRUE, *_FALSE):
        raise ValueError(f"{text!r} is neither true nor false")
    return text.lower() in _TRUE


def _world_size() -> int:
    """The number of processes whose rows are contrasted, as ms-swift takes it from the environment."""
    world = int(os.environ.get("WORLD_SIZE") or os.environ.get("_PATCH_WORLD_SIZE") or 1)
    if world == 1:
        return 1
    parallel = getattr(sys.modules.get("swift.sequence_parallel"), "sequence_parallel", None)
    if getattr(parallel, "dp_group", None) is not None:
        raise Unfused("sequences are parallel")
    if not dist.is_initialized() or dist.get_world_size() != world:
        raise Unfused("torch.distributed has not as many processes as WORLD_SIZE says")
    return world


def _of_all(sentences: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of every process; those of the others get no gradient."""
    return with_others(sentences), gather_rows(labels.detach(), dist.group.WORLD)


def _mean_loss(sentences: Tensor, labels: Tensor, options: _Options) -> Tensor:
    groups = _groups(sentences, labels, options.hard_negatives)
    rows = _rows_over_batch(groups, options) if options.use_batch else _rows_over_group(groups, options)
    return rows.mean().to(cross_entropy_dtype(sentences))


def _groups(sentences: Tensor, labels: Tensor, hard_negatives: int | None) -> _Groups:
    starts: list[int] = labels.nonzero()[:, 0].tolist()
    documents = labels.numel()
    if labels.dim() != 1 or not starts or starts[0] or len(starts) + documents != sentences.shape[0]:
        raise Unfused("labels do not begin with a positive, or do not match the rows")
    ends = [*starts[1:], documents]
    if hard_negatives is not None and any(end - start < 2 for start, end in zip(starts, ends, strict=True)):
        raise Unfused("a group has no negatives to choose from")
    anchors = [i + start for i, start in enumerate(starts)]
    rows = [
        _chosen(anchor + 1, end - start, hard_negatives)
        for anchor, start, end in zip(anchors, starts, ends, strict=True)
    ]
    sizes = [len(own) for own in rows]
    size = torch.tensor(sizes)
    of = torch.arange(len(sizes)).repeat_interleave(size)
    chosen = torch.tensor([row for own in rows for row in own])
    queries, chosen, of, first = (
        x.to(sentences.device) for x in (torch.tensor(anchors), chosen, of, size.cumsum(0) - size)
    )
    return _Groups(sentences[queries], sentences[chosen], of, first, sizes)


def _chosen(first: int, documents: int, hard_negatives: int | None) -> list[int]:
    """The rows of a group's documents, the positive first, by ms-swift's rule of how many and which."""
    rows = list(range(first, first + documents))
    negatives = documents - 1
    if hard_negatives is None or negatives == hard_negatives:
        return rows
    if negatives > hard_negatives:
        return rows[: 1 + hard_negatives]
    import numpy as np  # whose random numbers the library takes

    drawn = np.random.choice(list(range(negatives)), size=hard_negatives - negatives, replace=True)
    return rows + [rows[1 + i] for i in drawn.tolist()]


@dtypes.full_precision
def _rows_over_group(groups: _Groups, options: _Options) -> Tensor:
    """[B]: each anchor over its own documents."""
    dtype = dtypes.accumulate_dtype(groups.docs.dtype)
    logits = (groups.queries[groups.of].to(dtype) * groups.docs.to(dtype)).sum(1) / options.temperature
    place = torch.arange(logits.shape[0], device=logits.device) - groups.first[groups.of]
    table = logits.new_full((len(groups.sizes), max(groups.sizes)), -torch.inf)
    table = table.index_put((groups.of, place), logits)
    return table.logsumexp(1) - table[:, 0]


@dtypes.full_precision
def _rows_over_batch(groups: _Groups, options: _Options) -> Tensor:
    """[B]: each anchor over the documents of all groups."""
    queries, docs = groups.queries, groups.docs
    scale = 1.0 / options.temperature
    if options.mask_fake_negative:
        loss = _rows_without_fakes(groups, options, scale)
        positive = own_similarity(queries, docs[groups.first], scale)
    else:
        problem = Contrast(queries, docs, scale, positive_index=groups.first)
        stats = autograd.contrastive(problem)
        loss, positive = stats.lse - stats.positive_sum, stats.positive_sum
        if options.include_qq:
            loss = log_add(loss, autograd.contrastive(Contrast(queries, None, scale, 0)).lse - positive)
    if options.include_dd:
        loss = log_add(loss, _from_positives(groups, scale) - positive)
    return loss


def _from_positives(groups: _Groups, scale: float) -> Tensor:
    """The log-sum-exp of each positive over all documents but itself."""
    if len(groups.sizes) == groups.docs.shape[0]:
        return autograd.contrastive(Contrast(groups.docs, None, scale, 0)).lse
    rows = torch.arange(len(groups.sizes), device=groups.docs.device)
    others = torch.full_like(groups.of, -1).index_put((groups.first,), rows)
    problem = Contrast(
        groups.docs[groups.first], groups.docs, scale,
        row_labels=rows, col_labels=others, among="different",
    )  # fmt: skip
    return autograd.contrastive(problem).lse


def _rows_without_fakes(groups: _Groups, options: _Options, scale: float) -> Tensor:
    """[B]: over documents, and anchors if they are included, no more similar than the margin allows."""
    margin, with_queries = options.fake_neg_margin, options.include_qq

    def chunk(first: int, last: int, queries: Tensor, docs: Tensor, positives: Tensor) -> tuple[Tensor]:
        rows = torch.arange(last - first, device=docs.device)
        own = queries[first:last]
        scores = autograd.similarity(own, docs, scale, normalize=False)
        positive = scores[rows, positives[first:last]]
        limit = positive.detach()[:, None] + margin * scale
        lse = scores.masked_fill(scores.detach() > limit, -torch.inf).logsumexp(1)
        if with_queries:
            others = autograd.similarity(own, queries, scale, normalize=False)
            fake = others.detach() > limit
            fake[rows, rows + first] = True  # itself
            lse = log_add(lse, others.masked_fill(fake, -torch.inf).logsumexp(1))
        return (lse - positive,)

    dtype = dtypes.accumulate_dtype(groups.docs.dtype)
    queries, docs = groups.queries.to(dtype), groups.docs.to(dtype)
    columns = docs.shape[0] + (queries.shape[0] if with_queries else 0)
    (loss,) = in_chunks(queries.shape[0], columns, chunk, queries, docs, groups.first)
    return loss
