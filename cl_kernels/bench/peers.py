"""What the losses are measured against: other implementations of the same work, where they are installed."""

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
    def run(*arguments: object) -> Tensor:
        return _compiled(loss)(*arguments)

    return run


# torch's own chunked cross-entropy


def _chunked_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, target, options=options)


def _lce_of(temperature: float, z: Tensor) -> Tensor:
    partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return _chunked_cross_entropy(z / temperature, z, partner)


def _lce_supcon(temperature: float, features: Tensor, labels: Tensor) -> Tensor:
    return _lce_of(temperature, features.transpose(0, 1).flatten(0, 1))


def _lce_nt_xent(temperature: float, z0: Tensor, z1: Tensor) -> Tensor:
    return _lce_of(temperature, F.normalize(torch.cat((z0, z1)), dim=1))


def _lce_dimcl(temperature: float, z0: Tensor, z1: Tensor) -> Tensor:
    return _lce_of(temperature, eager.columns(z0, z1))


def _lce_clip(temperature: float, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    own = torch.arange(len(image), device=image.device)
    scaled = scale.to(image.dtype)
    one_way = _chunked_cross_entropy(scaled * image, text, own)
    return (one_way + _chunked_cross_entropy(scaled * text, image, own)) / 2


_WITHOUT_MASK = "no self mask: another value"


# pytorch-metric-learning


def _pml_supcon_of(temperature: float, rows: Tensor, labels: Tensor, normalize: bool = False) -> Tensor:
    from pytorch_metric_learning import distances, losses

    dot = distances.DotProductSimilarity(normalize_embeddings=normalize)
    return losses.SupConLoss(temperature=temperature, distance=dot)(rows, labels)


def _pml_supcon(temperature: float, features: Tensor, labels: Tensor) -> Tensor:
    views = features.shape[1]
    rows = features.transpose(0, 1).flatten(0, 1)
    return temperature / eager.BASE_TEMPERATURE * _pml_supcon_of(temperature, rows, labels.repeat(views))


def _pml_pairs(temperature: float, rows: Tensor, normalize: bool = False) -> Tensor:
    """Its own NTXentLoss holds every negative beside every positive, N x N^2 numbers; SupConLoss of pairs is
    the same loss without that."""
    pairs = torch.arange(len(rows) // 2, device=rows.device).repeat(2)
    return _pml_supcon_of(temperature, rows, pairs, normalize)


def _pml_nt_xent(temperature: float, z0: Tensor, z1: Tensor) -> Tensor:
    return _pml_pairs(temperature, torch.cat((z0, z1)), normalize=True)


def _pml_dimcl(temperature: float, z0: Tensor, z1: Tensor) -> Tensor:
    return _pml_pairs(temperature, eager.columns(z0, z1))


# lightly


def _lightly_nt_xent(temperature: float, z0: Tensor, z1: Tensor) -> Tensor:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=temperature)(z0, z1)


def _lightly_dimcl(temperature: float, z0: Tensor, z1: Tensor) -> Tensor:
    from lightly.loss import NTXentLoss

    first, second = eager.columns(z0, z1).chunk(2)
    return NTXentLoss(temperature=temperature)(first, second)


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
            {"supcon": _lce_supcon, "nt_xent": _lce_nt_xent, "dimcl": _lce_dimcl, "clip": _lce_clip},
            notes=dict.fromkeys(("supcon", "nt_xent", "dimcl"), _WITHOUT_MASK),
            truths={
                "supcon": exact.supcon_with_self,
                "nt_xent": functools.partial(exact.nt_xent, with_self=True),
                "dimcl": functools.partial(exact.dimcl, with_self=True),
            },
        ),
        Peer(
            "pytorch-metric-learning",
            {
                "supcon": _pml_supcon,
                "selfcon": _pml_supcon,
                "nt_xent": _pml_nt_xent,
                "dimcl": _pml_dimcl,
            },
            package="pytorch_metric_learning.losses",
        ),
        Peer(
            "lightly",
            {"nt_xent": _lightly_nt_xent, "dimcl": _lightly_dimcl},
            package="lightly.loss",
        ),
        Peer("inf-cl", {"clip": _inf_cl}, package="inf_cl", gpu_only=True),
        Peer(
            "memeff",
            {"clip": _memeff},
            package="memeff",
            gpu_only=True,
            notes={"clip": "no gradient of the scale"},
        ),
    )
}
