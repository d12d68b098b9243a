"""The losses of the paper in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cl_kernels.bench import eager

from .presets import SelfConSettings

Loss = Callable[[Tensor, Tensor], Tensor]  # of features [views · B, exits + 1, D] and labels [B]


def augmentations(name: str) -> int:
    """Views of each image that a method takes: M, MU and M* two, S, SU and S* one."""
    return 2 if name.startswith("selfcon-m") else 1


def eager_loss(settings: SelfConSettings, name: str) -> Loss:
    """Choose the loss of a method by its name."""
    anchored = partial(eager_anchored, settings.temperature)

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        if name.endswith("u"):  # each image is its own class
            labels = torch.arange(len(labels), device=labels.device)
        labels = labels.repeat(augmentations(name))
        if not name.endswith("a"):
            return eager.supcon(settings.temperature, features, labels)
        rows, repeated = eager.views(features, labels), labels.repeat(features.shape[1])
        exits, backbone = rows[: -len(labels)], rows[-len(labels) :]
        return anchored(backbone, backbone, labels) + settings.alpha * anchored(exits, rows, repeated)

    return loss


def eager_anchored(temperature: float, anchors: Tensor, keys: Tensor, labels: Tensor) -> Tensor:
    """SupCon over the anchors that have positives; they are the first of the keys [N, D], labels [N]."""
    others = ~torch.eye(len(anchors), len(keys), dtype=torch.bool, device=keys.device)
    positives = (labels[: len(anchors), None] == labels) & others
    count = positives.sum(1)
    logits = anchors @ keys.T / temperature
    log_prob = logits - logits.masked_fill(~others, -torch.inf).logsumexp(1, keepdim=True)
    mean_log_prob = (positives * log_prob).sum(1)[count > 0] / count[count > 0]
    return -(temperature / eager.BASE_TEMPERATURE) * mean_log_prob.mean()
