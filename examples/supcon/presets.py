"""Settings of the paper and of two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..common.settings import Settings


@dataclass(frozen=True)
class SupConSettings(Settings):
    methods: tuple[Literal["supcon", "supcon-in", "simclr", "cross-entropy"], ...] = (
        "supcon",
        "simclr",
        "cross-entropy",
    )
    """supcon: the paper's equation 2, "out"; supcon-in: its equation 3; simclr: no labels; cross-entropy."""
    temperature: float = 0.1
    simclr_temperature: float = 0.5
    norm: bool = False
    """Batch norm after each linear layer of the projection heads."""
    views: int = 1
    """Views of an image a step that cross-entropy has; the other methods have two."""
    memory: int = 0
    """Rows of earlier batches, with their labels, that supcon contrasts with too."""


# SupContrast's CIFAR runs: 1000 epochs of 1024 images, learning rate 0.5, 10 epochs of warm-up, D = 128.
PAPER = SupConSettings(
    data="cifar10", epochs=1000, batch=1024, lr=0.5, warmup=10, depth=50, width=64, stem="cifar"
)

# google-research/google-research, supcon/scripts/supcon_imagenet_resnet50.sh, with the defaults of its flags:
# a learning rate of 0.4 for 256 images, 12 epochs of warm-up. What departs: AutoAugment there, MoCo v2 views
# here; a head of one layer on unit features there; biases adapted and decayed there; their LARS divides by
# ‖g + β w‖; and their loss has no factor 1 / 0.07, on which LARS's steps of weights hardly depend.
PAPER_IMAGENET = SupConSettings(
    methods=("supcon",),
    data="imagenet",
    epochs=350,
    batch=6144,
    lr=9.6,
    warmup=12,
    optimizer="lars",
    weight_decay=1e-3,
    depth=50,
    width=64,
    stem="imagenet",
)

PRESETS = {
    "cpu": SupConSettings(epochs=15, batch=250, lr=0.2, warmup=1),
    "paper": PAPER,
    "paper-imagenet": PAPER_IMAGENET,
}
