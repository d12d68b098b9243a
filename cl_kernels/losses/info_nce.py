"""InfoNCE with in-batch negatives, with a queue (MoCo), or with both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import autograd, validation
from ..distributed import ProcessGroup, Ranks, engine, join, rows_of, total
from ..problem import Contrast, KeyLoss
from ._common import (
    Grouped,
    beside,
    cross_entropy,
    inverse,
    keys_and_positives,
    loss_function,
    makes_whole_losses,
    nothing,
    over_frozen_keys,
    over_segments,
    own_similarity,
    reduced,
    shown,
    warn_of_empty_queue,
    whole,
)
from ._valid import among_valid, zero_unless

if TYPE_CHECKING:
    from ..queue import KeyQueue


@loss_function
def info_nce_loss(
    q: Tensor,
    k: Tensor,
    queue: Tensor | KeyQueue | None = None,
    *,
    temperature: float | Tensor = 0.07,
    in_batch: bool = False,
    k_global: Tensor | None = None,
    rank: int = 0,
    valid: Tensor | None = None,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    exchange: str = "gather",
) -> Tensor:
    r"""InfoNCE: find the key of each query.

    .. math:: \ell_i = \log \sum_{j \in D(i)} e^{q_i \cdot k_j / \tau} - q_i \cdot k_i / \tau

    ============================  ===========================================
    given                         D(i)
    ============================  ===========================================
    neither queue nor `k_global`  k
    queue                         the row's own key and the queue (MoCo)
    queue, `in_batch=True`        k and the queue
    `k_global`                    `k_global`
    queue, `k_global`             `k_global` and the queue
    ============================  ===========================================

    Args:
        q, k: queries and their keys, [N, D], float16, bfloat16, float32 or float64; used as they come, not
            normalised.
        queue: further negatives, a `KeyQueue` or [K, D], which may be the transpose of a [D, K] buffer (it is
            not copied); None. Where an empty queue leaves the own key alone, the loss is 0.
        temperature: :math:`\tau > 0`, a float or a tensor of one element, which gets its gradient.
        in_batch: whether the other keys of the batch (with a group: of all ranks) are negatives beside a
            queue too; without a queue they always are, and with `k_global` as well.
        k_global: the keys of all processes, [G, D] with :math:`G \ge N (\mathrm{rank} + 1)`, gathered by the
            caller; row i's positive is its row :math:`i + N \cdot \mathrm{rank}`, and k itself is not read.
        rank: which block of `k_global` holds the keys of this process.
        valid: bool [N], False for pairs that are padding: their queries are no anchors, their keys no
            negatives, their loss and gradient are 0 whatever stands in them, and the mean does not count
            them. None: all count. Not with `k_global`, whose padding the caller can leave out.
        reduction: "mean" over the queries, "sum", or "none": [N].
        group, exchange: the processes over whose rows the loss is taken, a `torch.distributed.ProcessGroup`,
            and how keys travel, "gather" or "ring" (docs/distributed.md); None: this process alone. With a
            group k stands for the keys of all ranks, and `k_global` and `rank` are refused.

    Returns:
        The loss in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape, device or value; the message names it.

    With u the keys of D, P the softmax over them and :math:`G_{ij} = g_i (P_{ij} - [u_j = k_i])`:

    ==================  ==============================================================
    input               gradient
    ==================  ==============================================================
    q                   :math:`G u / \tau`
    k, k_global, queue  :math:`G^\top q / \tau`; computed only where it is asked for
    temperature         :math:`-\sum_{ij} G_{ij}\, q_i \cdot u_j / \tau^2`
    ==================  ==============================================================

    Example:
        >>> import torch, cl_kernels as clk
        >>> q, k, queue = (torch.nn.functional.normalize(torch.randn(n, 16)) for n in (8, 8, 64))
        >>> clk.info_nce_loss(q.requires_grad_(), k, queue, temperature=0.07).backward()
        >>> clk.info_nce_loss(q, k, queue, in_batch=True) > clk.info_nce_loss(q, k, queue)  # more negatives
        tensor(True)

    Sources: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018; He et
    al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2020, equation 1.
    """
    validation.no_group_beside(group, k_global, rank)
    validation.not_both("k_global", k_global, "valid", valid)
    q, k, k_global, queue = validation.keys_and_queue(q, k, k_global, queue, rank)
    tau = validation.temperature("temperature", temperature, q)
    validation.flag("in_batch", in_batch)
    valid = validation.valid_rows(valid, q.shape[0], q)
    validation.option("reduction", reduction, validation.REDUCTIONS)

    ranks = join(
        group, exchange, q, "info_nce_loss", k=k, queue=queue, rows_of_queue=rows_of(queue),
        temperature=tau, in_batch=in_batch, valid=validation.kind(valid), reduction=reduction,
    )  # fmt: skip
    q, k = zero_unless(valid, q), zero_unless(valid, k)
    scale = inverse(tau, q)
    if valid is None and ranks is None:
        loss = _whole(q, k, k_global, queue, in_batch, rank, scale, reduction)
        if loss is not None:
            return loss
    if in_batch or queue is None or k_global is not None:
        first = q.shape[0] * rank
        own = torch.arange(first, first + q.shape[0], device=q.device)
        problem = Contrast(q, k if k_global is None else k_global, scale, positive_index=own)
        rows = _among_keys(among_valid(valid, problem), first, queue, ranks)
    else:
        rows = _beside_queue(q, k, queue, scale)
    return reduced(zero_unless(valid, rows), reduction, q, valid, ranks)


def _whole(
    q: Tensor,
    k: Tensor,
    k_global: Tensor | None,
    queue: Tensor | None,
    in_batch: bool,
    rank: int,
    scale: float | Tensor,
    reduction: str,
) -> Tensor | None:
    """The reduced loss by one op, or None."""
    if not makes_whole_losses(q, reduction, by_rows=True):
        return None
    keys, positive = keys_and_positives(k, k_global, queue, rank, in_batch)
    own = k if positive is None else None
    loss = over_frozen_keys(KeyLoss(q, keys, None, scale, own=own, positive=positive), reduction)
    if loss is None and own is None and len(keys) == 1:
        return whole(Contrast(q, keys[0], scale, positive_index=positive), reduction, keys[0].shape[0])
    return loss


def _among_keys(problem: Contrast, first: int, queue: Tensor | None, ranks: Ranks | None) -> Tensor:
    """[N]: the positives are keys of the problem, from `first` on, and the queue holds further ones."""
    stats = engine.contrastive(problem, ranks, first_positive=first)
    further = [] if queue is None or queue.shape[0] == 0 else [queue]
    lse = over_segments(stats.lse, problem.q, further, problem.scale)
    columns = total(problem.keys.shape[0], ranks) + sum(len(part) for part in further)
    return cross_entropy(lse, stats.positive_sum, columns)


def _beside_queue(q: Tensor, k: Tensor, queue: Tensor, scale: float | Tensor) -> Tensor:
    """[N]: the positive is a column of its own beside the queue's."""
    positive = own_similarity(q, k, scale)
    if queue.shape[0] == 0:
        warn_of_empty_queue()
        return nothing(positive)
    others = autograd.contrastive(Contrast(q, queue, scale)).lse
    return beside(others, positive)


class InfoNCELoss(Grouped):
    """`info_nce_loss` as a module: forward(q, k, queue=None, *, k_global=None, rank=0, valid=None)."""

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        in_batch: bool = False,
        reduction: str = "mean",
        group: ProcessGroup | None = None,
        exchange: str = "gather",
    ) -> None:
        super().__init__(group, exchange)
        self.temperature = temperature
        self.in_batch = validation.flag("in_batch", in_batch)
        self.reduction = validation.option("reduction", reduction, validation.REDUCTIONS)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        queue: Tensor | KeyQueue | None = None,
        *,
        k_global: Tensor | None = None,
        rank: int = 0,
        valid: Tensor | None = None,
    ) -> Tensor:
        return info_nce_loss(
            q,
            k,
            queue,
            temperature=self.temperature,
            in_batch=self.in_batch,
            k_global=k_global,
            rank=rank,
            valid=valid,
            reduction=self.reduction,
            group=self.group,
            exchange=self.exchange,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={shown(self.temperature)}, in_batch={self.in_batch}, reduction={self.reduction!r}"
            f"{self.shown_group()}"
        )
