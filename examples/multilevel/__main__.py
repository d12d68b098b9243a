"""Multi-level contrastive learning for few-shot problems (Chen and Zhang, 2021).

Contrastive losses at several layers of an encoder give several representations of an image, and an ensemble
of them answers few-shot tasks on classes that were not trained on. The abstract is all that is public. Chosen
here are the loss (SupCon of two views, on the pooled maps of a stage behind a head), the stages, the weights,
and the classifier: the nearest class mean of features that are centred and brought to length 1, as Wang et
al. (2019, SimpleShot) do, or logistic regression.

    python -m examples.multilevel [--preset cpu | paper] [--methods multi-level last-level] [--help]
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cl_kernels as clk
from cl_kernels.bench import eager

from ..common import processes
from ..common.augment import Draw, supervised
from ..common.data import Data, Images, few_shot
from ..common.encoders import ResNet, mlp
from ..common.evaluate import Evaluation, features
from ..common.loop import Method
from ..common.run import Recipe
from .episodes import accuracies, answer, draw, interval
from .presets import PRESETS, MultiLevelSettings


class Levels(Method):
    """Encoder whose stages are the levels of an image's representation."""

    def __init__(self, settings: MultiLevelSettings, name: str, data: Data) -> None:
        super().__init__()
        levels = settings.levels
        if list(levels) != sorted({*levels}) or not {4} <= {*levels} <= {1, 2, 3, 4}:
            raise ValueError(
                f"levels must be different stages of 1, 2, 3, 4, rising to 4, got {list(levels)}"
            )
        held_out = len(data.test.labels.unique())
        if not 2 <= settings.ways <= held_out:
            raise ValueError(f"ways must be from 2 to the {held_out} classes held out, got {settings.ways}")
        self.settings = settings
        self.encoder = ResNet(data.channels, settings)
        self.widths = [self.encoder.widths[level - 1] * settings.places**2 for level in levels]
        self.augment = supervised(data.shape)

    def levels(self, images: Tensor) -> list[Tensor]:
        """Features [B, width] of each level, the last stage last."""
        maps = self.encoder(images)
        places = self.settings.places
        chosen = (maps[level - 1] for level in self.settings.levels)
        return [F.adaptive_avg_pool2d(x, places).flatten(1) for x in chosen]

    def encode(self, images: Tensor) -> Tensor:
        return self.levels(images)[-1]


class MultiLevel(Levels):
    """A head and a supervised contrastive loss of two views at each level, or at the last alone."""

    def __init__(self, settings: MultiLevelSettings, name: str, data: Data) -> None:
        super().__init__(settings, name, data)
        widths = self.widths[-1:] if name == "last-level" else self.widths
        weights = settings.weights if name == "multi-level" and settings.weights else [1.0] * len(widths)
        if len(weights) != len(widths):
            raise ValueError(f"weights must be one for each of {len(widths)} levels, got {list(weights)}")
        heads = (mlp(w, w, settings.projection) if settings.head else nn.Identity() for w in widths)
        self.heads = nn.ModuleList(heads)
        if settings.formula == "eager":
            self.criterion = partial(eager_loss, settings.temperature, weights)
        else:
            options = {"group": processes.group(), "exchange": settings.exchange}
            self.criterion = clk.MultiLevelConLoss(settings.temperature, weights=weights, **options)

    def forward(self, images: Tensor, labels: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        views = torch.cat([self.augment(images, draw), self.augment(images, draw)])
        levels = self.levels(views)[-len(self.heads) :]
        z = [F.normalize(head(x).float(), dim=1) for head, x in zip(self.heads, levels, strict=True)]
        return self.criterion([x.unflatten(0, (2, -1)).transpose(0, 1) for x in z], labels), {}


def eager_loss(temperature: float, weights: list[float], levels: list[Tensor], labels: Tensor) -> Tensor:
    """Weighted sum of SupCon over levels [B, 2, D_l], in eager PyTorch."""
    return sum(w * eager.supcon(temperature, z, labels) for w, z in zip(weights, levels, strict=True))


class CrossEntropy(Levels):
    """A linear classifier on the last level, from one view."""

    def __init__(self, settings: MultiLevelSettings, name: str, data: Data) -> None:
        super().__init__(settings, name, data)
        self.classifier = nn.Linear(self.widths[-1], data.classes)

    def forward(self, images: Tensor, labels: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        return F.cross_entropy(self.classifier(self.encode(self.augment(images, draw))), labels), {}


METHODS = {"multi-level": MultiLevel, "last-level": MultiLevel, "cross-entropy": CrossEntropy}


def build(settings: MultiLevelSettings, name: str, data: Data) -> Method:
    return METHODS[name](settings, name, data)


def evaluate(method: Levels, data: Data) -> Evaluation:
    """Accuracy in episodes of the mean of the levels' probabilities, and of each level, before its head."""
    settings = method.settings
    train, test = (level_features(method, x) for x in (data.train, data.test))
    rows = [F.normalize(x - base.mean(0), dim=1) for x, base in zip(test, train, strict=True)]
    figures, more = {}, {}
    for shots in settings.shots:
        tasks = draw(data.test.labels, settings.episodes, settings.ways, shots + settings.queries)
        answers = torch.stack([answer(settings.classifier, x, tasks, shots) for x in rows])
        name = f"{shots}-shot"
        found = {name: accuracies(answers.mean(0))}
        for level, probabilities in zip(settings.levels, answers, strict=True):
            found[f"{name} level {level}"] = accuracies(probabilities)
        found[f"{name} gain"] = found[name] - found[f"{name} level 4"]  # in the same episodes
        more |= {key: interval(values) for key, values in found.items()}
        figures |= {key: more[key][0] for key in found} | {f"{name} ±": more[name][1]}
    return Evaluation(figures, test[-1], data.test.labels, more)


def level_features(method: Levels, images: Images) -> list[Tensor]:
    """Features [N, width] of each level."""
    found = features(lambda x: torch.cat(method.levels(x), 1), images, method.device)
    return [*found.split(method.widths, 1)]


RECIPE = Recipe("multilevel", __doc__, PRESETS, build, evaluate, few_shot)

if __name__ == "__main__":
    RECIPE.main()
