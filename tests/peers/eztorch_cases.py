"""eztorch's losses beside ours, in one process or as one of two."""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from peers.cases import PeerCase
from peers.repositories import clone, load
from peers.supcontrast_cases import unit_views
from torch import Tensor

import cl_kernels
from cl_kernels.integrations import eztorch

NEEDS = ()


def keyed(
    queue: int, world: int, frozen: bool, rows: int, dtype: torch.dtype, generator: torch.Generator
) -> list[Tensor]:
    """q, k, the keys of `world` processes, this being the last, and a queue [D, K] unless `queue` is 0."""
    make = partial(unit_views, dtype=dtype, generator=generator)
    q, k, others = make(rows, 128), make(rows, 128), make(rows * world, 128)
    everyone = torch.cat([others.detach()[rows:], k.detach()])
    found = [q, k, everyone]
    if queue:
        found.append(make(queue, 128).detach().T.contiguous())
    for x in found[1:]:
        x.requires_grad_(not frozen)
    return found


def crops(
    count: int, world: int, alone: bool, rows: int, dtype: torch.dtype, generator: torch.Generator
) -> list[Tensor]:
    """z, and for several processes, of which this is the last, the rows of all."""
    make = partial(unit_views, dtype=dtype, generator=generator)
    z = make(rows, 128)
    if alone:
        return [z]
    others = make(rows * world, 128).detach()[rows:]
    return [z, torch.cat([others, z.detach()]).requires_grad_()]


def CASES() -> list[PeerCase]:
    if clone("eztorch") is None:
        return []
    files = {
        name: load("eztorch", f"eztorch/losses/{name}_loss.py")
        for name in ("sce", "moco", "mocov3", "ressl", "simclr", "sce_token")
    }

    def case(file: str, options: str, call: object, inputs: object, **rest: object) -> PeerCase:
        name = f"compute_{file}_loss"
        original = getattr(files[file], name)
        ours = cl_kernels.accelerate(original) if "accelerated" in options else getattr(eztorch, name)
        return PeerCase(
            f"eztorch.{name}", options, partial(call, original), partial(call, ours), inputs, **rest
        )

    def soft(file: str, use_keys: bool, world: int, queue: int, **keywords: object) -> object:
        """SCE or ReSSL; the mask is made once for a number of rows."""

        def make(function: object) -> object:
            masks: dict[int, Tensor] = {}

            def loss(q: Tensor, k: Tensor, everyone: Tensor, bank: Tensor | None = None) -> Tensor:
                rows = q.shape[0]
                if rows not in masks:
                    masks[rows] = getattr(files[file], f"compute_{file}_mask")(
                        rows, queue, use_keys, world - 1, world
                    )
                weight = [keywords["coeff"]] if "coeff" in keywords else []
                rest = {key: value for key, value in keywords.items() if key != "coeff"}
                return function(q, k, everyone, use_keys, bank, masks[rows], *weight, **rest)

            return loss

        return make

    found = []
    for use_keys, world, queue, frozen in product((True, False), (1, 2), (0, 100), (True, False)):
        if not use_keys and (world > 1 or not queue):
            continue
        shown = (
            f"{'keys' if use_keys else 'no keys'} of {world}, queue of {queue}, "
            f"{'frozen' if frozen else 'with gradient'}"
        )
        given = partial(keyed, queue, world, frozen)
        measured = 4096 if use_keys and frozen and world == 1 and not queue else None
        for suffix, coeff in (("", 0.5), (", accelerated, coeff 0.25", torch.tensor(0.25))):
            found.append(
                case(
                    "sce",
                    shown + suffix,
                    soft("sce", use_keys, world, queue, coeff=coeff),
                    given,
                    measured=None if suffix else measured,
                )
            )
        found += [
            case(
                "sce",
                f"{shown}, temperatures",
                soft("sce", use_keys, world, queue, coeff=0.0, temp=0.2, temp_m=0.05),
                given,
            ),
            case("ressl", shown, soft("ressl", use_keys, world, queue), given, measured=measured),
            case("ressl", f"{shown}, accelerated", soft("ressl", use_keys, world, queue, temp=0.2), given),
        ]

        def moco(function: object, use_keys: bool = use_keys, world: int = world) -> object:
            return lambda q, k, everyone, bank=None: function(
                q, k, everyone, use_keys, bank, temp=0.1, rank=world - 1
            )

        found.append(case("moco", shown, moco, given, measured=measured))
        found.append(case("moco", f"{shown}, accelerated", moco, given))
        if use_keys and not queue:

            def mocov3(function: object, world: int = world) -> object:
                return lambda q, k, everyone: function(q, everyone, 0.2, world - 1)

            found.append(case("mocov3", shown, mocov3, given, measured=measured))
            found.append(case("mocov3", f"{shown}, accelerated", mocov3, given))
    for count, world, alone in ((2, 1, True), (2, 1, False), (2, 2, False), (3, 1, True), (4, 2, False)):

        def simclr(function: object, count: int = count, world: int = world) -> object:
            masks: dict[int, tuple[Tensor, Tensor]] = {}

            def loss(z: Tensor, everyone: Tensor | None = None) -> Tensor:
                rows = z.shape[0]
                if rows not in masks:
                    made = files["simclr"].compute_simclr_masks(rows // count, count, world - 1, world)
                    masks[rows] = made
                return function(z, z if everyone is None else everyone, *masks[rows], 0.2)

            return loss

        shown = f"{count} crops, process {world} of {world}{', z itself' if alone else ''}"
        given = partial(crops, count, world, alone)
        found.append(case("simclr", shown, simclr, given, measured=4096 if alone and count == 2 else None))
        found.append(case("simclr", f"{shown}, accelerated", simclr, given))
    found += _token_cases(case, files["sce_token"])
    return found


def _token_cases(case: object, file: object) -> list[PeerCase]:
    found = []
    for which, aligned, radius, queue, frozen in product(
        ("no keys", "keys", "all keys"), (True, False), (0, 2), (0, 100), (True, False)
    ):
        if (radius == 0 and not aligned) or (which == "all keys" and aligned and radius == 0 and not queue):
            continue
        world = 2 if which == "all keys" else 1
        if which == "no keys" and not queue and radius == 0:
            continue  # one column is left of the query's distribution, and none of the target's

        def make(
            function: object,
            which: str = which,
            aligned: bool = aligned,
            radius: int = radius,
            queue: int = queue,
            world: int = world,
        ) -> object:
            masks: dict[int, tuple] = {}

            def loss(q: Tensor, k: Tensor, everyone: Tensor, bank: Tensor | None = None) -> Tensor:
                rows = q.shape[0]
                if rows not in masks:
                    masks[rows] = file.compute_sce_token_masks(
                        rows // 8, 8, queue, radius, aligned, which == "keys", which == "all keys",
                        world - 1, world,
                    )[:4]  # fmt: skip
                return function(q, k, everyone, bank, *masks[rows], 0.5)

            return loss

        shown = (
            f"{which} of {world}, radius {radius}{'' if aligned else ', not aligned'}, queue of {queue}, "
            f"{'frozen' if frozen else 'with gradient'}"
        )
        measured = 4096 if which == "all keys" and radius == 2 and aligned and frozen and not queue else None
        given = partial(keyed, queue, world, frozen)
        found.append(case("sce_token", shown, make, given, measured=measured))
    return found
