"""The multi-positive contrastive loss of StableRep: several images a caption."""

from __future__ import annotations

from torch import Tensor

from .. import validation
from ..distributed import ProcessGroup, join
from ._common import Grouped, inverse, loss_function, reduced, shown, unit_rows
from ._views import Anchors, outside_rows


@loss_function
def stablerep_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    exchange: str = "gather",
) -> Tensor:
    r"""Cross-entropy of each image's similarities to the others against those of its own caption.

    With :math:`S_{ij} = z_i \cdot z_j / \tau` over rows brought to unit length, and P(i) the other images of
    the caption of image i:

    .. math:: \ell_i = -\sum_{j \ne i} p_{ij} \log \frac{e^{S_{ij}}}{\sum_{k \ne i} e^{S_{ik}}}, \qquad
        p_{ij} = \frac{[j \in P(i)]}{|P(i)|}

    Args:
        features: [N, D], float16, bfloat16, float32 or float64; a zero row stays zero and gets no gradient.
        labels: [N] or [N, 1], integers, booleans or floats: images of equal label are of one caption.
        temperature: :math:`\tau > 0`, a float or a tensor of one element, which gets its gradient.
        reduction: "mean" over the images, "sum", or "none": [N].
        group, exchange: the processes over whose rows the loss is taken, a `torch.distributed.ProcessGroup`,
            and how keys travel, "gather" or "ring" (docs/distributed.md); None: this process alone.

    Returns:
        The loss in float32 (float64 for float64 inputs). An image alone with its caption has loss and
        gradient 0, and counts in the mean.

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape, device or value; the message names it.

    With P the softmax over the others and :math:`G_{ij} = g_i (P_{ij} - p_{ij})`, the unit rows get
    :math:`(G + G^\top) z / \tau`, and the temperature :math:`-\sum_{ij} G_{ij}\, z_i \cdot z_j / \tau^2`.

    Example:
        >>> import torch, cl_kernels as clk
        >>> images = torch.randn(6, 16, requires_grad=True)
        >>> captions = torch.tensor([0, 0, 0, 1, 1, 1])  # three images each
        >>> clk.stablerep_loss(images, captions, temperature=0.1).backward()
        >>> images.grad.shape
        torch.Size([6, 16])

    Source: Tian et al., "StableRep: Synthetic Images from Text-to-Image Models Make Strong Visual
    Representation Learners", 2023, multi-positive contrastive pre-training.
    """
    validation.features("features", features)
    n = features.shape[0]
    labels = validation.labels("labels", labels, n)
    validation.same_device(features=features, labels=labels)
    tau = validation.temperature("temperature", temperature, features)
    validation.option("reduction", reduction, validation.REDUCTIONS)
    ranks = join(
        group,
        exchange,
        features,
        "stablerep_loss",
        labels=validation.kind(labels),
        temperature=tau,
        reduction=reduction,
    )
    loss, _ = outside_rows(Anchors(unit_rows(features), n, n, inverse(tau, features), labels, ranks=ranks))
    return reduced(loss, reduction, features, ranks=ranks)


class StableRepLoss(Grouped):
    """`stablerep_loss` as a module: forward(features, labels)."""

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        reduction: str = "mean",
        group: ProcessGroup | None = None,
        exchange: str = "gather",
    ) -> None:
        super().__init__(group, exchange)
        self.temperature = temperature
        self.reduction = validation.option("reduction", reduction, validation.REDUCTIONS)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return stablerep_loss(
            features,
            labels,
            temperature=self.temperature,
            reduction=self.reduction,
            group=self.group,
            exchange=self.exchange,
        )

    def extra_repr(self) -> str:
        return f"temperature={shown(self.temperature)}, reduction={self.reduction!r}{self.shown_group()}"
