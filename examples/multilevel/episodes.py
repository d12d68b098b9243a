"""Episodes of N ways and K shots, all at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHARPNESS = 10.0  # of a cosine as a logit


def draw(labels: Tensor, episodes: int, ways: int, images: int, seed: int = 0) -> Tensor:
    """Draw rows of different images of different classes, int64 [episodes, ways, images], from labels [N].

    Raises:
        ValueError: if there are fewer classes than `ways`, or fewer than `images` of a class.
    """
    classes, counts = labels.unique(return_counts=True)
    if not 2 <= ways <= len(classes):
        raise ValueError(f"ways must be from 2 to the {len(classes)} classes, got {ways}")
    if images > counts.min():
        raise ValueError(
            f"shots + queries must be at most the {counts.min()} images of a class, got {images}"
        )
    generator = torch.Generator().manual_seed(seed)
    rows = labels.argsort(stable=True)
    first = counts.cumsum(0) - counts
    chosen = torch.rand(episodes, len(classes), generator=generator).argsort(1)[:, :ways]
    order = torch.rand(episodes, ways, int(counts.max()), generator=generator)
    beyond = torch.arange(order.shape[2]) >= counts[chosen][:, :, None]
    places = order.masked_fill(beyond, 2.0).topk(images, 2, largest=False).indices
    return rows[first[chosen][:, :, None] + places]


def class_means(support: Tensor, queries: Tensor) -> Tensor:
    """Probabilities [E, Q, ways] of queries [E, Q, D] by class means of support [E, ways, shots, D]."""
    means = F.normalize(support.mean(2), dim=2)
    return (SHARPNESS * queries @ means.mT).softmax(2)


def logistic(support: Tensor, queries: Tensor, penalty: float = 1e-3) -> Tensor:
    """The same by logistic regression with an L2 penalty, fitted by L-BFGS in all episodes together."""
    count, ways, shots, _ = support.shape
    x = SHARPNESS * support.flatten(1, 2)
    span = torch.linalg.qr(x.mT).Q  # the weights lie in the span of the labelled images
    x, queries = x @ span, SHARPNESS * queries @ span
    labels = torch.arange(ways).repeat_interleave(shots).expand(count, -1)
    weight = torch.zeros(count, x.shape[2], ways, requires_grad=True)
    bias = torch.zeros(count, 1, ways, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = x @ weight + bias
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / (ways * shots)
        loss = loss + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return (queries @ weight + bias).softmax(2)


CLASSIFIERS = {"mean": class_means, "logistic": logistic}


def answer(classifier: str, features: Tensor, rows: Tensor, shots: int) -> Tensor:
    """Classify the images of rows [E, ways, shots + queries] that come after the first `shots`.

    Features [N, D] are unit rows; the probabilities are [E, ways · queries, ways].
    """
    return CLASSIFIERS[classifier](features[rows[:, :, :shots]], features[rows[:, :, shots:]].flatten(1, 2))


def accuracies(probabilities: Tensor) -> Tensor:
    """Share of right answers in each episode, float64 [E]; queries are in the order of classes."""
    _, queries, ways = probabilities.shape
    labels = torch.arange(ways).repeat_interleave(queries // ways)
    return (probabilities.argmax(2) == labels).double().mean(1)


def interval(values: Tensor, level: float = 0.95) -> list[float]:
    """Mean and half the width of its confidence interval, by Student's t."""
    from scipy import stats

    error = values.std() / len(values) ** 0.5
    return [float(values.mean()), float(error * stats.t.ppf((1 + level) / 2, len(values) - 1))]
