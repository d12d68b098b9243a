"""Decoupled contrastive learning (DCL) and its weighted form (DCLW)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validation
from ..distributed import ProcessGroup, Ranks, engine, gather, join, total
from ..problem import Contrast
from ._common import (
    Grouped,
    inverse,
    log_add,
    log_add_any,
    loss_function,
    nothing,
    reduced,
    shown,
    unit_rows,
    warn_if_alone,
    wide,
)
from ._valid import among_valid, rows_of_all, zero_unless


@loss_function
def dcl_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    sigma: float | Tensor | None = None,
    valid: Tensor | None = None,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    exchange: str = "gather",
) -> Tensor:
    r"""DCL: NT-Xent whose denominator holds no positive, one way (the anchors are the rows of z0).

    .. math::
        \ell_i = \log \sum_{j \ne i} \Big( e^{x_i \cdot x_j / \tau} + e^{x_i \cdot y_j / \tau} \Big)
                 - w_i\, x_i \cdot y_i / \tau, \qquad x = z_0,\; y = z_1

    with :math:`w_i = 1` (DCL), or with `sigma`
    :math:`w_i = 2 - N\, \mathrm{softmax}_i(x_i \cdot y_i / \sigma)` (DCLW). The weight is differentiated, as
    in the authors' code.

    Args:
        z0, z1: two views of a batch, [N, D], float16, bfloat16, float32 or float64; used as they come, not
            normalised.
        temperature: :math:`\tau > 0`, a float or a tensor of one element, which gets its gradient.
        sigma: :math:`\sigma > 0` of DCLW, likewise; None for DCL.
        valid: bool [N], False for pairs that are padding: they are in no denominator, nor among the N of
            DCLW, their loss and gradient are 0 whatever stands in them, and the mean does not count them.
            None: all count.
        reduction: "mean" over the N anchors, "sum", or "none": [N].
        group, exchange: the processes over whose rows the loss is taken, a `torch.distributed.ProcessGroup`,
            and how keys travel, "gather" or "ring" (docs/distributed.md); None: this process alone.

    Returns:
        The loss in float32 (float64 for float64 inputs). One pair alone has no negatives: 0.

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape, device or value; the message names it.

    With P the softmax of anchor i over its 2(N - 1) negatives and
    :math:`G_{ij} = g_i (P_{ij} - w_i [j = i'])`, i' the other view: dx, dy and :math:`d\tau` as for NT-Xent,
    and for DCLW through the weights besides.

    Example:
        >>> import torch, cl_kernels as clk
        >>> z0, z1 = (torch.nn.functional.normalize(torch.randn(8, 16)) for _ in range(2))
        >>> loss = clk.dcl_loss(z0.requires_grad_(), z1, sigma=0.5) + clk.dcl_loss(z1, z0, sigma=0.5)
        >>> loss.backward()

    Source: Yeh et al., "Decoupled Contrastive Learning", 2021.
    """
    z0, z1 = validation.pair("z0", z0, "z1", z1)
    tau = validation.temperature("temperature", temperature, z0)
    width = None if sigma is None else validation.temperature("sigma", sigma, z0)
    validation.option("reduction", reduction, validation.REDUCTIONS)

    valid = validation.valid_rows(valid, z0.shape[0], z0)
    ranks = join(
        group, exchange, z0, "dcl_loss", z1=z1, temperature=tau, sigma=width, valid=validation.kind(valid),
        reduction=reduction,
    )  # fmt: skip
    z0, z1 = zero_unless(valid, z0), zero_unless(valid, z1)
    n = total(z0.shape[0], ranks)
    scale = inverse(tau, z0)
    own = torch.arange(z0.shape[0], device=z0.device)
    pairs = Contrast(z0, z1, scale, exclude=0, positive_index=own)
    cross = engine.contrastive(among_valid(valid, pairs), ranks)
    positive = cross.positive_sum
    if width is not None:
        ratio = wide(tau, z0) / wide(width, z0)
        positive = positive * (2.0 - _scaled_softmax(positive * ratio, valid, ranks))
    if n == 1:
        warn_if_alone(n)
        return reduced(nothing(positive), reduction, z0)
    within = engine.contrastive(among_valid(valid, Contrast(z0, None, scale, exclude=0)), ranks)
    if valid is None:
        return reduced(log_add(within.lse, cross.lse) - positive, reduction, z0, ranks=ranks)
    lse = log_add_any(within.lse, cross.lse)
    rows = zero_unless(valid & (lse != -torch.inf), lse - positive)
    return reduced(rows, reduction, z0, valid, ranks)


def _scaled_softmax(x: Tensor, valid: Tensor | None, ranks: Ranks | None) -> Tensor:
    """The softmax over the valid elements of all ranks, times their number."""
    n: int | Tensor = total(x.shape[0], ranks)
    if valid is not None:
        n = rows_of_all(valid, ranks).sum()
        x = x.masked_fill(~valid, torch.finfo(x.dtype).min)
    if ranks is None:
        return n * torch.softmax(x, 0)
    return n * (x - gather(x, ranks.sizes, ranks.group).logsumexp(0)).exp()


class DCLLoss(Grouped):
    """`dcl_loss` as a module: forward(out0, out1, valid=None).

    `normalize=True, symmetric=True` is the loss of lightly's DCLLoss: rows divided by their norms, and the
    mean of both ways.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        sigma: float | Tensor | None = None,
        *,
        normalize: bool = False,
        symmetric: bool = False,
        reduction: str = "mean",
        group: ProcessGroup | None = None,
        exchange: str = "gather",
    ) -> None:
        super().__init__(group, exchange)
        self.temperature = temperature
        self.sigma = sigma
        self.normalize = validation.flag("normalize", normalize)
        self.symmetric = validation.flag("symmetric", symmetric)
        self.reduction = validation.option("reduction", reduction, validation.REDUCTIONS)

    def forward(self, out0: Tensor, out1: Tensor, valid: Tensor | None = None) -> Tensor:
        validation.features("out0", out0)
        validation.features("out1", out1)
        if self.normalize:
            valid = validation.valid_rows(valid, out0.shape[0], out0)
            out0, out1 = unit_rows(zero_unless(valid, out0)), unit_rows(zero_unless(valid, out1))
        loss = self._one_way(out0, out1, valid)
        return 0.5 * (loss + self._one_way(out1, out0, valid)) if self.symmetric else loss

    def _one_way(self, out0: Tensor, out1: Tensor, valid: Tensor | None) -> Tensor:
        return dcl_loss(
            out0,
            out1,
            temperature=self.temperature,
            sigma=self.sigma,
            valid=valid,
            reduction=self.reduction,
            group=self.group,
            exchange=self.exchange,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={shown(self.temperature)}, sigma={shown(self.sigma)}, normalize={self.normalize}, "
            f"symmetric={self.symmetric}, reduction={self.reduction!r}{self.shown_group()}"
        )
