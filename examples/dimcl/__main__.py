"""Dimensional contrastive learning (Nguyen et al., 2023): a regulariser to make the features of projections
unlike one another, beside a loss that makes two views of an image alike.

    python -m examples.dimcl [--preset cpu|paper|paper-byol] [--methods byol ...] [--temperature 0.1] [--help]

Beside the accuracy on frozen features, the figures are the mean absolute correlation of two features, of the
representation (corr. h) and of the projection (corr. z), which is lower where they are more diverse; and the
share of DimCL's gradient at its temperature that comes from the most alike tenth of a feature's negatives
(hardest tenth): 0.1 at a high temperature, where all weigh the same, and up to 1 at a low one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import cl_kernels as clk
from cl_kernels.bench import eager

from ..common import processes
from ..common.augment import BYOL_1, BYOL_2, DIGITS_STRONG, SIMCLR_CIFAR, Draw
from ..common.data import Data
from ..common.encoders import Projected, ResNet, mlp
from ..common.evaluate import BATCH, Evaluation, classification, diversity
from ..common.loop import Method
from ..common.momentum import cosine, follow, follower
from ..common.precision import exactly
from ..common.run import Recipe
from .presets import PRESETS, DimCLSettings

Loss = Callable[[Tensor, Tensor], Tensor]  # of two views [B, D]
BYOL_VIEWS = [replace(view, size=None, blur=0.0) for view in (BYOL_1, BYOL_2)]


class Siamese(Method):
    """Encoder and projector under a loss of two views, `base`, and perhaps DimCL of their projections."""

    layers = 2  # of the projector
    last_norm = False  # a batch norm at its end
    wide = False  # whether D is `projection_wide`

    def __init__(self, settings: DimCLSettings, regularised: bool, data: Data) -> None:
        super().__init__()
        if not 0 <= settings.weight <= 1:
            raise ValueError(f"weight must be from 0 to 1, got {settings.weight}")
        self.settings, self.regularised = settings, regularised
        self.augmentations = BYOL_VIEWS
        if settings.views == "same":
            self.augmentations = [DIGITS_STRONG if data.channels == 1 else SIMCLR_CIFAR] * 2
        encoder = ResNet(data.channels, settings)
        hidden = [settings.hidden] * (self.layers - 1)
        self.width = settings.projection_wide if self.wide else settings.projection
        head = mlp(encoder.widths[-1], *hidden, self.width, norm=True, last_norm=self.last_norm)
        self.online = Projected(encoder, head)
        self.dimcl, self.nt_xent = losses(settings)

    def forward(self, images: Tensor, labels: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        views = [augment(images, draw) for augment in self.augmentations]
        z = [self.online(view).float() for view in views]
        base = self.base(views, z)
        if not self.regularised:
            return base, {}
        dimcl, weight = self.dimcl(*z), self.settings.weight
        return weight * dimcl + (1 - weight) * base, {"base": base, "dimcl": dimcl}

    def base(self, views: list[Tensor], z: list[Tensor]) -> Tensor:
        """Loss of two views and their projections [B, D]."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        return self.online.encode(images)


class BYOL(Siamese):
    """Predict the other view's projection by a moving average of the network (Grill et al., 2020)."""

    def __init__(self, settings: DimCLSettings, regularised: bool, data: Data) -> None:
        super().__init__(settings, regularised, data)
        self.predictor = mlp(self.width, settings.hidden_predictor, self.width, norm=True)
        self.target = follower(self.online)

    def base(self, views: list[Tensor], z: list[Tensor]) -> Tensor:
        with torch.no_grad():
            targets = [self.target(view) for view in views]
        p = [self.predictor(x) for x in z]
        return 4 - 2 * (cosines(p[0], targets[1]) + cosines(p[1], targets[0]))

    def after_step(self, progress: float) -> None:
        follow(self.target, self.online, cosine(self.settings.teacher_momentum, 1.0, progress))


