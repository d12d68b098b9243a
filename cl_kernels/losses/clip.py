"""The symmetric image-text loss of CLIP."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validation
from ..autograd import ContrastiveStats
from ..distributed import ProcessGroup, Ranks, engine, join, total
from ..problem import Contrast
from ._common import (
    Grouped,
    at_least_zero,
    cross_entropy,
    log_add_any,
    loss_function,
    reduced,
    whole,
    wide,
)
from ._valid import among_valid, of_no_label, of_other_labels, zero_unless


@loss_function
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    exchange: str = "gather",
) -> Tensor:
    r"""Mean of the cross-entropies of images over texts and of texts over images.

    With :math:`S_{ij} = s\, x_i \cdot y_j`, pair i on the diagonal:

    .. math:: \ell_i = \frac{1}{2} \Big( \log\sum_j e^{S_{ij}} + \log\sum_j e^{S_{ji}} \Big) - S_{ii}

    With labels the pairs P(i) of the label of pair i are positives alike, on both axes:

    .. math:: \ell_i = \frac{1}{2} \Big( \log\sum_j e^{S_{ij}} + \log\sum_j e^{S_{ji}}
        - \frac{1}{|P(i)|} \sum_{p \in P(i)} (S_{ip} + S_{pi}) \Big)

    Args:
        image_features, text_features: [N, D], float16, bfloat16, float32 or float64; used as they come, not
            normalised.
        logit_scale: s, a float or a tensor of one element (CLIP's `logit_scale.exp()`), which gets its
            gradient.
        labels: [N] or [N, 1], integers, booleans or floats: each image is a positive of every text whose pair
            has the same label (by ==), as where an image is in the batch with several of its captions, or
            pairs are of one class. A pair is always its own positive, also where its label is NaN.
        valid: bool [N], False for pairs that are padding: they are in no denominator and nobody's positive,
            their loss and gradient are 0 whatever stands in them, and the mean does not count them. None: all
            count.
        reduction: "mean" over the pairs, "sum", or "none": [N].
        group, exchange: the processes over whose rows the loss is taken, a `torch.distributed.ProcessGroup`,
            and how keys travel, "gather" or "ring" (docs/distributed.md); None: this process alone.

    Returns:
        The loss in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape, device or value; the message names it.

    With :math:`G_{ij} = (g_i P_{ij} + g_j Q_{ij} - (g_i + g_j) W_{ij}) / 2`, P the softmax over rows of S, Q
    over its columns, and :math:`W_{ij} = [j \in P(i)] / |P(i)|`:

    ==============  ====================================================
    input           gradient
    ==============  ====================================================
    image_features  :math:`s\, G y`
    text_features   :math:`s\, G^\top x`
    logit_scale     :math:`\sum_{ij} G_{ij}\, x_i \cdot y_j`
    ==============  ====================================================

    Example:
        >>> import torch, cl_kernels as clk
        >>> images, texts = (torch.nn.functional.normalize(torch.randn(8, 16)) for _ in range(2))
        >>> log_scale = torch.tensor(2.6, requires_grad=True)
        >>> clk.clip_loss(images, texts, log_scale.exp()).backward()
        >>> image_of_pair = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4])  # several captions of one image
        >>> clk.clip_loss(images, texts, log_scale.exp(), labels=image_of_pair, reduction="none").shape
        torch.Size([8])

    Sources: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021,
    figure 3; with labels Yang et al., "Unified Contrastive Learning in Image-Text-Label Space", 2022.
    """
    x, y = validation.pair("image_features", image_features, "text_features", text_features)
    scale = wide(validation.scale("logit_scale", logit_scale, x), x)
    validation.option("reduction", reduction, validation.REDUCTIONS)

    n = x.shape[0]
    valid = validation.valid_rows(valid, n, x)
    if labels is not None:
        labels = validation.labels("labels", labels, n)
        validation.same_device(image_features=x, labels=labels)
    ranks = join(
        group, exchange, x, "clip_loss", text_features=y, logit_scale=scale, labels=validation.kind(labels),
        valid=validation.kind(valid), reduction=reduction,
    )  # fmt: skip
    x, y = zero_unless(valid, x), zero_unless(valid, y)
    if labels is not None and total(n, ranks) > 1:
        return _of_labels(Contrast(x, y, scale), labels, valid, ranks, reduction)
    own = torch.arange(n, device=x.device)
    pairs = Contrast(x, y, scale, positive_index=own, both_axes=True)
    if valid is None and ranks is None:
        loss = whole(pairs, reduction, n)
        if loss is not None:
            return loss
    stats = engine.contrastive(among_valid(valid, pairs), ranks)
    loss = cross_entropy(torch.lerp(stats.lse, stats.lse_cols, 0.5), stats.positive_sum, total(n, ranks))
    return reduced(zero_unless(valid, loss), reduction, x, valid, ranks)


def _of_labels(
    pairs: Contrast, labels: Tensor, valid: Tensor | None, ranks: Ranks | None, reduction: str
) -> Tensor:
    """The reduced loss where pairs of one label are positives of each other.

    A label has as many images as texts, so the sum of all means over positives is the same on both axes. One
    pass over the logits therefore gives the loss of all pairs; that of some takes a pass for each axis.
    """
    ids = validation.label_ids(labels, before=0 if ranks is None else ranks.first)
    ids = of_no_label(ids, valid, ranks)
    problem = pairs._replace(
        row_labels=ids, col_labels=ids, label_positives=True, among="all" if valid is None else "same"
    )
    swapped = problem._replace(q=problem.keys, k=problem.q)
    whole = reduction == "mean" or (reduction == "sum" and ranks is None)
    stats = engine.contrastive(problem._replace(both_axes=whole), ranks)
    lse, positives = _over_valid(stats.lse, problem, valid, ranks), _positive_mean(stats)
    if whole:
        lse_cols = _over_valid(stats.lse_cols, swapped, valid, ranks)
        rows = torch.lerp(lse, lse_cols, 0.5) - positives
    else:
        stats = engine.contrastive(swapped, ranks)
        texts = _over_valid(stats.lse, swapped, valid, ranks) - _positive_mean(stats)
        rows = torch.lerp(at_least_zero(lse - positives), at_least_zero(texts), 0.5)
    loss = reduced(zero_unless(valid, rows), reduction, pairs.q, valid, ranks)
    return at_least_zero(loss) if whole and ranks is None else loss


def _positive_mean(stats: ContrastiveStats) -> Tensor:
    return stats.positive_sum / stats.positive_count


def _over_valid(lse: Tensor, problem: Contrast, valid: Tensor | None, ranks: Ranks | None) -> Tensor:
    """Log-sum-exps over all valid keys, of which `lse` are those over the keys of the row's label."""
    return lse if valid is None else log_add_any(lse, of_other_labels(problem, valid, ranks).lse)


