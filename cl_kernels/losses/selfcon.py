"""Self-contrastive learning (SelfCon): the exits of one network as views."""

from __future__ import annotations

from torch import Tensor

from .. import validation
from ..distributed import ProcessGroup, join, total
from ._common import Grouped, inverse, loss_function, shown
from ._valid import weights_of_valid, zero_unless
from ._views import Anchors, outside_rows, reduce_anchors, view_major
from .supcon import CONTRAST_MODES, NO_POSITIVE

ANCHORS = ("all", "exits", "first")


@loss_function
def selfcon_loss(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    base_temperature: float | Tensor = 0.07,
    anchors: str = "all",
    augmentations: int = 1,
    no_positive: str = "zero",
    valid: Tensor | None = None,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    exchange: str = "gather",
) -> Tensor:
    r"""Supervised contrastive loss over the exits of one network, optionally over several augmentations too.

    Row r of the view-major features belongs to sample r mod B. With the positives P(i) of anchor i the other
    rows of its class (without labels, of its sample) and weights w (1 but for a mask):

    .. math::
        \ell_i = \frac{\tau}{\tau_0} \sum_{p \in P(i)} \frac{w_{ip}}{|P(i)|}
            \Big( \log \sum_{j \ne i} e^{z_i \cdot z_j / \tau} - z_i \cdot z_p / \tau \Big)

    Args:
        features: [A*B, E + 1, D], further dimensions are flattened: A augmentations of B samples, one after
            the other, seen by E sub-network exits and last by the backbone; float16, bfloat16, float32 or
            float64; used as they come, not normalised.
        labels: [B] or [B, 1], integers, booleans or floats compared by ==: as for `supcon_loss`.
        mask: [B, B], bool, integer or float weights: sample j is a positive of sample i where it is not 0.
        temperature, base_temperature: :math:`\tau, \tau_0 > 0`, floats or tensors of one element, which get
            their gradients.
        anchors: "all" rows; "exits": the rows of the sub-network exits only; "first": the rows of the first
            view.
        augmentations: A.
        no_positive: whether anchors without positives count in the mean, as 0 ("zero"), or not ("drop").
        valid: bool [B], False for samples that are padding, as for `supcon_loss`.
        reduction: "mean" over the anchors, "sum", or "none": [anchors], view-major.
        group, exchange: the processes over whose rows the loss is taken, a `torch.distributed.ProcessGroup`,
            and how keys travel, "gather" or "ring" (docs/distributed.md); None: this process alone.

    Returns:
        The loss in float32 (float64 for float64 inputs). An anchor without positives has loss and gradient 0.

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape, device or value; the message names it.

    Gradients: those of `supcon_loss` with summation "out" and denominator "all".

    Example:
        >>> import torch, cl_kernels as clk
        >>> features = torch.nn.functional.normalize(torch.randn(8, 3, 16), dim=2)  # two exits, the backbone
        >>> labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
        >>> clk.selfcon_loss(features.requires_grad_(), labels, anchors="exits").backward()

    Source: Bae et al., "Self-Contrastive Learning: Single-Viewed Supervised Contrastive Framework Using
    Sub-network", 2023.
    """
    x = validation.views("features", features)
    validation.integer("augmentations", augmentations, minimum=1)
    batch = validation.split("features", x, augmentations)
    ranks = join(
        group, exchange, x, "selfcon_loss", batch, labels=validation.kind(labels), mask=validation.kind(mask),
        temperature=temperature, base_temperature=base_temperature, views=x.shape[1], anchors=anchors,
        augmentations=augmentations, no_positive=no_positive, valid=validation.kind(valid),
        reduction=reduction,
    )  # fmt: skip
    labels, mask = validation.supervision(labels, mask, batch, x, total(batch, ranks))
    valid = validation.valid_rows(valid, batch, x)
    tau = validation.temperature("temperature", temperature, x)
    base = validation.temperature("base_temperature", base_temperature, x)
    validation.option("anchors", anchors, ANCHORS)
    if anchors == "exits" and x.shape[1] == 1:
        raise ValueError("features must have a view besides the backbone with anchors='exits', got 1")
    validation.option("no_positive", no_positive, NO_POSITIVE)
    validation.option("reduction", reduction, validation.REDUCTIONS)

    views = {"all": x.shape[1], "exits": x.shape[1] - 1, "first": 1}[anchors]
    rows = view_major(x if valid is None else zero_unless(valid.repeat(augmentations), x))
    mask = weights_of_valid(mask, valid, ranks, square=True)
    given = Anchors(rows, views * x.shape[0], batch, inverse(tau, x), labels, mask, ranks, valid=valid)
    loss, count = outside_rows(given)
    return reduce_anchors(given, loss, count, tau, base, no_positive, reduction)


class SelfConLoss(Grouped):
    """`selfcon_loss` as a module, with the constructor and the forward of the authors' ConLoss.

    `supcon_s` leaves anchors without positives out of the mean; `selfcon_s_FG` and `selfcon_m_FG` take the
    sub-network exits as anchors, the latter with two augmentations. `anchors`, `augmentations` and
    `no_positive` set the same for every call.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        contrast_mode: str = "all",
        base_temperature: float | Tensor = 0.07,
        *,
        anchors: str | None = None,
        augmentations: int = 1,
        no_positive: str = "zero",
        reduction: str = "mean",
        group: ProcessGroup | None = None,
        exchange: str = "gather",
    ) -> None:
        super().__init__(group, exchange)
        self.temperature = temperature
        self.contrast_mode = validation.option("contrast_mode", contrast_mode, CONTRAST_MODES)
        self.base_temperature = base_temperature
        if anchors is None:
            anchors = "first" if contrast_mode == "one" else "all"
        elif contrast_mode == "one":
            raise ValueError(f'anchors must not be given with contrast_mode="one", got {anchors!r}')
        self.anchors = validation.option("anchors", anchors, ANCHORS)
        self.augmentations = validation.integer("augmentations", augmentations, minimum=1)
        self.no_positive = validation.option("no_positive", no_positive, NO_POSITIVE)
        self.reduction = validation.option("reduction", reduction, validation.REDUCTIONS)

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        supcon_s: bool = False,
        selfcon_s_FG: bool = False,
        selfcon_m_FG: bool = False,
        valid: Tensor | None = None,
    ) -> Tensor:
        if selfcon_s_FG and selfcon_m_FG:
            raise ValueError("selfcon_s_FG and selfcon_m_FG must not be given together, got both")
        return selfcon_loss(
            features,
            labels,
            mask,
            temperature=self.temperature,
            base_temperature=self.base_temperature,
            anchors="exits" if selfcon_s_FG or selfcon_m_FG else self.anchors,
            augmentations=2 if selfcon_m_FG else self.augmentations,
            no_positive="drop" if supcon_s else self.no_positive,
            valid=valid,
            reduction=self.reduction,
            group=self.group,
            exchange=self.exchange,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={shown(self.temperature)}, base_temperature={shown(self.base_temperature)}, "
            f"anchors={self.anchors!r}, augmentations={self.augmentations}, "
            f"no_positive={self.no_positive!r}, reduction={self.reduction!r}{self.shown_group()}"
        )
