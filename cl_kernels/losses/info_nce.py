"""InfoNCE with in-batch negatives, or with a queue (MoCo)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import autograd, validation
from ..distributed import ProcessGroup, engine, join, rows_of, total
from ..problem import Contrast
from ._common import (
    Grouped,
    cross_entropy,
    inverse,
    loss_function,
    nothing,
    own_similarity,
    reduced,
    shown,
    warn_of_empty_queue,
)

if TYPE_CHECKING:
    from ..queue import KeyQueue


@loss_function
def info_nce_loss(
    q: Tensor,
    k: Tensor,
    queue: Tensor | KeyQueue | None = None,
    *,
    temperature: float | Tensor = 0.07,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    exchange: str = "gather",
) -> Tensor:
    r"""InfoNCE: find the key of each query.

    .. math:: \ell_i = \log \sum_{j \in D(i)} e^{q_i \cdot k_j / \tau} - q_i \cdot k_i / \tau

    Without a queue, D(i) is every key of the batch (one axis: queries over keys). With one, D(i) is the row's
    own key and the queue; the other keys of the batch are left out.

    Args:
        q, k: queries and their keys, [N, D], float16, bfloat16, float32 or float64; used as they come, not
            normalised.
        queue: further negatives, a `KeyQueue` or [K, D], which may be the transpose of a [D, K] buffer; None.
            Beside an empty queue the own key is alone, and the loss 0.
        temperature: :math:`\tau > 0`, a float or a tensor of one element, which gets its gradient.
        reduction: "mean" over the queries, "sum", or "none": [N].
        group, exchange: the processes over whose rows the loss is taken, a `torch.distributed.ProcessGroup`,
            and how keys travel, "gather" or "ring" (docs/distributed.md); None: this process alone.

    Returns:
        The loss in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape, device or value; the message names it.

    With :math:`G_{ij} = g_i (P_{ij} - [j = i])`:

    ============  ==============================================================
    input         gradient
    ============  ==============================================================
    q             :math:`G k / \tau`
    k, queue      :math:`G^\top q / \tau`; computed only where it is asked for
    temperature   :math:`-\sum_{ij} G_{ij}\, q_i \cdot k_j / \tau^2`
    ============  ==============================================================

    Example:
        >>> import torch, cl_kernels as clk
        >>> q, k, queue = (torch.nn.functional.normalize(torch.randn(n, 16)) for n in (8, 8, 64))
        >>> clk.info_nce_loss(q.requires_grad_(), k, queue, temperature=0.07).backward()

    Sources: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018; He et
    al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2020, equation 1.
    """
    q, k, queue = validation.pair_and_queue(q, k, queue)
    tau = validation.temperature("temperature", temperature, q)
    validation.option("reduction", reduction, validation.REDUCTIONS)

    ranks = join(
        group,
        exchange,
        q,
        "info_nce_loss",
        k=k,
        queue=queue,
        rows_of_queue=rows_of(queue),
        temperature=tau,
        reduction=reduction,
    )
    scale = inverse(tau, q)
    if queue is None:
        own = torch.arange(q.shape[0], device=q.device)
        stats = engine.contrastive(Contrast(q, k, scale, positive_index=own), ranks, first_positive=0)
        loss = cross_entropy(stats.lse, stats.positive_sum, total(q.shape[0], ranks))
        return reduced(loss, reduction, q, ranks=ranks)
    positive = own_similarity(q, k, scale)
    if queue.shape[0] == 0:
        warn_of_empty_queue()
        return reduced(nothing(positive), reduction, q, ranks=ranks)
    others = autograd.contrastive(Contrast(q, queue, scale)).lse
    return reduced(-F.logsigmoid(positive - others), reduction, q, ranks=ranks)


class InfoNCELoss(Grouped):
    """`info_nce_loss` as a module: forward(q, k, queue=None)."""

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        reduction: str = "mean",
        group: ProcessGroup | None = None,
        exchange: str = "gather",
    ) -> None:
        super().__init__(group, exchange)
        self.temperature = temperature
        self.reduction = validation.option("reduction", reduction, validation.REDUCTIONS)

    def forward(self, q: Tensor, k: Tensor, queue: Tensor | KeyQueue | None = None) -> Tensor:
        return info_nce_loss(
            q,
            k,
            queue,
            temperature=self.temperature,
            reduction=self.reduction,
            group=self.group,
            exchange=self.exchange,
        )

    def extra_repr(self) -> str:
        return f"temperature={shown(self.temperature)}, reduction={self.reduction!r}{self.shown_group()}"
