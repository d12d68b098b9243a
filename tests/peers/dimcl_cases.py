"""DimCL's losses beside ours, in one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peers.cases import ACCELERATED, Inputs, Loss, PeerCase, features, ways, with_queue
from peers.repositories import clone, load_solo
from torch import Tensor

from cl_kernels.integrations import dimcl

NEEDS = ()
FILES = ("oursloss", "moco")


def views(
    correlated: bool, extra: bool, rows: int, dtype: torch.dtype, generator: torch.Generator
) -> list[Tensor]:
    """Two views [256, D] of D as many columns as `rows`, indexes, and a mask of further positives."""
    z1 = features(256, rows, dtype, generator)
    z2 = features(256, rows, dtype, generator)
    if correlated:
        z2 = (z1.detach() + 0.3 * z2.detach()).requires_grad_()
    found = [z1, z2, torch.arange(256)]
    if extra:
        mask = torch.rand(2 * rows, 2 * rows, generator=generator, dtype=torch.float64) < 0.1
        found.append(mask.fill_diagonal_(False))
    return found


def cases() -> list[PeerCase]:
    if clone("DimCL") is None:
        return []
    theirs = load_solo("DimCL", FILES)

    def case(
        name: str,
        options: str,
        inputs: Inputs,
        way: str = "",
        measured: int | None = None,
        **keywords: Any,
    ) -> PeerCase:
        original = getattr(theirs["moco" if name == "moco_loss_func" else "oursloss"], name)
        ours = ways(original, getattr(dimcl, name))[way]

        def call(function: Loss) -> Loss:
            def loss(*given: Tensor) -> Tensor:
                extra = {"extra_pos_mask": given[3]} if len(given) == 4 else {}
                before = torch.get_default_dtype()
                torch.set_default_dtype(given[0].dtype)  # that of their batch norm's buffers
                try:
                    return function(*given[:3], **extra, **keywords)
                finally:
                    torch.set_default_dtype(before)

            return loss

        return PeerCase(
            f"dimcl.{name}",
            ", ".join([options + way, *(f"{k}={v}" for k, v in keywords.items())]),
            partial(call, original),
            partial(call, ours),
            inputs,
            # A loss near 0, that of columns whose positives are most of their sums, has fewer digits.
            close=(1e-12, 5e-5 if "correlated" in options else 5e-6),
            measured=measured,
        )

    found = []
    for correlated in (False, True):
        shown = "correlated views" if correlated else "views"
        given = partial(views, correlated, False)
        found += [
            case("ours_loss_func", shown, given, measured=None if correlated else 4096),
            case("ours_loss_func", shown, given, ACCELERATED, tau_decor=0.5),
            case("ours_loss_func", f"{shown}, extra positives", partial(views, correlated, True)),
            case("ours_loss_func_multigpu", shown, given),
            case("ours_loss_func_multigpu", shown, given, ACCELERATED, tau_decor=0.5),
            case("ours_simple_loss_func", shown, given, measured=None if correlated else 4096),
            case("ours_simple_loss_func", shown, given, ACCELERATED, lam_simple=0.3),
        ]
    for frozen in (True, False):
        shown = "frozen keys" if frozen else "keys with gradient"
        given = partial(with_queue, 100, True, frozen)
        found.append(case("moco_loss_func", shown, given))
        found.append(case("moco_loss_func", shown, given, ACCELERATED, temperature=0.2))
    return found
