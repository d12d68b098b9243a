"""pytorch-metric-learning: `SupConLoss` and `NTXentLoss`, also inside of the library's wrappers.

A loss here makes the losses of rows or of positive pairs, the library's reducer does the rest. The pairs that
the library's losses take are indices, of every pair of rows by itself; `CrossBatchMemory` and
`DistributedLossWrapper` hand an `AllPairs` on instead, which says as much without them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import BaseDistance, DotProductSimilarity, LpDistance
from pytorch_metric_learning.reducers import (
    AvgNonZeroReducer,
    MeanReducer,
    MultipleReducers,
    ThresholdReducer,
)
from pytorch_metric_learning.utils import distributed
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from .. import autograd, dtypes, validation
from ..losses._common import at_least_zero, in_chunks, inverse
from ..losses._pairs import Plan, in_blocks
from ..problem import Contrast
from ._dtypes import autocast_dtype, logsumexp_dtype, product_dtype
from ._registry import passed_on
from ._swap import Unfused, fused

__all__ = ["CrossBatchMemory", "DistributedLossWrapper", "NTXentLoss", "SupConLoss"]
__getattr__ = passed_on(losses)

HOOKS = ("_compute_loss", "mat_based_loss", "pair_based_loss")

LossDict = dict[str, dict[str, Any]]


class AllPairs(Sequence[Tensor]):
    """The index tuple (anchors, positives, anchors, negatives) of all rows and reference rows, by label.

    Row i and reference row `own` + i are no pair, `own` None: every one is. The indices are made when they
    are asked for, by a loss that is not fused.
    """

    def __init__(self, labels: Tensor, ref_labels: Tensor, own: int | None) -> None:
        self.labels, self.ref_labels, self.own = labels, ref_labels, own
        self._indices: tuple[Tensor, ...] | None = None

    @property
    def indices(self) -> tuple[Tensor, ...]:
        if self._indices is None:
            pairs = lmu.get_all_pairs_indices(self.labels, self.ref_labels)
            if self.own is not None:
                size = len(self.ref_labels)
                rows = torch.arange(len(self.labels), device=self.labels.device)
                pairs = lmu.remove_self_comparisons(pairs, (rows + self.own) % size, size)
            self._indices = pairs
        return self._indices

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: Any) -> Any:
        return self.indices[i]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.indices)

    def __add__(self, other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.indices + other


class _Rows(NamedTuple):
    """Rows as a distance makes them: similarities are scale q k^T, up to a constant of the row."""

    q: Tensor  # [N, D]
    k: Tensor | None  # [M, D], None: q
    scale: float | Tensor
    dtype: torch.dtype  # that the library's matrix would have
    result: torch.dtype  # and its losses

    @property
    def keys(self) -> Tensor:
        return self.q if self.k is None else self.k


class _Classes(NamedTuple):
    """Pairs by label: row i and column i + exclude are none."""

    rows: Tensor  # int64 [N]
    columns: Tensor  # int64 [M]
    exclude: int | None
    shift: int = 0  # column j is the library's column (j + shift) % M

    @property
    def own(self) -> int:
        """How many rows have a column that is themselves."""
        return 0 if self.exclude is None else len(self.rows)


class _Given(NamedTuple):
    """Pairs by index, as a miner gives them."""

    anchors: Tensor
    positives: Tensor
    other_anchors: Tensor
    negatives: Tensor

    @property
    def few(self) -> bool:
        """Whether they are too few for the library to look at the embeddings."""
        return all(len(x) <= 1 for x in self)


class SupConLoss(losses.SupConLoss):
    r"""The library's `SupConLoss`, fused.

    .. math:: \ell_i = \log \sum_{j \neq i} e^{S_{ij}} - \frac{1}{|P(i)|} \sum_{p \in P(i)} S_{ip}

    with S the distance's matrix over the temperature, P(i) the other rows of anchor i's label; 0 where there
    are none. The reducer takes the [N] losses; the library's own averages those above 0.

    Source: Khosla et al., "Supervised Contrastive Learning", 2020, equation 2.
    """

    @fused("pytorch_metric_learning.losses.supcon_loss:SupConLoss.compute_loss", relies_on=HOOKS)
    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Sequence[Tensor] | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> LossDict:
        pairs = _pairs(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if isinstance(pairs, _Given) and pairs.few:
            return self.zero_losses()
        rows = _rows(self, embeddings, ref_emb, pairs)
        if isinstance(pairs, _Given):
            found, valid = _mean_log_of_given(rows, pairs)
        else:
            found, valid = _mean_log(rows, pairs)
        if validation.readable(found) or not _takes_zeros(self.reducer):
            if not valid:
                return self.zero_losses()
        else:  # the same loss and gradient, without waiting for a device
            found = torch.where(valid, found, 0)
        own = torch.arange(found.shape[0], device=found.device)
        return _losses(found.to(rows.result), own, "element")


class NTXentLoss(losses.NTXentLoss):
    r"""The library's `NTXentLoss`, fused.

    .. math:: \ell_{ip} = -\log \frac{e^{S_{ip}}}{e^{S_{ip}} + \sum_{n \in N(i)} e^{S_{in}}}

    for every positive pair (i, p), N(i) the rows of other labels and S the distance's matrix over the
    temperature. The library adds the smallest normal number of the matrix's dtype within the logarithm, which
    bounds the loss at 87 in float32 and at 9.7 in float16; so does this.

    Source: Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", 2016; Chen et al.,
    "A Simple Framework for Contrastive Learning of Visual Representations", 2020, equation 1.
    """

    @fused("pytorch_metric_learning.losses.ntxent_loss:NTXentLoss.compute_loss", relies_on=HOOKS)
    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Sequence[Tensor] | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> LossDict:
        pairs = _pairs(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if isinstance(pairs, _Given) and pairs.few:
            return self.zero_losses()
        rows = _rows(self, embeddings, ref_emb, pairs)
        if isinstance(pairs, _Given):
            if not (len(pairs.anchors) and len(pairs.other_anchors)):
                return self.zero_losses()
            found, a1, p = _pair_losses_of_given(rows, pairs), pairs.anchors, pairs.positives
            if _is_mean(self.reducer):
                return _losses(found.mean().to(rows.result), None, "already_reduced")
            return _losses(found.to(rows.result), (a1, p), "pos_pair")
        plan = Plan.of(_problem(rows, pairs))
        positives = plan.pairs - pairs.own
        negatives = len(pairs.rows) * len(pairs.columns) - plan.pairs
        if not (positives and negatives) or positives == negatives == 1:
            return self.zero_losses()
        if _is_mean(self.reducer):
            total = _sum_of_pairs(rows, pairs, plan)
            return _losses((total / positives).to(rows.result), None, "already_reduced")
        found, a1, p = _pair_losses(rows, pairs, plan)
        return _losses(found.to(rows.result), (a1, p), "pos_pair")


class CrossBatchMemory(losses.CrossBatchMemory):
    """The library's `CrossBatchMemory`, which without a miner gives its loss no index of each pair."""

    @fused(
        "pytorch_metric_learning.losses.cross_batch_memory:CrossBatchMemory.create_indices_tuple",
        relies_on=("add_to_memory",),
    )
    def create_indices_tuple(
        self,
        embeddings: Tensor,
        labels: Tensor,
        E_mem: Tensor,
        L_mem: Tensor,
        input_indices_tuple: Sequence[Tensor] | None,
        do_remove_self_comparisons: bool,
    ) -> Sequence[Tensor]:
        if not isinstance(self.loss, losses.SupConLoss | losses.NTXentLoss):
            raise Unfused(f"the loss inside is {type(self.loss).__name__}")
        if self.miner or input_indices_tuple is not None:
            raise Unfused("a miner chooses the pairs")
        if len(L_mem) < len(labels) and do_remove_self_comparisons:
            raise Unfused("the memory is smaller than the batch")
        if not do_remove_self_comparisons:
            return AllPairs(labels, L_mem, None)
        return AllPairs(labels, L_mem, (self.queue_idx - len(labels)) % self.memory_size)


