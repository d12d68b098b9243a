"""SupContrast's SupConLoss beside ours."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import torch
from peers.cases import ACCELERATED, Loss, PeerCase, classes, unit_views, ways, weights
from peers.repositories import clone, load
from torch import Tensor

from cl_kernels.integrations import supcontrast

NEEDS = ()


def inputs(
    views: int, supervision: str, rows: int, dtype: torch.dtype, generator: torch.Generator, width: int = 128
) -> list[Tensor]:
    x = unit_views(rows, views, width, dtype=dtype, generator=generator)
    if supervision == "none":
        return [x]
    labels = classes(rows, generator)
    return [x, labels if supervision == "labels" else weights(supervision, rows, generator)]


def as_mask(loss: Loss) -> Loss:
    return lambda features, mask: loss(features, mask=mask)


def cases() -> list[PeerCase]:
    if clone("SupContrast") is None:
        return []
    theirs = load("SupContrast", "losses.py").SupConLoss
    ours = ways(theirs, supcontrast.SupConLoss)

    def case(options: dict[str, Any], views: int, supervision: str, way: str = "") -> PeerCase:
        def make(kind: Any) -> Loss:
            loss = kind(**options)
            return loss if supervision in ("none", "labels") else as_mask(loss)

        shown = ", ".join(f"{k}={v}" for k, v in options.items())
        return PeerCase(
            "supcontrast.SupConLoss",
            f"{shown or 'defaults'}, {views} views, {supervision}{way}",
            partial(make, theirs),
            partial(make, ours[way]),
            partial(inputs, views, supervision),
            # Weights are float32 there, and summed in it.
            close=(1e-7, 5e-6) if supervision == "weights" else (1e-12, 5e-6),
            measured=4096 if not options and views == 2 and supervision == "labels" else None,
        )

    found = [case({}, 2, "labels"), case({}, 2, "labels", ACCELERATED)]
    for mode, views, supervision in product(("all", "one"), (1, 2, 3), ("none", "labels", "bool", "weights")):
        if (views, supervision) != (1, "none"):  # no positives at all: 0 there and here
            options = {"contrast_mode": mode, "temperature": 0.1}
            found.append(case(options, views, supervision))
    found.append(case({"temperature": 0.5, "base_temperature": 0.07}, 2, "labels"))
    found.append(case({"temperature": 0.2, "base_temperature": 1.0, "contrast_mode": "one"}, 2, "bool"))
    return found
