"""ConLoss of self-contrastive-learning beside ours."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peers.cases import ACCELERATED, Loss, PeerCase, classes, unit_views, ways, weights
from peers.repositories import clone, load
from torch import Tensor

from cl_kernels.integrations import selfcon

NEEDS = ()


def inputs(
    views: int,
    supervision: str,
    augmentations: int,
    rows: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> list[Tensor]:
    samples = rows // augmentations
    x = unit_views(rows, views, 128, dtype=dtype, generator=generator)
    if supervision == "none":
        return [x]
    if supervision in ("bool", "weights"):
        mask = weights(supervision, samples, generator)
        mask[:, 2] = True  # positives in other views, which there must be
        return [x, mask]
    labels = classes(samples, generator)
    if supervision == "lonely labels":
        labels[3] = 77
    return [x, labels]


def cases() -> list[PeerCase]:
    if clone("self-contrastive-learning") is None:
        return []
    theirs = load("self-contrastive-learning", "losses/losses.py").ConLoss
    ours = ways(theirs, selfcon.ConLoss)

    def case(
        views: int,
        supervision: str,
        *flags: str,
        way: str = "",
        measured: int | None = None,
        **options: Any,
    ) -> PeerCase:
        def make(kind: Any) -> Loss:
            loss = kind(**options)
            name = "mask" if supervision in ("bool", "weights") else "labels"

            def call(features: Tensor, given: Tensor | None = None) -> Tensor:
                return loss(features, **{name: given}, **dict.fromkeys(flags, True))

            return call

        shown = [f"{k}={v}" for k, v in options.items()] + [f"{views} views", supervision, *flags]
        return PeerCase(
            "selfcon.ConLoss",
            ", ".join(shown) + way,
            partial(make, theirs),
            partial(make, ours[way]),
            partial(inputs, views, supervision, 2 if "selfcon_m_FG" in flags else 1),
            # Weights are float32 there, and summed in it.
            close=(1e-7, 5e-6) if supervision == "weights" else (1e-12, 5e-6),
            measured=measured,
        )

    found = [case(2, "labels", way=ACCELERATED), case(2, "labels", measured=4096)]
    for supervision in ("none", "labels", "bool", "weights"):
        for views in (2, 3):
            found += [
                case(views, supervision, temperature=0.1),
                case(views, supervision, contrast_mode="one", base_temperature=0.1),
                case(views, supervision, "selfcon_s_FG"),
                case(views, supervision, "selfcon_s_FG", temperature=0.5, contrast_mode="one"),
                case(views, supervision, "selfcon_m_FG", temperature=0.1),
            ]
        found.append(case(2, supervision, "supcon_s", contrast_mode="one"))
        found.append(case(2, supervision, "supcon_s", "selfcon_s_FG"))
    for supervision in ("labels", "lonely labels", "bool", "weights"):
        found.append(case(1, supervision, "supcon_s", temperature=0.1))
    found.append(case(1, "labels"))
    return found