class DistributedLossWrapper(distributed.DistributedLossWrapper):
    """The library's `DistributedLossWrapper`, which when efficient gives its loss no index of each pair."""

    @fused("pytorch_metric_learning.utils.distributed:DistributedLossWrapper.forward_regular_loss")
    def forward_regular_loss(
        self,
        emb: Tensor,
        labels: Tensor | None,
        indices_tuple: Sequence[Tensor] | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
        world_size: int,
    ) -> Any:
        if world_size <= 1 or not self.efficient or indices_tuple is not None:
            raise Unfused("the loss inside makes the pairs, and may itself run fused")
        if not isinstance(self.loss, losses.SupConLoss | losses.NTXentLoss):
            raise Unfused(f"the loss inside is {type(self.loss).__name__}")
        if labels is None:
            raise Unfused("there are no labels")
        everyone, their_labels, refs, their_ref_labels, labels = distributed.gather_emb_and_ref(
            emb, labels, ref_emb, ref_labels
        )
        their_labels = distributed.select_ref_or_regular(their_labels, their_ref_labels)
        refs = distributed.select_ref_or_regular(everyone, refs)
        pairs = AllPairs(labels, their_labels, 0)
        return self.loss(emb, labels, pairs, refs, their_labels) * world_size


def _losses(found: Tensor, indices: Any, reduction_type: str) -> LossDict:
    return {"loss": {"losses": found, "indices": indices, "reduction_type": reduction_type}}