class ClipLoss(Grouped):
    """`clip_loss` as a module, with the constructor and the forward of open_clip's ClipLoss, to which labels
    and valid are added by name.

    The processes are those of `group`: `world_size` above 1 and `use_horovod` are refused, and `local_loss`,
    `gather_with_grad`, `cache_labels` and `rank` change nothing. `logit_bias` shifts every logit alike,
    which no softmax sees: the loss does not depend on it, whatever its value, and its gradient is 0.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        reduction: str = "mean",
        group: ProcessGroup | None = None,
        exchange: str = "gather",
    ) -> None:
        super().__init__(group, exchange)
        if validation.integer("world_size", world_size, minimum=1) > 1:
            raise ValueError(
                f"world_size must be 1, got {world_size}: give the processes as "
                "group=torch.distributed.group.WORLD"
            )
        if use_horovod:
            raise ValueError(f"use_horovod must be False, got {use_horovod!r}: Horovod is not supported")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.reduction = validation.option("reduction", reduction, validation.REDUCTIONS)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        *,
        labels: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        loss = clip_loss(
            image_features,
            text_features,
            logit_scale,
            labels=labels,
            valid=valid,
            reduction=self.reduction,
            group=self.group,
            exchange=self.exchange,
        )
        if isinstance(logit_bias, Tensor) and logit_bias.requires_grad:
            loss = loss + logit_bias.flatten()[:0].sum().to(loss)  # in the graph, its value left alone
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        return (
            f"rank={self.rank}, world_size={self.world_size}, reduction={self.reduction!r}"
            f"{self.shown_group()}"
        )