class SimSiam(Siamese):
    """Predict the other view's projection (Chen and He, 2021)."""

    layers, last_norm, wide = 3, True, True

    def __init__(self, settings: DimCLSettings, regularised: bool, data: Data) -> None:
        super().__init__(settings, regularised, data)
        self.predictor = mlp(self.width, settings.hidden_predictor, self.width, norm=True)

    def base(self, views: list[Tensor], z: list[Tensor]) -> Tensor:
        p = [self.predictor(x) for x in z]
        return -(cosines(p[0], z[1].detach()) + cosines(p[1], z[0].detach())) / 2


class SimCLR(Siamese):
    """Find the other view among all (Chen et al., 2020)."""

    def base(self, views: list[Tensor], z: list[Tensor]) -> Tensor:
        return self.nt_xent(*z)


class Barlow(Siamese):
    """Correlate each feature with itself in the other view, and with no other (Zbontar et al., 2021)."""

    layers, wide = 3, True

    def base(self, views: list[Tensor], z: list[Tensor]) -> Tensor:
        rows = [clk.distributed.gather_rows(x, processes.group()) for x in z]  # statistics over all processes
        standard = [F.batch_norm(x, None, None, training=True) for x in rows]
        with exactly(rows[0]):
            correlation = standard[0].T @ standard[1] / len(rows[0])
        diagonal = correlation.diagonal()
        others = correlation.square().sum() - diagonal.square().sum()
        loss = (1 - diagonal).square().sum() + self.settings.barlow_weight * others
        return self.settings.barlow_scale * loss


def losses(settings: DimCLSettings) -> tuple[Loss, Loss]:
    """DimCL and SimCLR's loss."""
    if settings.formula == "eager":
        return partial(eager.dimcl, settings.temperature), partial(eager.nt_xent, settings.simclr_temperature)
    options = {"group": processes.group(), "exchange": settings.exchange}
    dimcl = clk.DimCLLoss(settings.temperature, **options)
    return dimcl, clk.NTXentLoss(settings.simclr_temperature, **options)


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Mean cosine of rows [B, D]."""
    return F.cosine_similarity(x, y, dim=1).mean()


METHODS = {"byol": BYOL, "simsiam": SimSiam, "simclr": SimCLR, "barlow": Barlow}


def build(settings: DimCLSettings, name: str, data: Data) -> Method:
    base, _, regulariser = name.partition("+")
    return METHODS[base](settings, bool(regulariser), data)


@torch.no_grad()
def evaluate(method: Siamese, data: Data) -> Evaluation:
    found = classification(method, data)
    z = method.online.head(found.embedding.to(method.device)).float().cpu()
    images = data.test[torch.arange(min(BATCH, len(data.test)))].to(method.device)
    draw = Draw(0, 0, len(images), device=method.device)
    views = [method.online(augment(images, draw)).float().cpu() for augment in method.augmentations]
    more = {"corr. h": diversity(found.embedding), "corr. z": diversity(z)}
    if method.regularised:
        more["hardest tenth"] = hardest(*views, method.settings.temperature)
    return replace(found, figures=found.figures | more)


def hardest(z0: Tensor, z1: Tensor, temperature: float, part: float = 0.1) -> float:
    """Share of DimCL's gradient that comes from the most correlated part of negatives, mean over features.

    A feature r of views z0, z1 [N, D] gets from its negative c the weight softmax_c(corr(r, c) / τ).
    """
    correlation = torch.corrcoef(torch.cat([z0, z1], 1).T).nan_to_num()  # [2D, 2D]
    count = len(correlation)
    own = torch.eye(count, dtype=torch.bool)
    negatives = correlation[~(own | own.roll(count // 2, 0))].view(count, count - 2)
    weights = torch.softmax(negatives / temperature, 1)
    return float(weights.topk(round(part * (count - 2)), 1).values.sum(1).mean())


RECIPE = Recipe("dimcl", __doc__, PRESETS, build, evaluate, labelled=False)

if __name__ == "__main__":
    RECIPE.main()
