"""The peers of our losses: other implementations of the same work, where they are installed."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from . import eager, exact
from .workloads import Implementation

Truth = Callable[..., exact.Result]


@dataclass(frozen=True)
class Peer:
    """An implementation of some of the losses.

    `without_mask` losses keep the similarity of a row with itself and have the other view as the only
    positive: another value, which they are held to; the work is the same.
    """

    name: str
    losses: Mapping[str, Implementation]
    package: str = ""  # to import
    gpu_only: bool = False
    notes: Mapping[str, str] = field(default_factory=dict)
    truths: Mapping[str, Truth] = field(default_factory=dict)
    static: bool = False  # whether it compiles anew for every size

    def missing(self, device: str) -> str | None:
        """Why it cannot run here, or None."""
        if self.gpu_only and device != "cuda":
            return "runs on NVIDIA GPUs only"
        if self.name == LINEAR_CROSS_ENTROPY and not hasattr(F, "linear_cross_entropy"):
            return "torch has it from 2.13 on"
        if self.package:
            try:
                importlib.import_module(self.package)
            except Exception as error:  # whatever a broken installation raises
                return f"not here: {type(error).__name__}: {error}"
        return None


LINEAR_CROSS_ENTROPY = "linear_cross_entropy"


# torch.compile of the eager formulas


@functools.cache
def _compiled(loss: str) -> Implementation:
    return torch.compile(eager.LOSSES[loss], dynamic=False)


def _compile(loss: str) -> Implementation:
    return lambda *arguments: _compiled(loss)(*arguments)


# What the others take: one matrix of rows, the second half the other views of the first


def _on(rows: Callable[..., Tensor], loss: Callable[[float, Tensor], Tensor]) -> Implementation:
    return lambda temperature, *inputs: loss(temperature, rows(*inputs))


def _views(features: Tensor, labels: Tensor) -> Tensor:
    return features.transpose(0, 1).flatten(0, 1)


def _both(z0: Tensor, z1: Tensor) -> Tensor:
    return torch.cat((z0, z1))


def _units(z0: Tensor, z1: Tensor) -> Tensor:
    return F.normalize(_both(z0, z1), dim=1)


# torch's own chunked cross-entropy


def _chunked_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, target, options=options)


def _lce(temperature: float, z: Tensor) -> Tensor:
    partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return _chunked_cross_entropy(z / temperature, z, partner)


def _lce_clip(temperature: float, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    own = torch.arange(len(image), device=image.device)
    scaled = scale.to(image.dtype)
    one_way = _chunked_cross_entropy(scaled * image, text, own)
    return (one_way + _chunked_cross_entropy(scaled * text, image, own)) / 2


_WITHOUT_MASK = "no self mask: another value"


# pytorch-metric-learning


def _pml(temperature: float, rows: Tensor, labels: Tensor, normalize: bool = False) -> Tensor:
    from pytorch_metric_learning import distances, losses

    dot = distances.DotProductSimilarity(normalize_embeddings=normalize)
    return losses.SupConLoss(temperature=temperature, distance=dot)(rows, labels)


def _pml_supcon(temperature: float, features: Tensor, labels: Tensor) -> Tensor:
    found = _pml(temperature, _views(features, labels), labels.repeat(features.shape[1]))
    return temperature / eager.BASE_TEMPERATURE * found


def _pml_pairs(temperature: float, rows: Tensor, normalize: bool = False) -> Tensor:
    """Its own NTXentLoss holds every negative beside every positive, N x N^2 numbers; SupConLoss of pairs is
    the same loss without that."""
    pairs = torch.arange(len(rows) // 2, device=rows.device).repeat(2)
    return _pml(temperature, rows, pairs, normalize)


# lightly


def _lightly(temperature: float, rows: Tensor) -> Tensor:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=temperature)(*rows.chunk(2))


# Fused kernels for NVIDIA GPUs


def _inf_cl(temperature: float, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    from inf_cl import cal_flash_loss

    head = min(256, image.shape[1])
    return sum(cal_flash_loss(q, k, scale=scale, head_dim=head).mean() for q, k in
               ((image, text), (text, image))) / 2  # fmt: skip


def _memeff(temperature: float, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(temperature=temperature, normalized_inputs=True, stable=False)(image, text)


EAGER, COMPILED = "eager", "torch.compile"

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(EAGER, eager.LOSSES),
        Peer(COMPILED, {loss: _compile(loss) for loss in eager.LOSSES}, static=True),
        Peer(
            LINEAR_CROSS_ENTROPY,
            {"supcon": _on(_views, _lce), "nt_xent": _on(_units, _lce), "dimcl": _on(eager.columns, _lce),
             "clip": _lce_clip},
            notes=dict.fromkeys(("supcon", "nt_xent", "dimcl"), _WITHOUT_MASK),
            truths={
                "supcon": exact.supcon_with_self,
                "nt_xent": functools.partial(exact.nt_xent, with_self=True),
                "dimcl": functools.partial(exact.dimcl, with_self=True),
            },
        ),
        Peer(
            "pytorch-metric-learning",
            {"supcon": _pml_supcon, "selfcon": _pml_supcon,
             "nt_xent": _on(_both, functools.partial(_pml_pairs, normalize=True)),
             "dimcl": _on(eager.columns, _pml_pairs)},
            package="pytorch_metric_learning.losses",
        ),
        Peer(
            "lightly",
            {"nt_xent": _on(_both, _lightly), "dimcl": _on(eager.columns, _lightly)},
            package="lightly.loss",
        ),
        Peer("inf-cl", {"clip": _inf_cl}, package="inf_cl", gpu_only=True),
        Peer("memeff", {"clip": _memeff}, package="memeff", gpu_only=True,
             notes={"clip": "no gradient of the scale"}),
    )
}  # fmt: skip
