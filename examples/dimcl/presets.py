"""Settings of the paper and of two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..common.settings import Settings

Name = Literal[
    "byol",
    "byol+dimcl",
    "simsiam",
    "simsiam+dimcl",
    "simclr",
    "simclr+dimcl",
    "barlow",
    "barlow+dimcl",
]


@dataclass(frozen=True)
class DimCLSettings(Settings):
    methods: tuple[Name, ...] = ("byol", "byol+dimcl", "simsiam", "simsiam+dimcl")
    """A loss alone, or with DimCL beside it."""
    weight: float = 0.1
    """λ of DimCL; the other loss has 1 - λ."""
    temperature: float = 0.1
    """τ of DimCL: the lower, the more the most alike features weigh."""

    simclr_temperature: float = 0.2
    barlow_weight: float = 0.005
    """Weight of the correlations off the diagonal."""
    barlow_scale: float = 0.1
    """Factor of the whole loss."""
    teacher_momentum: float = 0.99
    """Momentum of BYOL's target network; it goes to 1."""
    views: Literal["same", "byol"] = "same"
    """Augmentations of the two views: the same, or BYOL's without blur, of which the second solarizes."""

    projection_wide: int = 2048
    """D of SimSiam and Barlow Twins; BYOL and SimCLR have `projection`."""
    hidden: int = 2048
    """Width of the projectors' hidden layers."""
    hidden_predictor: int = 512
    """Width of the predictors'."""


# thanhkaist/DimCL, bash_files/pretrain/cifar/simsiam.sh; the 10 epochs of warm-up are its default. What
# departs: there, blocks begin as the identity, the first convolution pads by 2, and training is in float16.
# SimCLR's temperature, the scale of Barlow Twins and BYOL's momentum above are from the scripts beside it.
PAPER = DimCLSettings(
    methods=("simsiam", "simsiam+dimcl"),
    data="cifar100",
    epochs=200,
    batch=256,
    lr=0.5,
    warmup=10,
    weight_decay=1e-5,
    depth=18,
    width=64,
    stem="cifar",
)

# byol.sh there. What departs, beside padding and float16: the step of its LARS is the smaller of the learning
# rate and trust · ‖w‖ / (‖g‖ + β ‖w‖), here their product; at the highest rate, 1, these are equal unless the
# second is above 1. SimCLR and Barlow Twins are trained so too, at 0.4 and 0.3, with views of their own.
PAPER_BYOL = replace(
    PAPER,
    methods=("byol", "byol+dimcl"),
    lr=1.0,
    optimizer="lars",
    trust=0.02,
    projection=256,
    hidden=4096,
    hidden_predictor=4096,
    views="byol",
)

# Chosen: narrow heads, and a target network that follows faster.
CPU = DimCLSettings(
    epochs=15,
    batch=250,
    lr=0.2,
    warmup=1,
    projection=128,
    projection_wide=256,
    hidden=256,
    hidden_predictor=128,
    teacher_momentum=0.95,
)

PRESETS = {"cpu": CPU, "paper": PAPER, "paper-byol": PAPER_BYOL}