def _pairs(
    embeddings: Tensor,
    labels: Tensor | None,
    indices_tuple: Sequence[Tensor] | None,
    ref_emb: Tensor,
    ref_labels: Tensor | None,
) -> _Classes | _Given:
    """Which pairs there are: those a miner gives, else all by label."""
    if isinstance(indices_tuple, AllPairs):
        return _by_label(embeddings, ref_emb, indices_tuple)
    if indices_tuple is None:
        if labels is None:
            raise Unfused("there are neither labels nor pairs")
        ref_labels = labels if ref_labels is None else ref_labels
        return _by_label(
            embeddings, ref_emb, AllPairs(labels, ref_labels, 0 if ref_labels is labels else None)
        )
    if len(indices_tuple) == 3:
        a, p, n = indices_tuple
        return _Given(a, p, a, n)
    return _Given(*indices_tuple)


def _by_label(embeddings: Tensor, ref_emb: Tensor, pairs: AllPairs) -> _Classes:
    labels, ref_labels, own = pairs.labels, pairs.ref_labels, pairs.own
    if labels.is_floating_point() or ref_labels.is_floating_point():
        raise Unfused("labels are not integers")
    if labels.device != embeddings.device or ref_labels.device != labels.device:
        raise Unfused("labels and embeddings are on several devices")
    n, m = len(labels), len(ref_labels)
    if n != len(embeddings) or m > len(ref_emb) or not (n and m):
        raise Unfused("there are not as many labels as embeddings, or none")
    rows = labels.to(torch.int64, copy=True)  # the backward reads them: a memory may have changed by then
    if labels is ref_labels:
        return _Classes(rows, rows, own)
    columns = ref_labels.to(torch.int64, copy=True)
    if n == 1:
        own = None  # the library keeps the self-comparison of a batch of one
    if own is not None and own + n > m:
        return _Classes(rows, columns.roll(-own), 0, shift=own)
    return _Classes(rows, columns, own)


def _rows(loss: Any, embeddings: Tensor, ref_emb: Tensor, pairs: _Classes | _Given) -> _Rows:
    """The embeddings as the loss's distance wants them, once it is sure that the engine can have them."""
    distance, autocast = loss.distance, autocast_dtype(embeddings) is not None
    squared = _is_squared(distance)
    if embeddings.dtype not in dtypes.FLOAT_DTYPES or ref_emb.device != embeddings.device:
        raise Unfused("embeddings are not floating-point numbers on one device")
    if embeddings.ndim != 2 or ref_emb.ndim != 2 or embeddings.shape[1] != ref_emb.shape[1]:
        raise Unfused("embeddings are no matrices of one width")
    if ref_emb.dtype != embeddings.dtype and not autocast:
        raise Unfused("embeddings are of two dtypes")
    if squared and (autocast or embeddings.dtype == torch.float16):
        raise Unfused("distances in float16 and under autocast are not fused")
    scale = inverse(validation.temperature("temperature", loss.temperature, embeddings), embeddings)

    distance.reset_stats()
    q = distance.maybe_normalize(embeddings)
    same = ref_emb is embeddings
    k = q if same else distance.maybe_normalize(ref_emb)
    distance.set_default_stats(embeddings, ref_emb, q, k)
    if isinstance(pairs, _Classes) and not same:
        k = k[: len(pairs.columns)].roll(-pairs.shift, 0)
    q, k = dtypes.promote(q, k)
    if squared:  # -|q - k|^2 is 2 q.k - |k|^2, less a constant of the row
        q, k = (x.to(dtypes.accumulate_dtype(x.dtype)) for x in (q, k))
        q, k = F.pad(2 * q, (0, 1), value=1.0), torch.cat([k, -(k * k).sum(1, keepdim=True)], 1)
    elif same:
        k = None
    return _Rows(q, k, scale, product_dtype(embeddings), logsumexp_dtype(embeddings))


