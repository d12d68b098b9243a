"""ConLoss of self-contrastive-learning beside ours."""

from __future__ import annotations

from functools import partial

import torch
from peers.cases import PeerCase
from peers.repositories import clone, load
from peers.supcontrast_cases import classes, unit_views, weights
from torch import Tensor

import cl_kernels
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

    def case(
        views: int,
        supervision: str,
        *flags: str,
        twin: bool = False,
        measured: int | None = None,
        **options: object,
    ) -> PeerCase:
        def make(kind: type, twin: bool = False) -> object:
            loss = kind(**options)
            loss = cl_kernels.accelerate(loss) if twin else loss
            name = "mask" if supervision in ("bool", "weights") else "labels"

            def call(features: Tensor, given: Tensor | None = None) -> Tensor:
                return loss(features, **{name: given}, **dict.fromkeys(flags, True))

            return call

        shown = [f"{k}={v}" for k, v in options.items()] + [f"{views} views", supervision, *flags]
        return PeerCase(
            "selfcon.ConLoss",
            ", ".join([*shown, "accelerated"] if twin else shown),
            partial(make, theirs),
            partial(make, theirs, True) if twin else partial(make, selfcon.ConLoss),
            partial(inputs, views, supervision, 2 if "selfcon_m_FG" in flags else 1),
            # Weights are float32 there, and summed in it.
            close=(1e-7, 5e-6) if supervision == "weights" else (1e-12, 5e-6),
            measured=measured,
        )

    found = [case(2, "labels", twin=True), case(2, "labels", measured=4096)]
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
