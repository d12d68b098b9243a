"""Data, augmentations, encoder, training loop and evaluation of the digits demo."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 128


@dataclass(frozen=True)
class Digits:
    """scikit-learn's bundled digits: images [n, 1, 8, 8] in [0, 1] and labels [n]."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass
class Run:
    losses: list[float]
    first_gradient: Tensor
    step_ms: float
    loss_ms: float
    encoder: Encoder

    @property
    def loss_share(self) -> float:
        return self.loss_ms / self.step_ms


def load_digits(test_size: int = 500) -> Digits:
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    images, labels = load(return_X_y=True)
    parts = train_test_split(images, labels, test_size=test_size, stratify=labels, random_state=0)
    train, test = (torch.as_tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for x in parts[:2])
    return Digits(train, torch.as_tensor(parts[2]), test, torch.as_tensor(parts[3]))


def augment(images: Tensor) -> Tensor:
    """Random rotation, scale and shift, then noise; one draw an image."""
    n = len(images)
    angle = (torch.rand(n) - 0.5) * math.radians(40)
    scale = 1 + (torch.rand(n) - 0.5) * 0.3
    shift = (torch.rand(n, 2) - 0.5) * 0.5  # in half widths: up to one pixel of eight
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    affine = torch.stack((cos, -sin, shift[:, 0], sin, cos, shift[:, 1]), 1).view(n, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False) + 0.05 * torch.randn_like(images)


class Encoder(nn.Module):
    """A small convolutional encoder and the linear projection that the contrast is made on."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            *self.block(1, 32, 1), *self.block(32, 64, 2), *self.block(64, 128, 2), nn.Flatten()
        )  # [n, 512]
        self.projection = nn.Linear(512, WIDTH)

    @staticmethod
    def block(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
        conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        return conv, nn.BatchNorm2d(outputs), nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:  # [n, 128], unit rows
        return F.normalize(self.projection(self.backbone(images)), dim=1)


def train(
    criterion: Callable[[Tensor, Tensor], Tensor],
    data: Digits,
    *,
    steps: int,
    batch: int,
    seed: int,
    on_step: Callable[[float], None],
) -> Run:
    """Train an encoder from `seed`; nothing but `criterion` differs between two runs.

    The loss is differentiated on detached features first, which gives its own time beside the step's.
    """
    torch.manual_seed(seed)
    encoder = Encoder()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses, step_times, loss_times = [], [], []
    first_gradient = torch.empty(0)
    for _ in range(steps):
        start = time.perf_counter()
        chosen = torch.randperm(len(data.train_images))[:batch]
        images, labels = data.train_images[chosen], data.train_labels[chosen]
        z = encoder(torch.cat((augment(images), augment(images))))  # [2B, D], view-major
        features = z.detach().requires_grad_()

        loss_start = time.perf_counter()
        loss = criterion(features.view(2, batch, WIDTH).transpose(0, 1), labels)
        loss.backward()
        loss_times.append(time.perf_counter() - loss_start)

        optimizer.zero_grad()
        z.backward(features.grad)
        if not losses and features.grad is not None:
            first_gradient = features.grad
        optimizer.step()
        schedule.step()
        step_times.append(time.perf_counter() - start)
        losses.append(loss.item())
        on_step(losses[-1])
    middle = len(step_times) // 2
    step_ms, loss_ms = (1e3 * sorted(times)[middle] for times in (step_times, loss_times))
    return Run(losses, first_gradient, step_ms, loss_ms, encoder)


def disagreement(one: Run, other: Run) -> tuple[float, float]:
    """Differences of the first step's gradients, in norm, and of the loss curves at most; both relative.

    Infinite where a loss is not finite. Rounding grows from step to step, so the curves differ by more.
    """
    gradient = float((one.first_gradient - other.first_gradient).norm() / one.first_gradient.norm())
    if not all(map(math.isfinite, [*one.losses, *other.losses, gradient])):
        return math.inf, math.inf
    return gradient, max(
        abs(a - b) / max(abs(a), 1e-12) for a, b in zip(one.losses, other.losses, strict=True)
    )


@torch.no_grad()
def accuracy(encoder: Encoder, data: Digits, neighbours: int = 5) -> tuple[float, float]:
    """Held-out accuracy of k nearest neighbours (cosine) and of a linear probe on the backbone's features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    encoder.eval()
    train = F.normalize(encoder.backbone(data.train_images), dim=1).numpy()
    test = F.normalize(encoder.backbone(data.test_images), dim=1).numpy()
    encoder.train()
    nearest = KNeighborsClassifier(neighbours, metric="cosine").fit(train, data.train_labels)
    probe = LogisticRegression(C=10, max_iter=500).fit(train, data.train_labels)
    return nearest.score(test, data.test_labels), probe.score(test, data.test_labels)
