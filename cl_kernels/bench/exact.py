"""Each loss and its gradients in float64: the truth to which variants are held before being timed.

Rows are walked in chunks, so that they fit in memory; no code is shared with the package. Arguments are those
of `eager`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import eager

Result = tuple[Tensor, list[Tensor]]  # a loss and its gradients
Truth = Callable[..., Result]

ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}  # of a chunk of the matrix of similarities


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


def _mean_over_rows(
    columns: int, leaves: Sequence[Tensor], operands: Sequence[Tensor], losses: Callable[..., Tensor]
) -> Result:
    """The mean of `losses(chunk, *operands)`, a loss for each row of a slice of the first operand, and the
    gradients of `leaves`, of which the operands are made."""
    inner = [x.detach().requires_grad_() for x in operands]
    rows = len(inner[0])
    total = torch.zeros((), dtype=torch.float64, device=inner[0].device)
    chunk = max(1, ELEMENTS[total.device.type] // columns)
    for start in range(0, rows, chunk):
        loss = losses(slice(start, min(start + chunk, rows)), *inner).sum() / rows
        loss.backward()
        total += loss.detach()
    torch.autograd.backward(list(operands), [x.grad for x in inner])
    return total, [leaf.grad for leaf in leaves if leaf.grad is not None]


def _others(chunk: slice, z: Tensor) -> Tensor:
    """Which pairs of a chunk's rows with all rows are not a row with itself."""
    index = torch.arange(len(z), device=z.device)
    return index[chunk, None] != index


def supcon(temperature: float, features: Tensor, labels: Tensor) -> Result:
    (leaf,) = _leaves(features)
    z, label = eager.views(leaf, labels), labels.repeat(features.shape[1])

    def losses(chunk: slice, z: Tensor) -> Tensor:
        others = _others(chunk, z)
        logits = z[chunk] @ z.T / temperature
        log_prob = logits - logits.masked_fill(~others, -torch.inf).logsumexp(1, keepdim=True)
        positives = (label[chunk, None] == label) & others
        per_row = (log_prob * positives).sum(1) / positives.sum(1).clamp(min=1)
        return -temperature / eager.BASE_TEMPERATURE * per_row

    return _mean_over_rows(len(z), [leaf], [z], losses)


def multilevel(temperature: float, *levels_and_labels: Tensor) -> Result:
    *levels, labels = levels_and_labels
    results = [supcon(temperature, level, labels) for level in levels]
    return torch.stack([loss for loss, _ in results]).sum(), [grads[0] for _, grads in results]


def pairs(rows: Callable[..., Tensor], temperature: float, *inputs: Tensor, mask: bool = True) -> Result:
    """The NT-Xent of what a function of `eager` makes of the inputs: unit rows, the second half the other
    views of the first. Without the mask a row's similarity to itself counts, as in a cross-entropy."""
    leaves = _leaves(*inputs)
    z = rows(*leaves)
    partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)

    def losses(chunk: slice, z: Tensor) -> Tensor:
        logits = z[chunk] @ z.T / temperature
        if mask:
            logits = logits.masked_fill(~_others(chunk, z), -torch.inf)
        return F.cross_entropy(logits, partner[chunk], reduction="none")

    return _mean_over_rows(len(z), leaves, [z], losses)


def _beside_queue(loss: Callable[..., Tensor], temperature: float, *views_k_queue: Tensor) -> Result:
    """The truth of an eager loss whose rows do not see one another."""
    *views, k, queue = (x.double() for x in views_k_queue)
    leaves = _leaves(*views)

    def losses(chunk: slice, *views: Tensor) -> Tensor:
        return loss(temperature, *(q[chunk] for q in views), k[chunk], queue) * len(k[chunk])

    return _mean_over_rows(len(views) * len(queue), leaves, leaves, losses)


def clip(temperature: float, image: Tensor, text: Tensor, scale: Tensor) -> Result:
    leaves = _leaves(image, text, scale)
    own = torch.arange(len(image), device=image.device)

    def losses(chunk: slice, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        rows = F.cross_entropy(scale * image[chunk] @ text.T, own[chunk], reduction="none")
        cols = F.cross_entropy(scale * text[chunk] @ image.T, own[chunk], reduction="none")
        return (rows + cols) / 2

    return _mean_over_rows(len(text), leaves, leaves, losses)


def dcl(temperature: float, z0: Tensor, z1: Tensor) -> Result:
    leaves = _leaves(z0, z1)

    def losses(chunk: slice, z0: Tensor, z1: Tensor) -> Tensor:
        within, cross = z0[chunk] @ z0.T / temperature, z0[chunk] @ z1.T / temperature
        positive = (z0[chunk] * z1[chunk]).sum(1) / temperature
        negatives = _others(chunk, z0).repeat(1, 2)
        return torch.cat((within, cross), 1).masked_fill(~negatives, -torch.inf).logsumexp(1) - positive

    return _mean_over_rows(2 * len(z0), leaves, leaves, losses)


LOSSES: dict[str, Truth] = {
    "supcon": supcon, "selfcon": supcon, "multilevel": multilevel,
    "nt_xent": partial(pairs, eager.units), "dimcl": partial(pairs, eager.columns),
    "sce": partial(_beside_queue, eager.sce), "sce_multicrop": partial(_beside_queue, eager.sce_multicrop),
    "info_nce": partial(_beside_queue, eager.info_nce), "clip": clip, "dcl": dcl,
}  # fmt: skip
