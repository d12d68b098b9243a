"""The ways to do a workload, by name: ours by each backend, the peers, and the floor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import dispatch
from .exact import LOSSES as EXACT
from .peers import PEERS, Truth
from .results import OURS
from .workloads import LOSSES, Implementation


def our_names(backends: Sequence[str]) -> list[str]:
    """One backend needs no name of its own."""
    return [OURS] if len(backends) == 1 else [f"{OURS} {backend}" for backend in backends]


def serving_backends(device: str) -> list[str]:
    """Those that a report compares on this machine."""
    if device == "cuda":
        named = [name for name in ("cuda", "triton") if dispatch.obstacle(name, device) is None]
        return named or ["auto"]
    return ["auto"]


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


def truth(variant: str, loss: str) -> Truth:
    peer = PEERS.get(variant)
    return peer.truths.get(loss, EXACT[loss]) if peer else EXACT[loss]


def is_static(variant: str) -> bool:
    return variant in PEERS and PEERS[variant].static
