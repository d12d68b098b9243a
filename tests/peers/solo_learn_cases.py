"""solo-learn's losses beside ours, in one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peers.cases import ACCELERATED, Inputs, PeerCase, classes, features, ways, with_queue
from peers.repositories import clone, load_solo
from torch import Tensor

from cl_kernels.integrations import solo_learn

NEEDS = ()
FILES = ("simclr", "mocov2plus", "mocov3", "nnclr", "ressl")


def indexed(kind: str, rows: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Rows of any length and their indexes: of two or three views, or of classes."""
    z = features(rows, 128, dtype, generator)
    if kind == "classes":
        return [z, classes(rows, generator)]
    if kind == "shuffled pairs":
        return [z, (torch.arange(rows) // 2)[torch.randperm(rows, generator=generator)]]
    views = {"two views": 2, "three views": 3}[kind]
    return [z, torch.arange(rows // views).repeat(views)]


def pair(rows: int, dtype: torch.dtype, generator: torch.Generator, frozen: bool = False) -> list[Tensor]:
    return [features(rows, 128, dtype, generator), features(rows, 128, dtype, generator, not frozen)]


def cases() -> list[PeerCase]:
    if clone("solo-learn") is None:
        return []
    theirs = load_solo("solo-learn", FILES)

    def case(
        file: str, options: str, inputs: Inputs, way: str = "", measured: bool = False, **keywords: Any
    ) -> PeerCase:
        name = f"{file}_loss_func"
        original = getattr(theirs[file], name)
        ours = ways(original, getattr(solo_learn, name))[way]
        shown = ", ".join([options + way, *(f"{k}={v}" for k, v in keywords.items())])
        return PeerCase(
            f"solo_learn.{name}",
            shown,
            lambda: partial(original, **keywords),
            lambda: partial(ours, **keywords),
            inputs,
            measured=4096 if measured else None,
        )

    found = [case("simclr", "two views", partial(indexed, "two views"), ACCELERATED)]
    for kind in ("two views", "three views", "classes", "shuffled pairs"):
        found.append(case("simclr", kind, partial(indexed, kind), measured=kind == "two views"))
        found.append(case("simclr", kind, partial(indexed, kind), temperature=0.5))
    for frozen in (True, False):
        shown = "frozen keys" if frozen else "keys with gradient"
        for file in ("mocov3", "nnclr"):
            given = partial(pair, frozen=frozen)
            found.append(case(file, shown, given, measured=frozen))
            found.append(case(file, shown, given, ACCELERATED, temperature=0.07))
        moco, ressl = (partial(with_queue, 100, transposed, frozen) for transposed in (True, False))
        for way in ("", ACCELERATED):
            found += [
                case("mocov2plus", shown, moco, way),
                case("mocov2plus", shown, moco, way, temperature=0.2),
                case("ressl", shown, ressl, way),
                case("ressl", shown, ressl, way, temperature_q=0.2, temperature_k=0.1),
            ]
    found.append(case("mocov2plus", "as many keys", partial(with_queue, 0, True, True), measured=True))
    found.append(case("ressl", "as many keys", partial(with_queue, 0, False, True), measured=True))
    return found
