"""Multi-level few-shot's own: episodes, classifiers, the eager loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("tyro", reason="the examples' requirements are not installed")

from examples.multilevel.__main__ import RECIPE
from examples.multilevel.episodes import SHARPNESS, accuracies, class_means, draw, interval, logistic

CPU = torch.device("cpu")


def trainer(name: str = "multi-level", **changes: Any) -> Any:
    settings = replace(RECIPE.presets["cpu"], data="digits", batch=32, width=8, **changes)
    return RECIPE.trainer(settings, name, RECIPE.load("digits", None, None), CPU)


def test_episodes_are_of_different_images_of_different_classes() -> None:
    labels = torch.tensor([3, 7, 7, 3, 9, 9, 9, 9, 3, 7, 5, 5, 5])  # 3 or 4 images of a class
    rows = draw(labels, episodes=500, ways=3, images=3)
    found = labels[rows]
    assert rows.shape == (500, 3, 3)
    assert (found == found[:, :, :1]).all()
    for episode, classes in zip(rows, found[:, :, 0], strict=True):
        assert len(episode.unique()) == 9
        assert len(classes.unique()) == 3
    assert torch.bincount(rows.flatten(), minlength=len(labels)).min() > 200  # every image, also a fourth
    assert torch.equal(rows, draw(labels, episodes=500, ways=3, images=3))
    assert not torch.equal(rows, draw(labels, episodes=500, ways=3, images=3, seed=1))


@pytest.mark.parametrize(("ways", "images", "message"), [(5, 1, "ways .* 4 classes, got 5"), (2, 4, "got 4")])
def test_episodes_that_cannot_be(ways: int, images: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(torch.arange(12) % 4, 10, ways, images)


def episode(spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(20, 3, 1, 8, generator=generator)
    rows = F.normalize(centres + spread * torch.randn(20, 3, 12, 8, generator=generator), dim=3)
    return rows[:, :, :5], rows[:, :, 5:].flatten(1, 2)


def test_class_means_are_those_of_numpy() -> None:
    support, queries = episode(0.8)
    found = class_means(support, queries)
    assert torch.allclose(found.sum(2), torch.ones(20, 21))
    for e in range(20):
        means = support[e].mean(1).numpy()
        cosines = queries[e].numpy() @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
        assert (found[e].argmax(1).numpy() == cosines.argmax(1)).all()
        right = (cosines.argmax(1) == np.repeat(np.arange(3), 7)).mean()
        assert float(accuracies(found)[e]) == pytest.approx(right)


def test_logistic_regression_is_scikit_learns() -> None:
    from sklearn.linear_model import LogisticRegression

    support, queries = episode(0.8)
    found = logistic(support, queries, penalty=0.01)
    labels = np.repeat(np.arange(3), 5)
    for e in range(3):
        # scikit-learn's objective is C times the sum over rows + half the squares
        model = LogisticRegression(C=1 / (2 * 0.01 * 15), tol=1e-8, max_iter=2000)
        model.fit(SHARPNESS * support[e].flatten(0, 1).numpy(), labels)
        expected = model.predict_proba(SHARPNESS * queries[e].numpy())
        assert np.abs(found[e].numpy() - expected).max() < 0.02


def test_interval_is_scipys() -> None:
    from scipy import stats

    values = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, half = interval(values)
    low, high = stats.t.interval(0.95, 49, values.mean().item(), stats.sem(values.numpy()))
    assert [mean - half, mean + half] == pytest.approx([low, high])


@pytest.mark.parametrize("options", [{}, {"weights": (0.5, 1.0, 2.0)}, {"head": False, "places": 1}])
def test_eager_formula_has_the_same_value_and_gradients(options: dict[str, Any]) -> None:
    ours, eager = (trainer(formula=x, **options) for x in ("cl_kernels", "eager"))
    assert ours.step()["loss"] == pytest.approx(eager.step()["loss"], rel=1e-5)
    found, expected = (torch.cat([p.grad.flatten() for p in x.method.parameters()]) for x in (ours, eager))
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    assert ours.step()["loss"] == pytest.approx(eager.step()["loss"], rel=1e-5)


def test_last_level_alone_has_one_head() -> None:
    assert len(trainer().method.heads) == 3
    assert len(trainer("last-level").method.heads) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": (2, 3)}, "levels must be"),
        ({"levels": (4, 2)}, "levels"),
        ({"weights": (1.0,)}, "weights"),
    ],
)
def test_levels_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(**options)
