"""The losses as their authors publish them: plain eager PyTorch over whole N x N matrices.

Each function takes the temperature, the tensors that get a gradient, and those that do not, in the order of
`workloads.LOSSES`. They share no code with the package.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BASE_TEMPERATURE = 0.07
TARGET_TEMPERATURE = 0.07
COEFF = 0.5


def views(features: Tensor, labels: Tensor) -> Tensor:
    """Features [B, V, D] as rows [V * B, D], a view after the other."""
    return features.transpose(0, 1).flatten(0, 1)


def units(z0: Tensor, z1: Tensor) -> Tensor:
    """Two views [N, D] as unit rows [2N, D]."""
    return F.normalize(torch.cat((z0, z1)), dim=1)


def columns(z0: Tensor, z1: Tensor) -> Tensor:
    """The features of two views [N, D], standardised over the batch, as unit rows [2D, N]."""
    standard = [(z - z.mean(0)) / z.std(0, correction=0) for z in (z0, z1)]
    return F.normalize(torch.cat(standard, 1).T, dim=1)


def supcon(temperature: float, features: Tensor, labels: Tensor) -> Tensor:
    """Khosla et al., 2020, equation 2; features [B, V, D], labels [B]."""
    rows, count = views(features, labels), features.shape[1]
    same = torch.eq(labels[:, None], labels[None, :]).to(rows.dtype).repeat(count, count)  # [N, N]
    others = 1 - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    positives = same * others

    logits = torch.matmul(rows, rows.T) / temperature
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    denominator = (torch.exp(logits) * others).sum(1, keepdim=True)
    log_prob = logits - torch.log(denominator)
    mean_log_prob = (positives * log_prob).sum(1) / positives.sum(1).clamp(min=1)
    return -(temperature / BASE_TEMPERATURE) * mean_log_prob.mean()


def multilevel(temperature: float, *levels_and_labels: Tensor) -> Tensor:
    *levels, labels = levels_and_labels
    return torch.stack([supcon(temperature, level, labels) for level in levels]).sum()


def nt_xent(temperature: float, z0: Tensor, z1: Tensor) -> Tensor:
    """Chen et al., 2020, equation 1."""
    return nt_xent_of(temperature, units(z0, z1))


def nt_xent_of(temperature: float, z: Tensor) -> Tensor:
    own = torch.arange(len(z), device=z.device)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, own.roll(len(z) // 2))


def dimcl(temperature: float, z0: Tensor, z1: Tensor) -> Tensor:
    return nt_xent_of(temperature, columns(z0, z1))


def sce(temperature: float, q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """Denize et al., 2023, equations 4 to 6: own keys k [N, D] and a queue [K, D]; the positive is not in the
    target."""
    logits = torch.cat(((q * k).sum(1, keepdim=True), q @ queue.T), 1) / temperature  # [N, 1 + K]
    target = (1 - COEFF) * torch.softmax(k @ queue.T / TARGET_TEMPERATURE, 1)
    log_prob = torch.log_softmax(logits, 1)
    return -(COEFF * log_prob[:, 0] + (target * log_prob[:, 1:]).sum(1)).mean()


def sce_multicrop(temperature: float, *views_k_queue: Tensor) -> Tensor:
    """The mean over student views that share the teacher's rows."""
    *views, k, queue = views_k_queue
    return torch.stack([sce(temperature, q, k, queue) for q in views]).mean()


def info_nce(temperature: float, q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """He et al., 2020, equation 1, with a queue [K, D]."""
    logits = torch.cat(((q * k).sum(1, keepdim=True), q @ queue.T), 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def clip(temperature: float, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Radford et al., 2021, figure 3; the learnable scale takes the place of the temperature."""
    logits = scale.to(image.dtype) * image @ text.T
    own = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def dcl(temperature: float, z0: Tensor, z1: Tensor) -> Tensor:
    """Yeh et al., 2022, equation 6, one way."""
    cross = z0 @ z1.T / temperature
    positive = cross.diagonal()
    off = torch.eye(len(z0), dtype=torch.bool, device=z0.device)
    negatives = torch.cat((z0 @ z0.T / temperature, cross), 1).masked_fill(off.repeat(1, 2), -torch.inf)
    return (torch.logsumexp(negatives, 1) - positive).mean()


_NAMED = (supcon, multilevel, nt_xent, dimcl, sce, sce_multicrop, info_nce, clip, dcl)
LOSSES: dict[str, Callable[..., Tensor]] = {loss.__name__: loss for loss in _NAMED} | {"selfcon": supcon}
