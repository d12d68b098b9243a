"""NT-Xent: the normalised temperature-scaled cross-entropy of SimCLR."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validation
from ..distributed import ProcessGroup, engine, join, total
from ..problem import Contrast
from ._common import Grouped, cross_entropy, inverse, loss_function, reduced, shown, unit_rows, whole
from ._valid import among_valid, zero_unless


@loss_function
def nt_xent_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    valid: Tensor | None = None,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    exchange: str = "gather",
) -> Tensor:
    r"""NT-Xent over two views of a batch.

    With the :math:`2N` rows :math:`z = [z_0; z_1]`, each divided by its L2 norm, and :math:`p(i)` the other
    view of row i:

    .. math:: \ell_i = \log \sum_{j \ne i} e^{z_i \cdot z_j / \tau} - z_i \cdot z_{p(i)} / \tau

    Args:
        z0, z1: the two views, [N, D], float16, bfloat16, float32 or float64; normalised inside. A zero row
            has similarity 0 with everything and gets no gradient.
        temperature: :math:`\tau > 0`, a float or a tensor of one element, which gets its gradient.
        valid: bool [N], False for pairs that are padding: they are in no denominator, their loss and gradient
            are 0 whatever stands in them, and the mean does not count them. None: all count.
        reduction: "mean" over the 2N rows, "sum", or "none": [2N], the rows of z0 first.
        group, exchange: the processes over whose rows the loss is taken, a `torch.distributed.ProcessGroup`,
            and how keys travel, "gather" or "ring" (docs/distributed.md); None: this process alone.

    Returns:
        The loss in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape, device or value; the message names it.

    With :math:`G_{ij} = g_i (P_{ij} - [j = p(i)])`, P the softmax of row i without its diagonal:

    ============  =====================================================================
    input         gradient
    ============  =====================================================================
    unit rows     :math:`dz = (G + G^\top) z / \tau`, then through the normalisation
    temperature   :math:`-\sum_{ij} G_{ij}\, z_i \cdot z_j / \tau^2`
    ============  =====================================================================

    Example:
        >>> import torch, cl_kernels as clk
        >>> z0, z1 = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
        >>> clk.nt_xent_loss(z0, z1, temperature=0.5).backward()

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020,
    equation 1.
    """
    z0, z1 = validation.pair("z0", z0, "z1", z1)
    tau = validation.temperature("temperature", temperature, z0)
    validation.option("reduction", reduction, validation.REDUCTIONS)

    n = z0.shape[0]
    valid = validation.valid_rows(valid, n, z0)
    rows_valid = None if valid is None else torch.cat([valid, valid])
    z = zero_unless(rows_valid, torch.cat([z0, z1]))
    ranks = join(
        group, exchange, z, "nt_xent_loss", n, temperature=tau, valid=validation.kind(valid),
        reduction=reduction,
    )  # fmt: skip
    partner = torch.arange(2 * n, device=z.device).roll(n)
    problem = Contrast(z, None, inverse(tau, z), exclude=0, positive_index=partner)
    if valid is None and ranks is None:
        loss = whole(problem, reduction, 2 * n - 1, unit=True)
        if loss is not None:
            return loss
    problem = problem._replace(q=unit_rows(z))
    stats = engine.contrastive(among_valid(rows_valid, problem), ranks)
    loss = cross_entropy(stats.lse, stats.positive_sum, total(2 * n, ranks) - 1)
    return reduced(zero_unless(rows_valid, loss), reduction, z, rows_valid, ranks)


class NTXentLoss(Grouped):
    """`nt_xent_loss` as a module, with the constructor and the forward of lightly's NTXentLoss.

    Negatives come from the batch, or the batches of `group`: `memory_bank_size` other than 0 and
    `gather_distributed` are refused.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int = 0,
        gather_distributed: bool = False,
        *,
        reduction: str = "mean",
        group: ProcessGroup | None = None,
        exchange: str = "gather",
    ) -> None:
        super().__init__(group, exchange)
        if memory_bank_size != 0:
            raise ValueError(
                f"memory_bank_size must be 0, got {memory_bank_size!r}: info_nce_loss takes a queue"
            )
        if gather_distributed:
            raise ValueError(
                f"gather_distributed must be False, got {gather_distributed!r}: give the processes as "
                "group=torch.distributed.group.WORLD"
            )
        self.temperature = temperature
        self.reduction = validation.option("reduction", reduction, validation.REDUCTIONS)

    def forward(self, out0: Tensor, out1: Tensor, valid: Tensor | None = None) -> Tensor:
        return nt_xent_loss(
            out0,
            out1,
            temperature=self.temperature,
            valid=valid,
            reduction=self.reduction,
            group=self.group,
            exchange=self.exchange,
        )

    def extra_repr(self) -> str:
        return f"temperature={shown(self.temperature)}, reduction={self.reduction!r}{self.shown_group()}"
