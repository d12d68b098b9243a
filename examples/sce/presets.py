"""Settings of the paper and of two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..common.settings import Settings


@dataclass(frozen=True)
class SCESettings(Settings):
    methods: tuple[Literal["sce", "ressl", "moco"], ...] = ("sce", "ressl", "moco")
    """sce: coefficient and temperatures as below; ressl: coefficient 0, temperatures 0.1 and 0.04; moco:
    coefficient 1."""
    temperature: float = 0.1
    target_temperature: float = 0.05
    """Temperature of the similarities to the teacher; below the other one, it sharpens them."""
    coeff: float = 0.5
    """λ, the weight of the positive; the similarities have the rest."""

    temperature_start: float | None = None
    """Where a schedule begins that leads to the temperature; None: it is constant. The next two likewise."""
    target_temperature_start: float | None = None
    coeff_start: float | None = None
    schedule: Literal["cosine", "linear"] = "cosine"
    schedule_epochs: float | None = None
    """Epochs of these schedules, after which the values stay: a warm-up; None: all."""

    symmetric: bool = False
    """Two strong views, each the teacher's view for the other; else the teacher has a weak view."""
    crops: int = 0
    """Small views for the student alone, which share the teacher's targets."""

    queue: int = 1024
    """Keys K of earlier batches."""
    teacher_momentum: float = 0.99
    teacher_schedule: Literal["constant", "cosine"] = "constant"
    """cosine: the teacher's momentum goes to 1."""
    predictor: bool = False
    """A further head on the student's projections."""
    layers: Literal[2, 3] = 2
    """Layers of the projector."""
    hidden: int = 512
    """Width of the heads' hidden layers."""


# CEA-LIST/SCE, run/pretrain/sce/resnet18/resnet18_cifar10.yaml. Batch norm there is over eighths of the
# batch, shuffled; here over all of it.
PAPER = SCESettings(
    data="cifar10",
    epochs=200,
    batch=256,
    lr=0.06,
    warmup=5,
    weight_decay=5e-4,
    depth=18,
    width=64,
    stem="cifar",
    queue=4096,
)

# CEA-LIST/SCE, run/pretrain/sce/resnet50/resnet50_imagenet_multi_crop.yaml: a learning rate of 0.3 for 256
# images. Their LARS divides by ‖g + β w‖ and multiplies by the learning rate after the momentum.
PAPER_IMAGENET = SCESettings(
    data="imagenet",
    epochs=200,
    batch=4096,
    lr=4.8,
    warmup=10,
    optimizer="lars",
    weight_decay=1e-6,
    depth=50,
    width=64,
    stem="imagenet",
    projection=256,
    target_temperature=0.07,
    queue=65536,
    symmetric=True,
    crops=4,
    teacher_schedule="cosine",
    predictor=True,
    layers=3,
    hidden=4096,
)

# Chosen: few steps ask for a teacher that follows faster.
CPU = SCESettings(
    epochs=15, batch=250, lr=0.2, warmup=1, teacher_momentum=0.95, teacher_schedule="cosine", hidden=256
)

PRESETS = {"cpu": CPU, "paper": PAPER, "paper-imagenet": PAPER_IMAGENET}
