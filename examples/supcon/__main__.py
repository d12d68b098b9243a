"""Supervised contrastive learning (Khosla et al., 2020).

Two views of each image pass an encoder and a projection head, and the loss contrasts all views by their
labels; then the head is dropped, and a linear classifier is trained on the frozen encoder.

    python -m examples.supcon [--preset cpu | paper | paper-imagenet] [--methods supcon simclr] [--help]
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cl_kernels as clk
from cl_kernels.bench import eager

from ..common import processes
from ..common.augment import Draw, supervised
from ..common.data import Data
from ..common.encoders import ResNet, mlp, pool
from ..common.evaluate import Evaluation, classification
from ..common.loop import Method
from ..common.run import Recipe
from .presets import PRESETS, SupConSettings


class SupCon(Method):
    """Encoder and projection head under the supervised contrastive loss of two views of each image."""

    def __init__(self, settings: SupConSettings, name: str, data: Data) -> None:
        super().__init__()
        self.encoder = ResNet(data.channels, settings)
        width = self.encoder.widths[-1]
        self.head = mlp(width, width, settings.projection, norm=settings.norm, last_norm=settings.norm)
        self.augment = supervised(data.shape)
        self.criterion, self.memory = self.loss(settings, name)

    def loss(self, settings: SupConSettings, name: str) -> tuple[Any, clk.KeyQueue | None]:
        if settings.formula == "eager":
            if name == "supcon-in" or settings.memory:
                raise ValueError("formula eager has no supcon-in and no memory")
            return partial(eager.supcon, settings.temperature), None
        group = processes.group()
        summation = "in" if name == "supcon-in" else "out"
        criterion = clk.SupConLoss(
            settings.temperature, summation=summation, group=group, exchange=settings.exchange
        )
        if not settings.memory:
            return criterion, None
        return criterion, clk.KeyQueue(settings.memory, settings.projection, labels=True, group=group)

    def project(self, images: Tensor, draw: Draw) -> Tensor:
        """Unit rows [2, B, D] of two views."""
        views = torch.cat([self.augment(images, draw), self.augment(images, draw)])
        return F.normalize(self.head(self.encode(views)).float(), dim=1).unflatten(0, (2, -1))

    def forward(self, images: Tensor, labels: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.project(images, draw).transpose(0, 1)  # [B, 2, D]
        if self.memory is None:
            return self.criterion(features, labels), {}
        loss = self.criterion(features, labels, memory=self.memory)
        self.memory.enqueue(features.flatten(0, 1), labels.repeat_interleave(2))
        return loss, {}

    def encode(self, images: Tensor) -> Tensor:
        return pool(self.encoder(images)[-1])


class SimCLR(SupCon):
    """The same without labels: each image is its own class; with SupContrast's factor τ / 0.07."""

    def loss(self, settings: SupConSettings, name: str) -> tuple[Any, None]:
        temperature = settings.simclr_temperature
        if settings.formula == "eager":
            return lambda z: eager.supcon(temperature, z, torch.arange(len(z), device=z.device)), None
        return clk.SupConLoss(temperature, group=processes.group(), exchange=settings.exchange), None

    def forward(self, images: Tensor, labels: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        return self.criterion(self.project(images, draw).transpose(0, 1)), {}


class CrossEntropy(Method):
    """The encoder under a linear classifier, from one view of each image or more."""

    def __init__(self, settings: SupConSettings, name: str, data: Data) -> None:
        super().__init__()
        self.encoder = ResNet(data.channels, settings)
        self.classifier = nn.Linear(self.encoder.widths[-1], data.classes)
        self.augment, self.views = supervised(data.shape), settings.views

    def forward(self, images: Tensor, labels: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        views = torch.cat([self.augment(images, draw) for _ in range(self.views)])
        return F.cross_entropy(self.classifier(self.encode(views)), labels.repeat(self.views)), {}

    def encode(self, images: Tensor) -> Tensor:
        return pool(self.encoder(images)[-1])


METHODS = {"supcon": SupCon, "supcon-in": SupCon, "simclr": SimCLR, "cross-entropy": CrossEntropy}


def build(settings: SupConSettings, name: str, data: Data) -> Method:
    return METHODS[name](settings, name, data)


def evaluate(method: Method, data: Data) -> Evaluation:
    return classification(method, data, corruptions=True)


RECIPE = Recipe("supcon", __doc__, PRESETS, build, evaluate)

if __name__ == "__main__":
    RECIPE.main()
