"""SupContrast's SupConLoss beside ours."""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from peers.cases import PeerCase
from peers.repositories import clone, load
from torch import Tensor

import cl_kernels
from cl_kernels.integrations import supcontrast

NEEDS = ()


def unit_views(*sizes: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rows of unit length, the same numbers in every dtype."""
    x = torch.randn(*sizes, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1).to(dtype).requires_grad_()


def classes(rows: int, generator: torch.Generator, count: int = 5) -> Tensor:
    """Labels, those of the first `count` rows twice at least."""
    labels = torch.randint(0, count, (rows,), generator=generator)
    labels[: 2 * count] = torch.arange(2 * count)[: len(labels)] % count
    return labels


def weights(kind: str, rows: int, generator: torch.Generator) -> Tensor:
    """A mask: "bool" of some others, with rows that have none; "weights" between 0 and 1, not symmetric."""
    chance = torch.rand(rows, rows, generator=generator, dtype=torch.float64)
    if kind == "weights":
        return chance
    mask = chance < 0.3
    mask[1] = False
    return mask


def inputs(
    views: int, supervision: str, rows: int, dtype: torch.dtype, generator: torch.Generator, width: int = 128
) -> list[Tensor]:
    x = unit_views(rows, views, width, dtype=dtype, generator=generator)
    if supervision == "none":
        return [x]
    labels = classes(rows, generator)
    return [x, labels if supervision == "labels" else weights(supervision, rows, generator)]


def as_mask(loss: torch.nn.Module) -> object:
    return lambda features, mask: loss(features, mask=mask)


def cases() -> list[PeerCase]:
    if clone("SupContrast") is None:
        return []
    theirs = load("SupContrast", "losses.py").SupConLoss

    def case(options: dict, views: int, supervision: str, accelerated: bool = False) -> PeerCase:
        def make(kind: type, twin: bool = False) -> object:
            loss = kind(**options)
            loss = cl_kernels.accelerate(loss) if twin else loss
            return loss if supervision in ("none", "labels") else as_mask(loss)

        shown = ", ".join(f"{k}={v}" for k, v in options.items())
        return PeerCase(
            "supcontrast.SupConLoss",
            f"{shown or 'defaults'}, {views} views, {supervision}{', accelerated' if accelerated else ''}",
            partial(make, theirs),
            partial(make, theirs, True) if accelerated else partial(make, supcontrast.SupConLoss),
            partial(inputs, views, supervision),
            # Weights are float32 there, and summed in it.
            close=(1e-7, 5e-6) if supervision == "weights" else (1e-12, 5e-6),
            measured=4096 if not options and views == 2 and supervision == "labels" else None,
        )

    found = [case({}, 2, "labels"), case({}, 2, "labels", accelerated=True)]
    for mode, views, supervision in product(("all", "one"), (1, 2, 3), ("none", "labels", "bool", "weights")):
        if (views, supervision) != (1, "none"):  # no positives at all: 0 there and here
            options = {"contrast_mode": mode, "temperature": 0.1}
            found.append(case(options, views, supervision))
    found.append(case({"temperature": 0.5, "base_temperature": 0.07}, 2, "labels"))
    found.append(case({"temperature": 0.2, "base_temperature": 1.0, "contrast_mode": "one"}, 2, "bool"))
    return found
