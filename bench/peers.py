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


def eager_nt_xent(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    return _nt_xent_of(F.normalize(torch.cat((z0, z1)), dim=1), temperature)


def eager_dimcl(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """NT-Xent of the columns of two views, standardised over the batch."""
    columns = [(z - z.mean(0)) / z.std(0, correction=0) for z in (z0, z1)]
    return _nt_xent_of(F.normalize(torch.cat(columns, 1).T, dim=1), temperature)


def _nt_xent_of(z: Tensor, temperature: float) -> Tensor:
    own = torch.arange(len(z), device=z.device)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, own.roll(len(z) // 2))


def _in_chunks(rows: int, leaves: list[Tensor], loss_of: Callable[[slice], Tensor], chunk: int) -> Result:
    """The mean of `loss_of` over row chunks, and its gradients."""
    total = torch.zeros((), dtype=torch.float64, device=leaves[0].device)
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
        index = torch.arange(rows, device=z.device)
        own = index[chunk, None] == index
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


def exact_clip(image: Tensor, text: Tensor, scale: Tensor, chunk: int = 1024) -> Result:
    """By the formulas: P and Q are the softmaxes of rows and columns, G = (P + Q) / 2N - I / N."""
    image, text, scale = image.double(), text.double(), scale.double()
    rows = len(image)
    starts = range(0, rows, chunk)
    lse = torch.cat([(scale * image[i : i + chunk] @ text.T).logsumexp(1) for i in starts])
    lse_cols = torch.cat([(scale * text[i : i + chunk] @ image.T).logsumexp(1) for i in starts])
    own = (image * text).sum(1)
    loss = ((lse + lse_cols) / 2 - scale * own).mean()
    grad_image, grad_text = torch.empty_like(image), torch.zeros_like(text)
    grad_scale = -own.mean()
    for i in starts:
        part = slice(i, i + chunk)
        dots = image[part] @ text.T
        grad = ((scale * dots - lse[part, None]).exp() + (scale * dots - lse_cols).exp()) / (2 * rows)
        grad_scale += (grad * dots).sum()
        grad_image[part] = scale * (grad @ text - text[part] / rows)
        grad_text += scale * (grad.T @ image[part])
    grad_text -= scale * image / rows
    return loss, [grad_image, grad_text, grad_scale]


def exact_nt_xent(z0: Tensor, z1: Tensor, temperature: float) -> Result:
    leaves = [exact(z0), exact(z1)]
    rows = 2 * len(z0)

    def loss_of(chunk: slice) -> Tensor:
        z = F.normalize(torch.cat(leaves), dim=1)
        index = torch.arange(rows, device=z.device)
        logits = z[chunk] @ z.T / temperature
        logits = logits.masked_fill(index[chunk, None] == index, -torch.inf)
        return F.cross_entropy(logits, index.roll(rows // 2)[chunk], reduction="none")

    return _in_chunks(rows, leaves, loss_of, 1024)


def exact_dimcl(z0: Tensor, z1: Tensor, temperature: float) -> Result:
    leaves = [exact(z0), exact(z1)]
    loss = eager_dimcl(*leaves, temperature)
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves]
