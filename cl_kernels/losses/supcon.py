"""Supervised contrastive learning (SupCon), and with two views and no labels SimCLR."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import autograd, dispatch, dtypes, ops, reference, validation
from ..distributed import ProcessGroup, Ranks, gather, join, rows_of, total
from ..problem import Contrast
from ._common import Grouped, at_least_zero, inverse, loss_function, shown, warn_if_alone
from ._views import (
    Memory,
    anchor_rows,
    other_columns,
    outside_rows,
    reduce_anchors,
    statistics,
    view_major,
    warn_without_negatives,
    with_samples,
)

if TYPE_CHECKING:
    from ..queue import KeyQueue

CONTRAST_MODES = ("all", "one")
SUMMATIONS = ("out", "in")
DENOMINATORS = ("all", "one_positive", "only_negatives")
NO_POSITIVE = ("zero", "drop")
CHUNK_LOGITS = 2**22


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

    The rows of a memory are further rows j and p of every anchor, without being anchors themselves.

    Args:
        features: [B, V, D], further dimensions are flattened; float16, bfloat16, float32 or float64; used as
            they come, not normalised.
        labels: [B] or [B, 1], integers, booleans or floats: samples of equal label (by ==) are positives. A
            NaN equals nothing: such a sample has no positives, not even its own other views.
        mask: [B, B], bool, integer or float weights, not necessarily symmetric: sample j is a positive of
            sample i where it is not 0; "in" wants no negative ones. An anchor whose weights sum to less than
            1e-6 is not divided by their sum (as in SupContrast). Without labels and mask the other views of a
            sample are its positives (SimCLR).
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
        reduction: "mean" over the anchors, "sum", or "none": [VB] or, for "one", [B].
        group, exchange: the processes over whose rows the loss is taken, a `torch.distributed.ProcessGroup`,
            and how keys travel, "gather" or "ring" (docs/distributed.md); None: this process alone.

    Returns:
        The loss in float32 (float64 for float64 inputs). An anchor without positives, or with nothing in its
        denominator, has loss and gradient 0.

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape, device or value; the message names it.
        BackendError: if a backend is asked for by name and a rare option runs on the reference only.

    Gradients, for "out" with :math:`W_{ij} = w_{ij} / |P(i)|`, for "in" with
    :math:`W_{ij} = w_{ij} e^{S_{ij}} / \sum_p w_{ip} e^{S_{ip}}`, where Den(i) does not depend on the
    positive:

    ============  ==================================================================================
    input         gradient
    ============  ==================================================================================
    logits        :math:`G_{ij} = g_i \tau / \tau_0\, (\mathrm{softmax}_{Den(i)}(S_i)_j - W_{ij})`
    features      :math:`dz = (G + G^\top) z / \tau`, and :math:`G m / \tau` for keys m of the memory
    memory        :math:`dm = G^\top z / \tau`
    temperature   :math:`\sum_i g_i \ell_i / \tau - \sum_{ij} G_{ij} S_{ij} / \tau`
    ============  ==================================================================================

    The compiled kernels run "out" with denominator "all", and with labels (or without a mask) both summations
    with "all" and "only_negatives"; the other combinations walk the anchors in chunks of the reference, in
    bounded memory; over a group they gather under either exchange.

    Example:
        >>> import torch, cl_kernels as clk
        >>> features = torch.nn.functional.normalize(torch.randn(8, 2, 16), dim=2)  # 8 samples, 2 views
        >>> labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
        >>> clk.supcon_loss(features.requires_grad_(), labels, temperature=0.1).backward()
        >>> clk.supcon_loss(features, reduction="none").shape  # SimCLR, a loss an anchor
        torch.Size([16])

    Source: Khosla et al., "Supervised Contrastive Learning", 2020, equations 2 and 3.
    """
    x = validation.views("features", features)
    batch, views = x.shape[:2]
    validation.not_both("memory", memory, "positives_cap", positives_cap)
    x, labels, stored = validation.memory(memory, x, labels, mask)
    ranks = join(
        group, exchange, x, "supcon_loss", batch, labels=validation.kind(labels), mask=validation.kind(mask),
        temperature=temperature, base_temperature=base_temperature, views=views, contrast_mode=contrast_mode,
        summation=summation, denominator=denominator, positives_cap=positives_cap, no_positive=no_positive,
        reduction=reduction, rows_of_memory=rows_of(stored and stored[0]),
    )  # fmt: skip
    labels, mask = validation.supervision(labels, mask, batch, x, total(batch, ranks))
    kept = validation.positives_cap("positives_cap", positives_cap, views)
    tau = validation.temperature("temperature", temperature, x)
    base = validation.temperature("base_temperature", base_temperature, x)
    validation.option("contrast_mode", contrast_mode, CONTRAST_MODES)
    validation.option("summation", summation, SUMMATIONS)
    validation.option("denominator", denominator, DENOMINATORS)
    validation.option("no_positive", no_positive, NO_POSITIVE)
    validation.option("reduction", reduction, validation.REDUCTIONS)

    rows = view_major(x)
    anchors = rows.shape[0] if contrast_mode == "all" else batch
    scale = inverse(tau, x)
    if stored is not None:
        stored = _unchanging(*stored)
    if labels is None and mask is None:
        kept = None
        if views == 2 and denominator != "only_negatives":
            summation, denominator = "out", "all"
    count: Tensor | None
    by_labels = mask is None and denominator != "one_positive"
    if kept is not None or not (by_labels or (summation, denominator) == ("out", "all")):
        loss, count = _chunked_rows(
            x,
            anchors,
            scale,
            labels,
            mask,
            ranks,
            stored,
            summation=summation,
            denominator=denominator,
            kept_samples=kept,
        )
    elif summation == "out":
        among = "different" if denominator == "only_negatives" else "all"
        problem = anchor_rows(rows, anchors, scale)
        loss, count = outside_rows(problem, batch, labels, mask, among, ranks, stored)
    else:
        problem = anchor_rows(rows, anchors, scale)
        loss, count = _inside_rows(problem, batch, labels, denominator, ranks, stored)
    return reduce_anchors(loss, count, tau, base, no_positive, reduction, x, ranks)


