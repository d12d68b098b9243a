"""The ways to do a workload, by name: ours by each backend, other implementations where they are installed,
and the floor."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from . import eager, exact
from .results import OURS
from .workloads import LOSSES, Implementation

EAGER, COMPILED, CHUNKED = "eager", "torch.compile", "linear_cross_entropy"


@dataclass(frozen=True)
class Peer:
    """Another implementation of some of the losses. Where it computes another value by the same work, `notes`
    say so, and `truths` have what it is held to."""

    losses: Mapping[str, Implementation]
    package: str = "torch"  # to import
    obstacle: str = ""  # why it runs nowhere here
    gpu_only: bool = False
    notes: Mapping[str, str] = field(default_factory=dict)
    truths: Mapping[str, exact.Truth] = field(default_factory=dict)

    def missing(self, device: str) -> str:
        """Why it cannot run here; empty where it can."""
        if self.gpu_only and device != "cuda":
            return "runs on NVIDIA GPUs only"
        try:
            importlib.import_module(self.package)
        except Exception as error:  # whatever a broken installation raises
            return f"not here: {type(error).__name__}: {error}"
        return self.obstacle


def _compiled(loss: Implementation) -> Implementation:
    """Compiled for the size at hand, from the first call on."""
    compiled = functools.cache(functools.partial(torch.compile, loss, dynamic=False))
    return lambda *arguments: compiled()(*arguments)


def _on(rows: Callable[..., Tensor], loss: Callable[[float, Tensor], Tensor]) -> Implementation:
    """A loss of one matrix of rows, on those that a function of `eager` makes."""
    return lambda temperature, *inputs: loss(temperature, rows(*inputs))


def _chunked_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(x, weight, target, options=torch.nn.LinearCrossEntropyOptions())


def _chunked(temperature: float, z: Tensor) -> Tensor:
    partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return _chunked_cross_entropy(z / temperature, z, partner)


def _chunked_clip(temperature: float, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    own = torch.arange(len(image), device=image.device)
    scaled = scale.to(image.dtype)
    one_way = _chunked_cross_entropy(scaled * image, text, own)
    return (one_way + _chunked_cross_entropy(scaled * text, image, own)) / 2


def _pml(temperature: float, rows: Tensor, labels: Tensor) -> Tensor:
    from pytorch_metric_learning import distances, losses

    dot = distances.DotProductSimilarity(normalize_embeddings=False)
    return losses.SupConLoss(temperature=temperature, distance=dot)(rows, labels)


def _pml_supcon(temperature: float, features: Tensor, labels: Tensor) -> Tensor:
    found = _pml(temperature, eager.views(features, labels), labels.repeat(features.shape[1]))
    return temperature / eager.BASE_TEMPERATURE * found


def _pml_pairs(temperature: float, rows: Tensor) -> Tensor:
    """Its own NTXentLoss holds every negative beside every positive, N x N^2 numbers; SupConLoss of pairs is
    the same loss without that."""
    return _pml(temperature, rows, torch.arange(len(rows) // 2, device=rows.device).repeat(2))


def _lightly(temperature: float, z0: Tensor, z1: Tensor) -> Tensor:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=temperature)(z0, z1)


def _lightly_dimcl(temperature: float, z0: Tensor, z1: Tensor) -> Tensor:
    return _lightly(temperature, *eager.columns(z0, z1).chunk(2))


def _inf_cl(temperature: float, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    from inf_cl import cal_flash_loss

    loss = functools.partial(cal_flash_loss, scale=scale, head_dim=min(256, image.shape[1]))
    return (loss(image, text).mean() + loss(text, image).mean()) / 2


def _memeff(temperature: float, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(temperature=temperature, normalized_inputs=True, stable=False)(image, text)


_ROWS = {"supcon": eager.views, "nt_xent": eager.units, "dimcl": eager.columns}

PEERS: dict[str, Peer] = {
    EAGER: Peer(eager.LOSSES),
    COMPILED: Peer({name: _compiled(loss) for name, loss in eager.LOSSES.items()}),
    CHUNKED: Peer(
        {loss: _on(rows, _chunked) for loss, rows in _ROWS.items()} | {"clip": _chunked_clip},
        obstacle="" if hasattr(F, "linear_cross_entropy") else "torch has it from 2.13 on",
        notes=dict.fromkeys(_ROWS, "no self mask: another value"),
        truths={loss: functools.partial(exact.pairs, rows, mask=False) for loss, rows in _ROWS.items()},
    ),
    "pytorch-metric-learning": Peer(
        {"supcon": _pml_supcon, "selfcon": _pml_supcon, "nt_xent": _on(eager.units, _pml_pairs),
         "dimcl": _on(eager.columns, _pml_pairs)},
        package="pytorch_metric_learning.losses",
    ),
    "lightly": Peer({"nt_xent": _lightly, "dimcl": _lightly_dimcl}, package="lightly.loss"),
    "inf-cl": Peer({"clip": _inf_cl}, package="inf_cl", gpu_only=True),
    "memeff": Peer({"clip": _memeff}, package="memeff", gpu_only=True,
                   notes={"clip": "no gradient of the scale"}),
}  # fmt: skip


def our_names(backends: Sequence[str]) -> list[str]:
    """One backend needs no name of its own."""
    return [OURS] if len(backends) == 1 else [f"{OURS} {backend}" for backend in backends]


def serving_backends(device: str) -> list[str]:
    """Those that a report compares on this machine."""
    named = ("cuda", "triton") if device == "cuda" else ()
    return [name for name in named if dispatch.obstacle(name, device) is None] or ["auto"]


def implementation(variant: str, loss: str) -> Implementation:
    """Raises KeyError where a peer does not have the loss."""
    name, _, backend = variant.partition(" ")
    if name != OURS:
        return PEERS[variant].losses[loss]
    ours = LOSSES[loss].ours
    return by_backend(backend, ours) if backend else ours


def by_backend(backend: str, ours: Implementation) -> Implementation:
    """Ours, insisting on a backend."""

    def run(temperature: float, *inputs: Tensor) -> Tensor:
        with dispatch.use_backend(backend):  # type: ignore[arg-type]
            return ours(temperature, *inputs)

    return run


def truth(variant: str, loss: str) -> exact.Truth:
    of_peer = PEERS[variant].truths if variant in PEERS else {}
    return of_peer.get(loss, exact.LOSSES[loss])
