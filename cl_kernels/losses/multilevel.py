"""Multi-level contrastive learning: one supervised contrastive loss for each layer of an encoder."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import validation
from ..distributed import ProcessGroup
from ._common import Grouped, shown, wide
from .supcon import supcon_loss


def multilevel_loss(
    levels: Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    weights: Sequence[float] | Tensor | None = None,
    temperature: float | Tensor = 0.07,
    base_temperature: float | Tensor = 0.07,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    exchange: str = "gather",
) -> Tensor:
    r"""Weighted sum of `supcon_loss` over levels of different width.

    .. math:: L = \sum_l w_l\, L_{\mathrm{SupCon}}(z^{(l)}, \mathrm{labels})

    Args:
        levels: a list of [B, V, D_l], one tensor a level, of the same B and V; used as they come, not
            normalised.
        labels: [B] or [B, 1], shared by the levels; None: the other views of a sample are its positives.
        weights: one float a level, or a tensor [L], which gets its gradient; None: all 1.
        temperature, base_temperature: shared by the levels; floats or tensors of one element, which get their
            gradients.
        reduction: "mean", "sum" or "none" within each level, before the weighted sum.
        group, exchange: the processes over whose rows the loss is taken, a `torch.distributed.ProcessGroup`,
            and how keys travel, "gather" or "ring" (docs/distributed.md); None: this process alone.

    Returns:
        The loss in float32 (float64 if a level is float64).

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape, device or value; the message names it.

    Gradients: of each level, w_l times those of `supcon_loss`; of w_l, the loss of its level.

    Example:
        >>> import torch, cl_kernels as clk
        >>> levels = [torch.randn(8, 2, width, requires_grad=True) for width in (16, 32)]
        >>> clk.multilevel_loss(levels, torch.arange(8) % 4, weights=[1.0, 0.5]).backward()

    Source: multi-level contrastive learning for few-shot problems, one projection head a layer.
    """
    levels = validation.levels("levels", levels)
    factors = validation.level_weights("weights", weights, len(levels), levels[0])
    losses = [
        supcon_loss(
            level,
            labels,
            temperature=temperature,
            base_temperature=base_temperature,
            reduction=reduction,
            group=group,
            exchange=exchange,
        )
        for level in levels
    ]
    if weights is not None:
        losses = [loss * wide(factor, loss) for loss, factor in zip(losses, factors, strict=True)]
    return functools.reduce(torch.add, losses)


class MultiLevelConLoss(Grouped):
    """`multilevel_loss` as a module: forward(levels, labels=None)."""

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        base_temperature: float | Tensor = 0.07,
        weights: Sequence[float] | Tensor | None = None,
        *,
        reduction: str = "mean",
        group: ProcessGroup | None = None,
        exchange: str = "gather",
    ) -> None:
        super().__init__(group, exchange)
        self.temperature = temperature
        self.base_temperature = base_temperature
        self.weights = weights
        self.reduction = validation.option("reduction", reduction, validation.REDUCTIONS)

    def forward(self, levels: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        return multilevel_loss(
            levels,
            labels,
            weights=self.weights,
            temperature=self.temperature,
            base_temperature=self.base_temperature,
            reduction=self.reduction,
            group=self.group,
            exchange=self.exchange,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={shown(self.temperature)}, base_temperature={shown(self.base_temperature)}, "
            f"weights={self.weights}, reduction={self.reduction!r}{self.shown_group()}"
        )