def _is_squared(distance: Any) -> bool:
    """Whether it is the squared Euclidean distance; False: a dot product."""
    kind = type(distance)
    own = ("forward", "set_default_stats", "maybe_normalize", "normalize")
    if not isinstance(distance, BaseDistance) or any(
        getattr(kind, name) is not getattr(BaseDistance, name) for name in own
    ):
        raise Unfused(f"the distance is {kind.__name__}")
    if kind.compute_mat is DotProductSimilarity.compute_mat and distance.is_inverted:
        if distance.power == 1:
            return False
        raise Unfused(f"similarities to the power {distance.power} are no dot product")
    if kind.compute_mat is LpDistance.compute_mat and not distance.is_inverted:
        if (distance.p, distance.power) == (2, 2):
            return True
        raise Unfused("LpDistance is a dot product for p=2 and power=2 only")
    raise Unfused(f"the distance is {kind.__name__}")


def _takes_zeros(reducer: Any) -> bool:
    """Whether a reducer makes of losses that are all 0 what it makes of none."""
    known = (AvgNonZeroReducer, MeanReducer, ThresholdReducer)
    return type(_reducer(reducer)) in known and not reducer.collect_stats


def _is_mean(reducer: Any) -> bool:
    reducer = _reducer(reducer)
    return type(reducer) is MeanReducer and not reducer.collect_stats


def _reducer(reducer: Any) -> Any:
    """The one of the loss, among those of its regularizers."""
    if type(reducer) is MultipleReducers:
        return dict(reducer.reducers.items()).get("loss", reducer.default_reducer)
    return reducer


def _mean_log(rows: _Rows, classes: _Classes) -> tuple[Tensor, Tensor]:
    """SupCon's losses [N], and whether there are pairs enough for the library to have any."""
    stats = autograd.contrastive(_problem(rows, classes, label_positives=True))
    count = stats.positive_count
    positives = count.sum()
    negatives = len(classes.rows) * len(classes.columns) - classes.own - positives
    valid = (positives > 0) & (negatives > 0) & ((positives > 1) | (negatives > 1))
    loss = stats.lse.masked_fill(count == 0, 0) - stats.positive_sum / count.clamp(min=1)
    return at_least_zero(loss), valid


def _problem(rows: _Rows, classes: _Classes, **options: Any) -> Contrast:
    return Contrast(
        rows.q, rows.k, rows.scale, classes.exclude, classes.rows, classes.columns, **options
    )  # fmt: skip


def _sum_of_pairs(rows: _Rows, classes: _Classes, plan: Plan) -> Tensor:
    """NTXent's losses of all positive pairs, summed."""
    if plan.most - (classes.own > 0) <= 1:
        stats = autograd.contrastive(_problem(rows, classes, among="different", label_positives=True))
        loss = _pair_loss(stats.lse, stats.positive_sum, rows.dtype)
        return loss.masked_fill(stats.positive_count == 0, 0).sum()
    return torch.stack([x for (x,) in _in_blocks(rows, classes, plan, summed=True)]).sum()


