"""What `cl_kernels` is measured against: the same losses in eager PyTorch, and each one's value in float64.

The references walk over rows, so that they fit in memory; they share no code with the package.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from eager_supcon import EagerSupConLoss

__all__ = ["EagerSupConLoss"]

Result = tuple[Tensor, list[Tensor]]
"""A loss and its gradients."""


def eager_sce(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float, target_temperature: float, coeff: float
) -> Tensor:
    """SCE of q [N, D] with own keys k [N, D] and a queue [K, D]; the positive is not in the target."""
    logits = torch.cat(((q * k).sum(1, keepdim=True), q @ queue.T), 1) / temperature  # [N, 1 + K]
    target = (1 - coeff) * torch.softmax(k @ queue.T / target_temperature, 1)  # [N, K]
    log_prob = torch.log_softmax(logits, 1)
    return -(coeff * log_prob[:, 0] + (target * log_prob[:, 1:]).sum(1)).mean()


def eager_clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits = scale * image @ text.T
    own = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _in_chunks(rows: int, leaves: list[Tensor], loss_of: Callable[[slice], Tensor], chunk: int) -> Result:
    """The mean of `loss_of` over row chunks, and its gradients."""
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, rows, chunk):
        loss = loss_of(slice(start, min(start + chunk, rows))).sum() / rows
        loss.backward()
        total += loss.detach()
    return total, [leaf.grad for leaf in leaves]


def exact(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_()


def exact_supcon(features: Tensor, labels: Tensor, temperature: float, base_temperature: float) -> Result:
    leaf = exact(features)
    rows = features.shape[0] * features.shape[1]
    label = labels.repeat(features.shape[1])

    def loss_of(chunk: slice) -> Tensor:
        z = leaf.transpose(0, 1).flatten(0, 1)
        logits = z[chunk] @ z.T / temperature
        own = torch.arange(rows)[chunk, None] == torch.arange(rows)
        log_prob = logits - logits.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)
        positives = (label[chunk, None] == label) & ~own
        per_row = (log_prob * positives).sum(1) / positives.sum(1).clamp(min=1)
        return -temperature / base_temperature * per_row

    return _in_chunks(rows, [leaf], loss_of, 512)


def exact_cross_entropy(features: Tensor, target: Tensor, temperature: float) -> Result:
    """Of the rows against all rows, themselves included: what a cross-entropy over classes computes."""
    leaf = exact(features)

    def loss_of(chunk: slice) -> Tensor:
        return F.cross_entropy(leaf[chunk] @ leaf.T / temperature, target[chunk], reduction="none")

    return _in_chunks(len(features), [leaf], loss_of, 512)


def exact_sce(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float, target_temperature: float, coeff: float
) -> Result:
    leaf = exact(q)
    k, queue = k.double(), queue.double()

    def loss_of(chunk: slice) -> Tensor:
        rows = len(range(*chunk.indices(len(q))))
        return eager_sce(leaf[chunk], k[chunk], queue, temperature, target_temperature, coeff) * rows

    return _in_chunks(len(q), [leaf], loss_of, 64)


def exact_clip(image: Tensor, text: Tensor, scale: Tensor) -> Result:
    leaves = [exact(image), exact(text), exact(scale)]
    loss = eager_clip(*leaves)
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves]
