"""Dimensional contrastive learning (DimCL)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import autograd, dtypes, validation
from ._common import cross_entropy, inverse, reduced, settled, shown


@dtypes.full_precision
def dimcl_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    positive_mask: Tensor | None = None,
    reduction: str = "mean",
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
    validation.minimum_rows("z0", z0, 2)
    if positive_mask is not None:
        validation.boolean_mask("positive_mask", positive_mask, (2 * z0.shape[1], 2 * z0.shape[1]))
        validation.same_device(z0=z0, positive_mask=positive_mask)
    tau = validation.temperature("temperature", temperature, z0)
    validation.option("reduction", reduction, validation.REDUCTIONS)

    lse, positive_sum, positive_count = autograd.dimcl(z0, z1, inverse(tau, z0), positive_mask)
    others = 2 * z0.shape[1] - 1
    if positive_mask is None:
        return reduced(cross_entropy(lse, positive_sum, others), reduction, z0)
    loss = torch.addcdiv(lse, positive_sum, positive_count, value=-1)
    return reduced(settled(loss, others), reduction, z0)


class DimCLLoss(nn.Module):
    """`dimcl_loss` as a module: forward(z0, z1). A regulariser: add it, weighted, to another loss."""

    positive_mask: Tensor | None

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        positive_mask: Tensor | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.register_buffer("positive_mask", positive_mask, persistent=False)
        self.reduction = validation.option("reduction", reduction, validation.REDUCTIONS)

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        return dimcl_loss(
            z0, z1, temperature=self.temperature, positive_mask=self.positive_mask, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        return f"temperature={shown(self.temperature)}, reduction={self.reduction!r}"
