"""Dimensional contrastive learning (DimCL)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .. import autograd, dtypes, reference, validation
from ..distributed import ProcessGroup, Ranks, all_to_all, engine, join
from ..problem import Contrast
from ._common import (
    Grouped,
    cross_entropy,
    inverse,
    loss_function,
    makes_whole_losses,
    reduced,
    settled,
    shown,
)


@loss_function
def dimcl_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    positive_mask: Tensor | None = None,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    exchange: str = "gather",
) -> Tensor:
    r"""NT-Xent along the feature axis: the 2D columns of two views are the instances, of length N.

    Each column is centred over the batch and divided by its norm, so S is the Pearson correlation of the
    columns over :math:`\tau` (a batch norm without affine before it changes nothing). With :math:`x_r` these
    columns, those of z0 first, and :math:`p(r) = (r + D) \bmod 2D`:

    .. math:: \ell_r = \log \sum_{c \ne r} e^{x_r \cdot x_c / \tau}
                       - \frac{1}{|P(r)|} \sum_{c \in P(r)} x_r \cdot x_c / \tau, \qquad P(r) = \{p(r)\}

    Args:
        z0, z1: two views, [N, D], float16, bfloat16, float32 or float64; N >= 2. A constant column correlates
            0 with every other one and gets no gradient.
        temperature: :math:`\tau > 0`, a float or a tensor of one element, which gets its gradient.
        positive_mask: bool [2D, 2D] of further positives P(r) beside p(r), or None; its diagonal is ignored.
        reduction: "mean" over the 2D columns, "sum", or "none": [2D].
        group, exchange: the processes over whose rows the loss is taken, a `torch.distributed.ProcessGroup`,
            and how keys travel, "gather" or "ring" (docs/distributed.md); None: this process alone.

    Returns:
        The loss in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape, device or value; the message names it.

    With :math:`G_{rc} = g_r (P_{rc} - [c \in P(r)] / |P(r)|)`:

    ============  ======================================================================================
    input         gradient
    ============  ======================================================================================
    columns       :math:`dx = (G + G^\top) x / \tau`
    z0, z1        :math:`(dx - \overline{dx} - x\,(x \cdot dx)) / \|\mathrm{centred\ column}\|`
    temperature   :math:`-\sum_{rc} G_{rc}\, x_r \cdot x_c / \tau^2`
    ============  ======================================================================================

    Example:
        >>> import torch, cl_kernels as clk
        >>> z0, z1 = torch.randn(64, 16, requires_grad=True), torch.randn(64, 16)
        >>> clk.dimcl_loss(z0, z1, temperature=0.1).backward()

    Source: Nguyen et al., "DimCL: Dimensional Contrastive Learning for Improving Self-Supervised Learning",
    2023.
    """
    z0, z1 = validation.pair("z0", z0, "z1", z1)
    if group is None:
        validation.minimum_rows("z0", z0, 2)
    if positive_mask is not None:
        validation.boolean_mask("positive_mask", positive_mask, (2 * z0.shape[1], 2 * z0.shape[1]))
        validation.same_device(z0=z0, positive_mask=positive_mask)
    tau = validation.temperature("temperature", temperature, z0)
    validation.option("reduction", reduction, validation.REDUCTIONS)

    ranks = join(
        group,
        exchange,
        z0,
        "dimcl_loss",
        z1=z1,
        temperature=tau,
        positive_mask=positive_mask,
        reduction=reduction,
    )
    scale, others = inverse(tau, z0), 2 * z0.shape[1] - 1
    if ranks is None:
        validation.minimum_rows("z0", z0, 2)
        if others > 1 and makes_whole_losses(z0, reduction, by_rows=True):
            return autograd.dimcl_loss(z0, z1, scale, positive_mask, reduction == "mean")
        lse, positive_sum, positive_count = autograd.dimcl(z0, z1, scale, positive_mask)
    else:
        problem, ranks = _share(z0, z1, scale, positive_mask, ranks)
        lse, _, positive_sum, positive_count = engine.contrastive(problem, ranks)
    if positive_mask is None:
        return reduced(cross_entropy(lse, positive_sum, others), reduction, z0, ranks=ranks)
    loss = torch.addcdiv(lse, positive_sum, positive_count, value=-1)
    return reduced(settled(loss, others), reduction, z0, ranks=ranks)


def _share(
    z0: Tensor, z1: Tensor, scale: float | Tensor, mask: Tensor | None, ranks: Ranks
) -> tuple[Contrast, Ranks]:
    """The problem of this rank's share of the columns, in both views and over the whole batch; and the ranks,
    with the rows of each one's share as samples."""
    width, world = z0.shape[1], ranks.world
    ends = [width * i // world for i in range(world + 1)]
    columns = [torch.arange(a, b, device=z0.device) for a, b in itertools.pairwise(ends)]
    order = [torch.cat([x, x + width]) for x in columns]
    rows = torch.cat([z0, z1], 1).T
    sent = [rows.index_select(0, own).flatten() for own in order]
    n = order[ranks.rank].shape[0]
    received = [n * size for size in ranks.sizes]
    parts = all_to_all(torch.cat(sent), [x.numel() for x in sent], received, ranks.group).split(received)
    whole = torch.cat([x.view(n, size) for x, size in zip(parts, ranks.sizes, strict=True)], 1)
    x = reference.standardize(whole.T.to(dtypes.accumulate_dtype(z0.dtype))).T
    if x.device.type != "cpu":  # as the op's kernels for each device have them
        x = x.to(z0.dtype)
    problem = Contrast(x, None, scale, exclude=0)
    partner = torch.arange(n, device=x.device).roll(n // 2)
    if mask is None:
        problem = problem._replace(positive_index=partner)
    else:
        own, first = order[ranks.rank], sum(len(rows) for rows in order[: ranks.rank])
        mask = mask.index_select(0, own).index_select(1, torch.cat(order))
        mask = mask.scatter(1, (partner + first)[:, None], True)
        problem = problem._replace(positive_mask=mask.to(dtypes.accumulate_dtype(x.dtype)))
    return problem, ranks._replace(sizes=tuple(len(own) for own in order))


class DimCLLoss(Grouped):
    """`dimcl_loss` as a module: forward(z0, z1). A regulariser: add it, weighted, to another loss."""

    positive_mask: Tensor | None

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        positive_mask: Tensor | None = None,
        reduction: str = "mean",
        group: ProcessGroup | None = None,
        exchange: str = "gather",
    ) -> None:
        super().__init__(group, exchange)
        self.temperature = temperature
        self.register_buffer("positive_mask", positive_mask, persistent=False)
        self.reduction = validation.option("reduction", reduction, validation.REDUCTIONS)

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        return dimcl_loss(
            z0,
            z1,
            temperature=self.temperature,
            positive_mask=self.positive_mask,
            reduction=self.reduction,
            group=self.group,
            exchange=self.exchange,
        )

    def extra_repr(self) -> str:
        return f"temperature={shown(self.temperature)}, reduction={self.reduction!r}{self.shown_group()}"
