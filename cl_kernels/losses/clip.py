"""The symmetric image-text loss of CLIP."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validation
from ..distributed import ProcessGroup, engine, join, total
from ..problem import Contrast
from ._common import Grouped, cross_entropy, loss_function, reduced, wide


@loss_function
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    exchange: str = "gather",
) -> Tensor:
    r"""Mean of the cross-entropies of images over texts and of texts over images.

    With :math:`S_{ij} = s\, x_i \cdot y_j`, pair i on the diagonal:

    .. math:: \ell_i = \frac{1}{2} \Big( \log\sum_j e^{S_{ij}} + \log\sum_j e^{S_{ji}} \Big) - S_{ii}

    Args:
        image_features, text_features: [N, D], float16, bfloat16, float32 or float64; used as they come, not
            normalised.
        logit_scale: s, a float or a tensor of one element (CLIP's `logit_scale.exp()`), which gets its
            gradient.
        reduction: "mean" over the pairs, "sum", or "none": [N].
        group, exchange: the processes over whose rows the loss is taken, a `torch.distributed.ProcessGroup`,
            and how keys travel, "gather" or "ring" (docs/distributed.md); None: this process alone.

    Returns:
        The loss in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape, device or value; the message names it.

    With :math:`G_{ij} = (g_i P_{ij} + g_j Q_{ij}) / 2 - g_i [j = i]`, P the softmax over rows of S and Q over
    its columns:

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

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021,
    figure 3.
    """
    x, y = validation.pair("image_features", image_features, "text_features", text_features)
    scale = wide(validation.scale("logit_scale", logit_scale, x), x)
    validation.option("reduction", reduction, validation.REDUCTIONS)

    ranks = join(group, exchange, x, "clip_loss", text_features=y, logit_scale=scale, reduction=reduction)
    n = x.shape[0]
    own = torch.arange(n, device=x.device)
    stats = engine.contrastive(Contrast(x, y, scale, positive_index=own, both_axes=True), ranks)
    loss = cross_entropy(torch.lerp(stats.lse, stats.lse_cols, 0.5), stats.positive_sum, total(n, ranks))
    return reduced(loss, reduction, x, ranks=ranks)


class ClipLoss(Grouped):
    """`clip_loss` as a module, with the constructor and the forward of open_clip's ClipLoss.

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
    ) -> Tensor | dict[str, Tensor]:
        loss = clip_loss(
            image_features,
            text_features,
            logit_scale,
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
