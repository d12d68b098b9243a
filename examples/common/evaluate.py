"""Figures of a frozen encoder: linear probe, nearest neighbours, corrupted images, diversity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .augment import CORRUPTIONS, Draw
from .data import Data, Images
from .loop import Method

BATCH = 500
SEVERITY = 3  # of corruptions, of 5


@dataclass(frozen=True)
class Evaluation:
    """Figures by name, and what the picture of the embedding shows: test features [n, D], labels [n]."""

    figures: dict[str, float]
    embedding: Tensor | None = None
    labels: Tensor | None = None
    more: dict[str, list[float]] = field(default_factory=dict)  # for result.json


def batches(images: Images) -> Iterator[Tensor]:
    for chosen in torch.arange(len(images)).split(BATCH):
        yield images[chosen]


@torch.no_grad()
def features(
    encode: Callable[[Tensor], Tensor],
    images: Images,
    device: torch.device,
    change: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Features [N, D] of all images, in float32, on the CPU."""
    return torch.cat([encode(change(x).to(device)).float().cpu() for x in batches(images)])


class Probe:
    """Linear classifier on standardised features: logistic regression with an L2 penalty, by L-BFGS."""

    def __init__(self, x: Tensor, labels: Tensor, classes: int, penalty: float = 1e-4) -> None:
        """Fit to features x [N, D] and labels [N]."""
        self.mean, self.std = x.mean(0), x.std(0).clamp_min(1e-6)
        self.linear = nn.Linear(x.shape[1], classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        standard = self._standard(x)
        optimizer = torch.optim.LBFGS(
            self.linear.parameters(), max_iter=200, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(self.linear(standard), labels)
            loss = loss + penalty * self.linear.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    def _standard(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        """Give each class's probability, [N, classes]."""
        return self.linear(self._standard(x)).softmax(1)

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        return accuracy(self.probabilities(x), labels)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of the rows of scores [N, classes] whose largest is the label's."""
    return float((scores.argmax(1) == labels).double().mean())


def nearest(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, neighbours: int = 5) -> float:
    """Accuracy of the vote of the nearest neighbours by cosine."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    close = (labels[(part @ train.T).topk(neighbours, 1).indices] for part in test.split(BATCH))
    found = [votes.mode(1).values for votes in close]
    return float((torch.cat(found) == test_labels).double().mean())


def diversity(z: Tensor) -> float:
    """Mean absolute off-diagonal correlation of the features of z [N, D]: 0 where none correlate."""
    correlation = torch.corrcoef(z.double().T).nan_to_num()
    d = len(correlation)
    return float((correlation.abs().sum() - correlation.diagonal().abs().sum()) / (d * (d - 1)))


def classification(method: Method, data: Data, corruptions: bool = False) -> Evaluation:
    """Linear probe and nearest neighbours on frozen features; with `corruptions`, on corrupted tests too."""
    labels, test_labels = data.train.labels, data.test.labels
    train, test = (features(method.encode, x, method.device) for x in (data.train, data.test))
    probe = Probe(train, labels, data.classes)
    figures = {
        "linear probe": probe.accuracy(test, test_labels),
        "nearest neighbours": nearest(train, labels, test, test_labels),
    }
    if corruptions:
        found = [probe.accuracy(corrupted(method, data.test, name), test_labels) for name in CORRUPTIONS]
        figures["corrupted"] = sum(found) / len(found)
    return Evaluation(figures, test, test_labels)


def corrupted(method: Method, images: Images, name: str) -> Tensor:
    """Features [N, D] of corrupted images, always the same ones."""
    steps = iter(range(len(images)))

    def change(x: Tensor) -> Tensor:
        return CORRUPTIONS[name](x, Draw(0, next(steps), len(x)), SEVERITY)

    return features(method.encode, images, method.device, change)
