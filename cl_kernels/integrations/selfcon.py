"""The loss of raymin0223/self-contrastive-learning, fused: `ConLoss` of its losses/losses.py."""

from __future__ import annotations

from torch import Tensor

from .. import validation
from ._formulas import SupervisedModule, anchor_views, supervised, supervision
from ._swap import fused


class ConLoss(SupervisedModule):
    """`cl_kernels.selfcon_loss` with the constructor, the attributes and the call of the repository's class.

    Unlike it, the loss is NaN where an anchor has no positives and `supcon_s` does not leave it out.
    """

    @fused("losses.losses:ConLoss.forward", known=("3b9125d1dddb5da2",))
    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        supcon_s: bool = False,
        selfcon_s_FG: bool = False,
        selfcon_m_FG: bool = False,
    ) -> Tensor:
        """The loss of features [B, V, ...], or [2B, V, ...] with `selfcon_m_FG`, the backbone's view last."""
        x = validation.views("features", features)
        if selfcon_s_FG and selfcon_m_FG:
            raise ValueError("selfcon_s_FG and selfcon_m_FG must not be given together, got both")
        augmentations = 2 if selfcon_m_FG else 1
        if selfcon_s_FG or selfcon_m_FG:
            views = x.shape[1] - 1
        else:
            views = anchor_views(x, self.contrast_mode)
        if views == 0:
            raise ValueError("features must have a view besides the backbone's, got one")
        if supcon_s and views * augmentations > 1:
            raise ValueError(f"supcon_s takes anchors of one view, got {views * augmentations}")
        labels, mask = supervision(x, labels, mask)
        return supervised(
            x,
            labels,
            mask,
            views,
            temperature=self.temperature,
            base_temperature=self.base_temperature,
            augmentations=augmentations,
            drop=supcon_s,
        )