def _pair_losses(rows: _Rows, classes: _Classes, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """NTXent's loss, row and column of each positive pair, in the library's order."""
    parts = _in_blocks(rows, classes, plan, summed=False)
    losses, anchors, positives = (torch.cat(part) for part in zip(*parts, strict=True))
    columns = len(classes.columns)
    positives = (positives + classes.shift) % columns
    order = (anchors * columns + positives).argsort()
    return losses[order], anchors[order], positives[order]


def _in_blocks(rows: _Rows, classes: _Classes, plan: Plan, summed: bool) -> list[tuple[Tensor, ...]]:
    negatives = autograd.contrastive(_problem(rows, classes, among="different")).lse
    block = partial(_block, summed, rows.dtype)
    return in_blocks(_problem(rows, classes), plan, block, [negatives], [])


def _block(
    summed: bool,
    dtype: torch.dtype,
    logits: Tensor,
    pairs: Tensor,
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """The pair losses of some rows and columns: their sum, or each with its row and column."""
    row_ids, negatives = rows
    loss = _pair_loss(negatives.to(logits.dtype)[:, None], logits, dtype)
    if summed:
        return (loss.masked_fill(~pairs, 0).sum(dtype=negatives.dtype),)
    at_rows, at_columns = pairs.nonzero(as_tuple=True)
    return loss[at_rows, at_columns], row_ids[at_rows], columns[0][at_columns]


def _pair_loss(negatives: Tensor, positives: Tensor, dtype: torch.dtype) -> Tensor:
    """-log(e^-x + tiny), x = log(e^p + e^n) - p: what is added in the logarithm is the library's."""
    loss = F.softplus(negatives - positives, threshold=40.0)
    tiny = torch.finfo(dtype).tiny
    return loss - F.softplus(loss + math.log(tiny), threshold=40.0)


def _mean_log_of_given(rows: _Rows, pairs: _Given) -> tuple[Tensor, Tensor]:
    """SupCon's losses [N] over the pairs that are given, each once; as `_mean_log`."""
    size = (len(rows.q), len(rows.keys))
    positive, negative = (torch.zeros(size, dtype=torch.bool, device=rows.q.device) for _ in range(2))
    positive[pairs.anchors, pairs.positives] = True
    negative[pairs.other_anchors, pairs.negatives] = True
    if (positive & negative).any():
        raise Unfused("a pair is both positive and negative")
    valid = positive.any() & negative.any()
    q, k = (x.to(dtypes.accumulate_dtype(x.dtype)) for x in (rows.q, rows.keys))
    (found,) = in_chunks(*size, _some_rows, rows.scale, q, k, positive, negative)
    return found, valid


def _some_rows(
    first: int, last: int, scale: float | Tensor, q: Tensor, k: Tensor, *pairs: Tensor
) -> tuple[Tensor, ...]:
    positive, negative = (x[first:last] for x in pairs)
    logits = autograd.similarity(q[first:last], k, scale, normalize=False)
    count = positive.sum(1)
    alone = count == 0
    kept = (positive | negative) & ~alone[:, None]
    lse = logits.masked_fill(~kept, -torch.inf).masked_fill(alone[:, None], 0).logsumexp(1)
    mean = logits.masked_fill(~positive, 0).sum(1) / count.clamp(min=1)
    return (at_least_zero((lse - mean).masked_fill(alone, 0)),)


def _pair_losses_of_given(rows: _Rows, pairs: _Given) -> Tensor:
    """NTXent's losses of the positive pairs that are given, each with the negatives of its anchor."""
    a1, p, a2, n = pairs
    a2 = a2 % len(rows.q)  # as an index of rows, which may be negative
    positives, negatives = _scores(rows, (a1, a2), (p, n))
    most = negatives.new_full((len(rows.q),), -torch.inf)
    most = most.scatter_reduce(0, a2, negatives.detach(), "amax")
    none = most == -torch.inf
    total = torch.zeros_like(most).index_add(0, a2, (negatives - most[a2]).exp())
    lse = (total.masked_fill(none, 1).log() + most.masked_fill(none, 0)).masked_fill(none, -torch.inf)
    return _pair_loss(lse[a1], positives, rows.dtype)


def _scores(rows: _Rows, anchors: Sequence[Tensor], others: Sequence[Tensor]) -> Sequence[Tensor]:
    """Similarities of pairs of rows: out of the whole matrix where this is no larger than their indices, else
    each by itself."""
    q, k = (x.to(dtypes.accumulate_dtype(x.dtype)) for x in (rows.q, rows.keys))
    sizes = [len(x) for x in anchors]
    rows_of, columns_of = torch.cat(list(anchors)), torch.cat(list(others))
    if len(q) * len(k) <= 4 * sum(sizes):
        matrix = autograd.similarity(q, None if rows.k is None else k, rows.scale, normalize=False)
        return matrix[rows_of, columns_of].split(sizes)
    (found,) = in_chunks(sum(sizes), q.shape[1], _products, q, k, rows.scale, rows_of, columns_of)
    return found.split(sizes)


def _products(
    first: int, last: int, q: Tensor, k: Tensor, scale: float | Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, ...]:
    return ((q[rows[first:last]] * k[columns[first:last]]).sum(1) * scale,)
