"""Similarity contrastive estimation (Denize et al., 2023): a student learns which earlier images a teacher,
its moving average, finds similar to an image; mixed with the contrast of the positive to all others.

    python -m examples.sce [--preset cpu|paper|paper-imagenet] [--methods sce ressl moco] [--help]
    python -m examples.sce --symmetric --crops 4

Images meet their own keys and a queue, which is the same on all processes: the loss has no rows to exchange,
and --exchange changes nothing.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cl_kernels as clk

from ..common import processes
from ..common.augment import DIGITS_STRONG, DIGITS_WEAK, MOCO_V2, WEAK, Augmentation, Draw
from ..common.data import Data
from ..common.encoders import Projected, ResNet, mlp
from ..common.evaluate import classification
from ..common.loop import Method
from ..common.momentum import cosine, follow, follower
from ..common.precision import exactly
from ..common.run import Recipe
from .presets import PRESETS, SCESettings

METHODS: dict[str, dict[str, float]] = {
    "sce": {},
    "ressl": {"temperature": 0.1, "target_temperature": 0.04, "coeff": 0.0},  # Zheng et al., 2021
    "moco": {"coeff": 1.0},  # He et al., 2020
}


class SCE(Method):
    """Student and teacher, each an encoder and a projector, and a queue of the teacher's keys."""

    def __init__(self, settings: SCESettings, name: str, data: Data) -> None:
        super().__init__()
        self.settings, self.fixed = settings, METHODS[name]
        width = settings.projection
        encoder = ResNet(data.channels, settings)
        hidden = [settings.hidden] * (settings.layers - 1)
        self.student = Projected(encoder, mlp(encoder.widths[-1], *hidden, width, norm=True))
        self.teacher = follower(self.student)
        self.predictor = nn.Identity()
        if settings.predictor:
            self.predictor = mlp(width, settings.hidden, width, norm=True)
        self.queue = full_queue(settings.queue, width)
        side = min(data.shape[-1], 224)
        strong, weak = (DIGITS_STRONG, DIGITS_WEAK) if data.channels == 1 else (MOCO_V2, WEAK)
        self.strong, self.weak = replace(strong, size=side), replace(weak, size=side)  # as in CEA-LIST/SCE
        self.small = small_views(self.strong, settings.crops, side)
        self.before_step(0.0)

    def before_step(self, progress: float) -> None:
        """Set both temperatures and the coefficient."""
        names = "temperature", "target_temperature", "coeff"
        self.now = {name: self.fixed.get(name, scheduled(self.settings, name, progress)) for name in names}

    def forward(self, images: Tensor, labels: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        symmetric = self.settings.symmetric
        if symmetric:
            seen = taught = [self.strong(images, draw), self.strong(images, draw)]
        else:
            seen, taught = [self.strong(images, draw)], [self.weak(images, draw)]
        small = [augment(images, draw) for augment in self.small]
        queries = [unit(self.predictor(self.student(view))) for view in (*seen, *small)]
        losses: list[Tensor] = []
        self.keys = []
        for i, view in enumerate(taught):
            with torch.no_grad():
                self.keys.append(unit(self.teacher(view)))
            others = [q for j, q in enumerate(queries) if not symmetric or i != j]
            losses += self.losses(others, self.keys[-1])
        return torch.stack(losses).mean(), {}

    def losses(self, queries: list[Tensor], k: Tensor) -> list[Tensor]:
        """The loss of each view's rows [B, D] against the teacher's [B, D]."""
        if self.settings.formula == "eager":
            with exactly(k):
                return [eager_sce(q, k, self.queue.filled, **self.now) for q in queries]
        targets = None
        if len(queries) > 1:
            targets = clk.sce_targets(k, queue=self.queue, target_temperature=self.now["target_temperature"])
        return [clk.sce_loss(q, k, queue=self.queue, targets=targets, **self.now) for q in queries]

    def after_step(self, progress: float) -> None:
        for k in self.keys:
            self.queue.enqueue(k)
        momentum = self.settings.teacher_momentum
        if self.settings.teacher_schedule == "cosine":
            momentum = cosine(momentum, 1.0, progress)
        follow(self.teacher, self.student, momentum)

    def encode(self, images: Tensor) -> Tensor:
        return self.student.encode(images)


def unit(z: Tensor) -> Tensor:
    return F.normalize(z.float(), dim=1)


def full_queue(size: int, width: int) -> clk.KeyQueue:
    """A queue over all processes, full of random unit rows: beside an empty one the first loss would be 0."""
    rows = clk.KeyQueue(size, width)
    rows.enqueue(unit(torch.randn(size, width)))
    queue = clk.KeyQueue(size, width, group=processes.group())
    queue.load_state_dict(rows.state_dict())
    return queue


def small_views(strong: Augmentation, count: int, side: int) -> list[Augmentation]:
    """Views from 6/7 to 3/7 of the side, of crops whose area shrinks with it; as the authors' for count 4."""
    if count < 0:
        raise ValueError(f"crops must be at least 0, got {count}")
    parts = torch.linspace(6 / 7, 3 / 7, count).tolist()
    return [replace(strong, size=round(part * side), crop=(0.2 * part, part)) for part in parts]


def scheduled(settings: SCESettings, name: str, progress: float) -> float:
    """Value of a temperature or of the coefficient when `progress` of the training, 0 to 1, has passed."""
    start, end = getattr(settings, f"{name}_start"), getattr(settings, name)
    if start is None:
        return end
    if settings.schedule_epochs is not None:
        if settings.schedule_epochs <= 0:
            raise ValueError(f"schedule_epochs must be positive, got {settings.schedule_epochs}")
        progress = min(progress * settings.epochs / settings.schedule_epochs, 1.0)
    return cosine(start, end, progress) if settings.schedule == "cosine" else start + (end - start) * progress


def eager_sce(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float, target_temperature: float, coeff: float
) -> Tensor:
    """The published formula (equations 4 to 6): rows q, k [B, D] and queue [K, D]."""
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temperature
    similar = torch.softmax(k @ queue.T / target_temperature, 1)
    log_p = torch.log_softmax(logits, 1)
    return -(coeff * log_p[:, 0] + (1 - coeff) * (similar * log_p[:, 1:]).sum(1)).mean()


RECIPE = Recipe("sce", __doc__, PRESETS, SCE, classification, labelled=False)

if __name__ == "__main__":
    RECIPE.main()
