"""eztorch's losses beside ours, in one process or as one of two."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any

import torch
from peers.cases import Inputs, Loss, PeerCase, unit_views, ways
from peers.repositories import clone, load
from torch import Tensor

from cl_kernels.integrations import eztorch

NEEDS = ()
TOKENS = 8

Make = Callable[[int], tuple[Tensor, ...]]  # the masks for a number of rows
Call = Callable[[Loss], Loss]  # a loss of the inputs, of the function compared


def keyed(
    queue: int,
    world: int,
    frozen: bool,
    masks: Make,
    rows: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> list[Tensor]:
    """q, k, the keys of `world` processes, this being the last, maybe a queue [D, K], and masks."""
    make = partial(unit_views, dtype=dtype, generator=generator)
    q, k, others = make(rows, 128), make(rows, 128), make(rows * world, 128)
    found = [q, k, torch.cat([others.detach()[rows:], k.detach()])]
    if queue:
        found.append(make(queue, 128).detach().T.contiguous())
    for x in found[1:]:
        x.requires_grad_(not frozen)
    return [*found, *masks(rows)]


def crops(
    world: int, alone: bool, masks: Make, rows: int, dtype: torch.dtype, generator: torch.Generator
) -> list[Tensor]:
    """z, for several processes, of which this is the last, the rows of all, and masks."""
    make = partial(unit_views, dtype=dtype, generator=generator)
    z = make(rows, 128)
    if alone:
        return [z, *masks(rows)]
    others = make(rows * world, 128).detach()[rows:]
    return [z, torch.cat([others, z.detach()]).requires_grad_(), *masks(rows)]


def no_masks(rows: int) -> tuple[Tensor, ...]:
    return ()


class Cases:
    """Collects them."""

    def __init__(self) -> None:
        names = ("sce", "moco", "mocov3", "ressl", "simclr", "sce_token")
        self.files = {name: load("eztorch", f"eztorch/losses/{name}_loss.py") for name in names}
        self.found: list[PeerCase] = []

    def add(self, file: str, options: str, call: Call, inputs: Inputs, measured: bool = False) -> None:
        """Twice, with the adapter's function and with an accelerated one; `call` makes a loss of one."""
        name = f"compute_{file}_loss"
        original = getattr(self.files[file], name)
        for way, ours in ways(original, getattr(eztorch, name)).items():
            rows = 4096 if measured and not way else None
            made = partial(call, original), partial(call, ours)
            self.found.append(PeerCase(f"eztorch.{name}", options + way, *made, inputs, measured=rows))


def cases() -> list[PeerCase]:
    if clone("eztorch") is None:
        return []
    made = Cases()
    for use_keys, world, queue, frozen in product((True, False), (1, 2), (0, 100), (True, False)):
        if use_keys or (world == 1 and queue):
            _with_keys(made, use_keys, world, queue, frozen)
    for count, world, alone in ((2, 1, True), (2, 1, False), (2, 2, False), (3, 1, True), (4, 2, False)):
        _simclr(made, count, world, alone)
    for which, aligned, radius, queue, frozen in product(
        ("no keys", "keys", "all keys"), (True, False), (0, 2), (0, 100), (True, False)
    ):
        if (aligned or radius) and (queue or (which, radius) != ("no keys", 0)):
            _tokens(made, which, aligned, radius, queue, frozen)
    return made.found


def _with_keys(cases: Cases, use_keys: bool, world: int, queue: int, frozen: bool) -> None:
    shown = (
        f"{'keys' if use_keys else 'no keys'} of {world}, queue of {queue}, "
        f"{'frozen' if frozen else 'with gradient'}"
    )
    measured = use_keys and frozen and world == 1 and not queue

    def masks(file: str, rows: int) -> tuple[Tensor, ...]:
        mask = getattr(cases.files[file], f"compute_{file}_mask")(rows, queue, use_keys, world - 1, world)
        return () if mask is None else (mask,)

    def soft(*weight: Any, temp: float = 0.1, temp_m: float = 0.07) -> Call:
        def call(function: Loss) -> Loss:
            def loss(q: Tensor, k: Tensor, everyone: Tensor, *rest: Tensor) -> Tensor:
                bank, mask = rest[0] if queue else None, rest[-1] if len(rest) > bool(queue) else None
                return function(q, k, everyone, use_keys, bank, mask, *weight, temp, temp_m)

            return loss

        return call

    def moco(function: Loss) -> Loss:
        return lambda q, k, everyone, bank=None: function(q, k, everyone, use_keys, bank, rank=world - 1)

    def mocov3(function: Loss) -> Loss:
        return lambda q, k, everyone: function(q, everyone, 0.2, world - 1)

    sce, ressl, bare = (
        partial(keyed, queue, world, frozen, make)
        for make in (partial(masks, "sce"), partial(masks, "ressl"), no_masks)
    )
    cases.add("sce", shown, soft(0.5), sce, measured)
    cases.add("sce", f"{shown}, coeff a tensor", soft(torch.tensor(0.25)), sce)
    cases.add("sce", f"{shown}, temperatures", soft(0.0, temp=0.2, temp_m=0.05), sce)
    cases.add("ressl", shown, soft(), ressl, measured)
    cases.add("moco", shown, moco, bare, measured)
    if use_keys and not queue:
        cases.add("mocov3", shown, mocov3, bare, measured)


def _simclr(cases: Cases, count: int, world: int, alone: bool) -> None:
    def masks(rows: int) -> tuple[Tensor, ...]:
        file = cases.files["simclr"]
        return tuple(file.compute_simclr_masks(rows // count, count, world - 1, world))

    def call(function: Loss) -> Loss:
        def loss(z: Tensor, *rest: Tensor) -> Tensor:
            return function(z, *([z, *rest] if alone else rest), 0.2)

        return loss

    shown = f"{count} crops, process {world} of {world}{', z itself' if alone else ''}"
    cases.add("simclr", shown, call, partial(crops, world, alone, masks), alone and count == 2)


def _tokens(cases: Cases, which: str, aligned: bool, radius: int, queue: int, frozen: bool) -> None:
    world = 2 if which == "all keys" else 1
    every_query = which == "all keys" and aligned  # two masks are None

    def masks(rows: int) -> tuple[Tensor, ...]:
        file: ModuleType = cases.files["sce_token"]
        keys = (which == "keys", which == "all keys")
        made = file.compute_sce_token_masks(
            rows // TOKENS, TOKENS, queue, radius, aligned, *keys, world - 1, world
        )
        return tuple(mask for mask in made[:4] if mask is not None)

    def call(function: Loss) -> Loss:
        def loss(q: Tensor, k: Tensor, everyone: Tensor, *rest: Tensor) -> Tensor:
            bank, given = (rest[0], rest[1:]) if queue else (None, rest)
            given = (None, *given, None) if every_query else given
            return function(q, k, everyone, bank, *given, 0.5)

        return loss

    shown = (
        f"{which} of {world}, radius {radius}{'' if aligned else ', not aligned'}, queue of {queue}, "
        f"{'frozen' if frozen else 'with gradient'}"
    )
    measured = every_query and radius == 2 and frozen and not queue
    cases.add("sce_token", shown, call, partial(keyed, queue, world, frozen, masks), measured)
