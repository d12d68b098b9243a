"""Settings of the paper and of two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..supcon.presets import SupConSettings

Name = Literal[
    "selfcon-s",
    "selfcon-su",
    "selfcon-sa",
    "selfcon-m",
    "selfcon-mu",
    "selfcon-ma",
    "supcon",
    "simclr",
    "cross-entropy",
]


@dataclass(frozen=True)
class SelfConSettings(SupConSettings):
    methods: tuple[Name, ...] = ("selfcon-s", "selfcon-m", "supcon", "cross-entropy")
    """selfcon-s: one view; -su: no labels; -sa: S*, with alpha; -m, -mu, -ma: two views; the others have no
    exits. In -mu all rows of an image, of both views, are its positives; the authors' code has each view's
    alone."""
    exits: tuple[int, ...] = (2,)
    """Stages, of 1 to 3, that an exit follows."""
    exit: Literal["fc", "small", "same"] = "fc"
    """Sub-network of an exit: a linear layer, or the later stages again with half or all of their blocks."""
    alpha: float = 1.0
    """Weight of the exits' loss in selfcon-sa and -ma; 1 is chosen."""


# The authors' script for CIFAR-100: 1000 epochs, 10 of them warm-up, of 1024 images, learning rate 0.5.
PAPER = SelfConSettings(
    data="cifar100", epochs=1000, batch=1024, lr=0.5, warmup=10, depth=18, width=64, stem="cifar"
)

# The authors' scripts/selfcon_represent_imagenet.sh. What departs: float16 there, and no blur of the views.
PAPER_IMAGENET = SelfConSettings(
    methods=("selfcon-s",),
    data="imagenet",
    epochs=800,
    batch=2048,
    lr=0.25,
    warmup=10,
    depth=34,
    width=64,
    stem="imagenet",
    exit="same",
)

# The paper's heads have no norm. Here, without it, all rows of exit and backbone fall to one point within 20
# steps, at learning rates of 0.02 to 0.5, and stay there: a head's rows differ less than the heads' means.
CPU = SelfConSettings(epochs=10, batch=250, lr=0.2, warmup=1, norm=True)

PRESETS = {"cpu": CPU, "paper": PAPER, "paper-imagenet": PAPER_IMAGENET}
