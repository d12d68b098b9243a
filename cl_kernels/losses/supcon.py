"""Supervised contrastive learning (SupCon), and with two views and no labels SimCLR."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, validation
from ..distributed import ProcessGroup, join, rows_of, total
from ._common import Grouped, inverse, loss_function, shown, warn_if_alone
from ._masks import mask_rows
from ._pairs import pair_rows
from ._valid import weights_of_valid, zero_unless
from ._views import (
    Anchors,
    Keys,
    loss_of_samples,
    outside_loss,
    reduce_anchors,
    statistics,
    view_major,
    warn_without_negatives,
    with_positives,
    without,
)

if TYPE_CHECKING:
    from ..queue import KeyQueue

CONTRAST_MODES = ("all", "one")
SUMMATIONS = ("out", "in")
DENOMINATORS = ("all", "one_positive", "only_negatives")
NO_POSITIVE = ("zero", "drop")
Rows = tuple[Tensor, Tensor]  # losses, and weights of positives


@loss_function
def supcon_loss(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    base_temperature: float | Tensor = 0.07,
    contrast_mode: str = "all",
    summation: str = "out",
    denominator: str = "all",
    positives_cap: int | None = None,
    no_positive: str = "zero",
    memory: KeyQueue | tuple[Tensor, Tensor] | None = None,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    valid: Tensor | None = None,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    exchange: str = "gather",
) -> Tensor:
    r"""Supervised contrastive loss over the views of a batch.

    The rows are view-major: row vB + b is view v of sample b. With :math:`S_{ij} = z_i \cdot z_j / \tau`,
    P(i) the other rows of anchor i's class with weights w (1 for labels) and Den(i) its denominator:

    .. math::
        \text{out:}\quad \ell_i &= \frac{\tau}{\tau_0} \sum_{p \in P(i)} \frac{w_{ip}}{|P(i)|}
            \Big( \log \sum_{j \in Den(i)} e^{S_{ij}} - S_{ip} \Big), \qquad |P(i)| = \sum_p w_{ip} \\
        \text{in:}\quad \ell_i &= -\frac{\tau}{\tau_0} \log \frac{1}{|P(i)|} \sum_{p \in P(i)} w_{ip}
            \frac{e^{S_{ip}}}{\sum_{j \in Den(i)} e^{S_{ij}}}

    The rows of a memory are further rows j and p of every anchor, without being anchors themselves. Keys of
    their own are the only ones, and no anchor is among them: P(i) are the keys of label :math:`y_i`, Den(i)
    with "all" is every key.

    Args:
        features: [B, V, D], further dimensions are flattened; float16, bfloat16, float32 or float64; used as
            they come, not normalised.
        labels: [B] or [B, 1], integers, booleans or floats: samples of equal label (by ==) are positives. A
            NaN equals nothing: such a sample has no positives, not even its own other views.
        mask: [B, B], with keys [B, M], bool, integer or float weights, not necessarily symmetric: sample j is
            a positive of sample i where it is not 0; "in" wants no negative ones. An anchor whose weights sum
            to less than 1e-6 is not divided by their sum (as in SupContrast). Without labels and mask the
            other views of a sample are its positives (SimCLR).
        temperature, base_temperature: :math:`\tau, \tau_0 > 0`, floats or tensors of one element, which get
            their gradients.
        contrast_mode: "all": every row is an anchor; "one": those of view 0.
        summation: "out" (equation 2, what the paper recommends) or "in" (equation 3).
        denominator: "all": every row but the anchor; "one_positive": :math:`e^{S_{ip}}` of the positive at
            hand and the negatives; "only_negatives".
        positives_cap: a multiple of V: of an anchor's positives, keep the other views of its sample and those
            of the first positives_cap / V other samples (by index; for a float mask by descending weight);
            the others also leave the denominator. None keeps all.
        no_positive: whether anchors without positives count in the mean, as 0 ("zero"), or not ("drop").
        memory: earlier keys with their labels, a `KeyQueue` with labels or a pair of keys [K, D] and labels
            [K]; the keys get a gradient if they require one, else they may be changed in place before the
            backward. Only with labels and without positives_cap; over a group the same on every rank.
        keys, key_labels: what the anchors are contrasted with in place of each other, [M, D], and its labels
            [M] or [M, 1], compared with `labels`; in place of both labels a mask [B, M]. The keys get a
            gradient if they require one, else they may be changed in place before the backward. Without
            memory and positives_cap. Over a group each rank has keys, and anchors meet those of all ranks.
        valid: bool [B], False for samples that are padding: they are no anchors, no positives and in no
            denominator, and the mean does not count them. Their loss and gradient are 0 whatever stands in
            their features, labels and mask. None: all count.
        reduction: "mean" over the anchors, "sum", or "none": [VB] or, for "one", [B].
        group, exchange: the processes over whose rows the loss is taken, a `torch.distributed.ProcessGroup`,
            and how keys travel, "gather" or "ring" (docs/distributed.md); None: this process alone.

    Returns:
        The loss in float32 (float64 for float64 inputs). An anchor without positives, or with nothing in its
        denominator, has loss and gradient 0.

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape, device or value; the message names it.

    Gradients, for "out" with :math:`W_{ij} = w_{ij} / |P(i)|`, for "in" with
    :math:`W_{ij} = w_{ij} e^{S_{ij}} / \sum_p w_{ip} e^{S_{ip}}`, where Den(i) does not depend on the
    positive:

    ============  ==================================================================================
    input         gradient
    ============  ==================================================================================
    logits        :math:`G_{ij} = g_i \tau / \tau_0\, (\mathrm{softmax}_{Den(i)}(S_i)_j - W_{ij})`
    features      :math:`dz = (G + G^\top) z / \tau`, and :math:`G m / \tau` for keys m of the memory or of
                  their own
    memory, keys  :math:`dm = G^\top z / \tau`
    temperature   :math:`\sum_i g_i \ell_i / \tau - \sum_{ij} G_{ij} S_{ij} / \tau`
    ============  ==================================================================================

    The engine gives the log-sum-exps. For "one_positive" and a cap by label they are those over negatives,
    and the logits of positive pairs are taken besides, in blocks of classes. A mask with "one_positive", on
    GPUs a mask with anything but "out" and "all", walks whole rows of similarities in chunks. Pairs and rows
    are computed again in the backward, in bounded memory, and gathered under either exchange.

    Example:
        >>> import torch, cl_kernels as clk
        >>> features = torch.nn.functional.normalize(torch.randn(8, 2, 16), dim=2)  # 8 samples, 2 views
        >>> labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
        >>> clk.supcon_loss(features.requires_grad_(), labels, temperature=0.1).backward()
        >>> clk.supcon_loss(features, reduction="none").shape  # SimCLR, a loss an anchor
        torch.Size([16])
        >>> keys = torch.nn.functional.normalize(torch.randn(32, 16))
        >>> clk.supcon_loss(features, labels, keys=keys, key_labels=torch.arange(32) % 4).shape
        torch.Size([])

    Source: Khosla et al., "Supervised Contrastive Learning", 2020, equations 2 and 3.
    """
    x = validation.views("features", features)
    batch, views = x.shape[:2]
    validation.not_both("memory", memory, "positives_cap", positives_cap)
    validation.not_both("keys", keys, "positives_cap", positives_cap)
    validation.not_both("keys", keys, "memory", memory)
    x, labels, stored = validation.memory(memory, x, labels, mask)
    x, labels, own_keys = validation.own_keys(keys, key_labels, x, labels, mask)
    ranks = join(
        group, exchange, x, "supcon_loss", batch, labels=validation.kind(labels), mask=validation.kind(mask),
        temperature=temperature, base_temperature=base_temperature, views=views, contrast_mode=contrast_mode,
        summation=summation, denominator=denominator, positives_cap=positives_cap, no_positive=no_positive,
        reduction=reduction, rows_of_memory=rows_of(stored and stored[0]), keys=own_keys is not None,
        valid=validation.kind(valid),
    )  # fmt: skip
    columns = total(batch, ranks)
    contrasted = None
    if own_keys is not None:
        key_ranks = None if ranks is None else join(group, exchange, own_keys[0], "keys of supcon_loss")
        columns = total(own_keys[0].shape[0], key_ranks)
        contrasted = Keys(*_unchanging(*own_keys), key_ranks)
    labels, mask = validation.supervision(labels, mask, batch, x, columns)
    valid = validation.valid_rows(valid, batch, x)
    kept = validation.positives_cap("positives_cap", positives_cap, views)
    tau = validation.temperature("temperature", temperature, x)
    base = validation.temperature("base_temperature", base_temperature, x)
    validation.option("contrast_mode", contrast_mode, CONTRAST_MODES)
    validation.option("summation", summation, SUMMATIONS)
    validation.option("denominator", denominator, DENOMINATORS)
    validation.option("no_positive", no_positive, NO_POSITIVE)
    validation.option("reduction", reduction, validation.REDUCTIONS)

    if labels is None and mask is None:
        kept = None
        if views == 2 and denominator != "only_negatives":
            summation, denominator = "out", "all"
    alone = all(x is None for x in (mask, kept, stored, contrasted, valid, ranks))
    if alone and (contrast_mode, summation, denominator) == ("all", "out", "all"):
        whole = loss_of_samples(x, labels, tau, base, no_positive, reduction)
        if whole is not None:
            return whole
    rows = view_major(zero_unless(valid, x))
    given = Anchors(
        rows,
        rows.shape[0] if contrast_mode == "all" else batch,
        batch,
        inverse(tau, x),
        labels,
        weights_of_valid(mask, valid, ranks, square=keys is None),
        ranks,
        memory=stored and _unchanging(*stored),
        keys=contrasted,
        valid=valid,
    )
    count: Tensor | None
    if mask is None and (kept is not None or denominator == "one_positive"):
        loss, count = pair_rows(given, kept, summation, denominator)
    elif given.mask is not None and (kept is not None or (summation, denominator) != ("out", "all")):
        loss, count = mask_rows(given, given.mask, kept, summation, denominator)
    elif summation == "out":
        among = "different" if denominator == "only_negatives" else "all"
        return outside_loss(given, among, tau, base, no_positive, reduction)
    else:
        loss, count = _inside_rows(given, denominator)
    return reduce_anchors(given, loss, count, tau, base, no_positive, reduction)


def _unchanging(keys: Tensor, labels: Any) -> tuple[Tensor, Any]:
    """Copies of frozen keys and their labels, which the backward reads: a queue may have changed by then."""
    if torch.is_grad_enabled() and not keys.requires_grad:
        return ops.snapshot(keys), None if labels is None else ops.snapshot(labels)
    return keys, labels


def _inside_rows(given: Anchors, denominator: str) -> tuple[Tensor, Tensor]:
    """The "in" loss of each anchor by class labels, unscaled, and the number of its positives.

    With p and n the logarithms of the sums over positives and over negatives, -log(e^p / (e^p + e^n)) is
    -log_sigmoid(p - n): nothing cancels in a converged model, as the whole denominator and p would.
    """
    problem = with_positives(given, "same")
    positives = statistics(given, problem)
    others = problem._replace(among="different", label_positives=False)
    negatives = statistics(given, others).lse
    count = positives.positive_count
    alone = (positives.lse == -torch.inf) & ~negatives.isnan()
    margin = (positives.lse - negatives).masked_fill(alone, 0.0)
    if denominator == "all":
        warn_if_alone(given.columns)
        loss = count.log() - F.logsigmoid(margin)
    else:
        warn_without_negatives(without(given, negatives)[:, None])
        loss = count.log() - margin
        alone = alone | ((negatives == -torch.inf) & ~positives.lse.isnan())
    return loss.masked_fill(alone, 0.0), count


class SupConLoss(Grouped):
    """`supcon_loss` as a module, with the constructor and the forward of SupContrast's SupConLoss; memory,
    keys and valid are arguments of the forward."""

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        contrast_mode: str = "all",
        base_temperature: float | Tensor = 0.07,
        *,
        summation: str = "out",
        denominator: str = "all",
        positives_cap: int | None = None,
        no_positive: str = "zero",
        reduction: str = "mean",
        group: ProcessGroup | None = None,
        exchange: str = "gather",
    ) -> None:
        super().__init__(group, exchange)
        self.temperature = temperature
        self.contrast_mode = validation.option("contrast_mode", contrast_mode, CONTRAST_MODES)
        self.base_temperature = base_temperature
        self.summation = validation.option("summation", summation, SUMMATIONS)
        self.denominator = validation.option("denominator", denominator, DENOMINATORS)
        self.positives_cap = positives_cap
        self.no_positive = validation.option("no_positive", no_positive, NO_POSITIVE)
        self.reduction = validation.option("reduction", reduction, validation.REDUCTIONS)

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        memory: KeyQueue | tuple[Tensor, Tensor] | None = None,
        keys: Tensor | None = None,
        key_labels: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        return supcon_loss(
            features,
            labels,
            mask,
            temperature=self.temperature,
            base_temperature=self.base_temperature,
            contrast_mode=self.contrast_mode,
            summation=self.summation,
            denominator=self.denominator,
            positives_cap=self.positives_cap,
            no_positive=self.no_positive,
            memory=memory,
            keys=keys,
            key_labels=key_labels,
            valid=valid,
            reduction=self.reduction,
            group=self.group,
            exchange=self.exchange,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={shown(self.temperature)}, contrast_mode={self.contrast_mode!r}, "
            f"base_temperature={shown(self.base_temperature)}, summation={self.summation!r}, "
            f"denominator={self.denominator!r}, positives_cap={self.positives_cap}, "
            f"no_positive={self.no_positive!r}, reduction={self.reduction!r}{self.shown_group()}"
        )