def _unchanging(keys: Tensor, labels: Tensor) -> Memory:
    """Copies of frozen keys and their labels, which the backward reads: a queue may have changed by then."""
    if torch.is_grad_enabled() and not keys.requires_grad:
        return ops.snapshot(keys), ops.snapshot(labels)
    return keys, labels


def _inside_rows(
    problem: Contrast,
    batch: int,
    labels: Tensor | None,
    denominator: str,
    ranks: Ranks | None,
    memory: Memory | None,
) -> tuple[Tensor, Tensor]:
    """The "in" loss of each anchor by class labels, unscaled, and the number of its positives.

    With p and n the logarithms of the sums over positives and over negatives, -log(e^p / (e^p + e^n)) is
    -log_sigmoid(p - n): nothing cancels in a converged model, as the whole denominator and p would.
    """
    problem = with_samples(problem, batch, labels, "same", ranks)
    positives = statistics(problem, ranks, memory)
    others = problem._replace(among="different", label_positives=False)
    negatives = statistics(others, ranks, memory).lse
    count = positives.positive_count
    alone = (positives.lse == -torch.inf) & ~negatives.isnan()
    margin = (positives.lse - negatives).masked_fill(alone, 0.0)
    if denominator == "all":
        warn_if_alone(other_columns(problem, ranks, memory))
        loss = count.log() - F.logsigmoid(margin)
    else:
        warn_without_negatives((negatives == -torch.inf)[:, None])
        loss = count.log() - margin
        alone = alone | ((negatives == -torch.inf) & ~positives.lse.isnan())
    return loss.masked_fill(alone, 0.0), count


def _chunked_rows(
    features: Tensor,
    anchors: int,
    scale: float | Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    ranks: Ranks | None,
    memory: Memory | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`reference.supcon_rows` of chunks of the anchors, recomputed in the backward: memory stays bounded."""
    dispatch.require_engine(
        "supcon_loss with positives_cap, denominator='one_positive', or a mask beside 'out' and 'all'"
    )
    features = features.to(dtypes.accumulate_dtype(features.dtype))
    batch, before = features.shape[0], 0
    if ranks is None:
        keys = view_major(features)
        queries = keys[:anchors]
    else:  # the reference's keys are view-major over the samples of all
        before = ranks.first
        keys = view_major(gather(features, ranks.sizes, ranks.group))
        queries = view_major(features)[:anchors]
        labels = None if labels is None else gather(labels, ranks.sizes, ranks.group)
    samples = keys.shape[0] // features.shape[1]
    memory_labels = None
    if memory is not None:
        keys, memory_labels = torch.cat([keys, memory[0].to(keys)]), memory[1]
    warn_if_alone(keys.shape[0] - 1)
    if options["denominator"] == "only_negatives" and labels is not None:
        warn_without_negatives((labels == labels[:1])[None])
    elif options["denominator"] == "only_negatives" and mask is not None:
        warn_without_negatives(mask != 0)
    step = max(1, CHUNK_LOGITS // keys.shape[0])
    tensors = (queries, keys, scale, labels, mask, memory_labels)

    def chunk(
        first: int, queries: Tensor, keys: Tensor, scale: Any, labels: Any, mask: Any, memory_labels: Any
    ) -> tuple[Tensor, Tensor]:
        own = torch.arange(first, min(first + step, anchors), device=keys.device)
        # By an op: what a compiled graph traces is multiplied in bfloat16 under autocast, in its backward.
        logits = autograd.similarity(queries[first : first + own.shape[0]], keys, scale, normalize=False)
        if ranks is not None:
            own = own // batch * samples + own % batch + before
        return reference.supcon_rows_of(
            logits,
            own,
            samples,
            labels=labels,
            mask=mask,
            memory_labels=memory_labels,
            before=before,
            **options,
        )

    if step >= anchors:
        loss, count = chunk(0, *tensors)
    else:
        again: Callable[..., tuple[Tensor, ...]] = autograd.recomputed
        if torch.compiler.is_compiling() or not autograd.in_transform():
            again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        parts = [again(chunk, first, *tensors) for first in range(0, anchors, step)]
        loss, count = (torch.cat(part) for part in zip(*parts, strict=True))
    if options["denominator"] != "only_negatives":
        loss = at_least_zero(loss, mask)
    return loss, count


class SupConLoss(Grouped):
    """`supcon_loss` as a module, with the constructor and the forward of SupContrast's SupConLoss; memory is
    an argument of the forward."""

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
