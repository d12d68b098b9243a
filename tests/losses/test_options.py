"""Options of the losses against the reference: supervision, denominators, reductions, learnt scalars."""

from __future__ import annotations

import itertools
from typing import Any

import comparisons
import pytest
import torch
from comparisons import Problem, assert_close, assert_parity, two_views, unit

import cl_kernels as clk
from cl_kernels.losses._common import CHUNK_LOGITS
from cl_kernels.losses._pairs import SIZES, Sizes

SUPERVISION = ("none", "labels", "bool mask", "weights", "tiny weights")

pytestmark = pytest.mark.usefixtures("backend", "poisoned", "one_thread")


def labels_of(kind: str, n: int) -> torch.Tensor:
    if kind == "singletons":
        return torch.arange(n)
    if kind == "one class":
        return torch.zeros(n, dtype=torch.int64)
    if kind == "long tail":
        return (torch.rand(n) ** 4 * n).long()
    return torch.randint(0, 4, (n,))


@pytest.mark.parametrize("labelling", ["singletons", "one class", "long tail", "some"])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_labels(labelling: str, views: int) -> None:
    features = unit(29, views, 11)
    for options in (
        {},
        {"contrast_mode": "one"},
        {"summation": "in"},
        {"denominator": "only_negatives"},
        {"summation": "in", "denominator": "only_negatives"},
        {"no_positive": "drop"},
    ):
        assert_parity(
            Problem("supcon_loss", {"features": features, "labels": labels_of(labelling, 29)}, options)
        )
        assert_close(
            Problem("supcon_loss", {"features": features, "labels": labels_of(labelling, 29)}, options)
        )


def supervision(kind: str, n: int) -> dict[str, Any]:
    upper = torch.triu(torch.ones(n, n)) * (torch.rand(n, n) > 0.5)
    return {
        "none": {},
        "labels": {"labels": torch.randint(0, 3, (n,))},
        "bool mask": {"mask": upper.bool()},
        "weights": {"mask": upper * torch.rand(n, n)},
        "tiny weights": {"mask": upper * 1e-8},
    }[kind]


@pytest.mark.parametrize("kind", SUPERVISION)
@pytest.mark.parametrize("denominator", ["all", "one_positive", "only_negatives"])
@pytest.mark.parametrize("summation", ["out", "in"])
def test_supcon_options(summation: str, denominator: str, kind: str) -> None:
    for mode, cap, alone, views in itertools.product(
        ("all", "one"), (None, 0, 6), ("zero", "drop"), (1, 2, 3)
    ):
        options = {
            "contrast_mode": mode, "summation": summation, "denominator": denominator, "positives_cap": cap,
            "no_positive": alone, "temperature": 0.2, "base_temperature": 0.1,
        }  # fmt: skip
        assert_close(Problem("supcon_loss", {"features": unit(8, views, 5), **supervision(kind, 8)}, options))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", SUPERVISION)
@pytest.mark.parametrize("anchors", ["all", "exits", "first"])
def test_selfcon_options(anchors: str, kind: str, reduction: str) -> None:
    for augmentations, views, alone in itertools.product((1, 2), (2, 3), ("zero", "drop")):
        options = {
            "anchors": anchors, "augmentations": augmentations, "no_positive": alone, "reduction": reduction,
            "temperature": 0.1,
        }  # fmt: skip
        features = unit(7 * augmentations, views, 5)
        assert_close(Problem("selfcon_loss", {"features": features, **supervision(kind, 7)}, options))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction: str) -> None:
    for problem in [*comparisons.problems("random", 9, 6), comparisons.clip_problem("random", 9, 6, 10.0)]:
        assert_close(problem.with_options(reduction=reduction))
        assert_parity(problem.with_options(reduction=reduction))


@pytest.mark.parametrize("positive_in_target", ["exclude", "zero"])
@pytest.mark.parametrize("coeff", [0.0, 0.4, 1.0])
def test_sce_options(coeff: float, positive_in_target: str) -> None:
    n, d = 6, 5
    q, k = two_views("converged", n, d)
    everything = unit(3 * n, d)
    everything[2 * n :] = k
    for keys in (
        {},
        {"queue": unit(13, d)},
        {"k_global": everything},
        {"k_global": everything, "queue": unit(13, d)},
    ):
        rank = 2 if "k_global" in keys else 0
        options = {"coeff": coeff, "positive_in_target": positive_in_target, "rank": rank}
        for frozen in ((), ("k", "k_global", "queue")):
            assert_close(Problem("sce_loss", {"q": q, "k": k, **keys}, options, frozen))


@pytest.mark.parametrize("positive_in_target", ["exclude", "zero"])
def test_sce_with_one_key_is_zero(positive_in_target: str) -> None:
    q, k = unit(1, 4).requires_grad_(), unit(1, 4)
    loss = clk.sce_loss(q, k, positive_in_target=positive_in_target, coeff=0.2)
    loss.backward()
    assert loss == 0
    assert (q.grad.abs() < 1e-6).all()  # 1 - coeff - (1 - coeff), each rounded


def test_dimcl_positive_mask() -> None:
    z0, z1 = two_views("converged", 12, 7)
    mask = torch.rand(14, 14) > 0.7
    assert_close(Problem("dimcl_loss", {"z0": z0, "z1": z1}, {"positive_mask": mask}))
    z0[:, 3] = 2.5
    assert_close(Problem("dimcl_loss", {"z0": z0, "z1": z1}, {"positive_mask": mask | mask.T}))
    assert_parity(Problem("dimcl_loss", {"z0": 1000 + z0, "z1": z1}))


@pytest.mark.parametrize("weights", [None, [0.5, 2.0], torch.tensor([0.5, 2.0], dtype=torch.float64)])
def test_multilevel_weights(weights: Any) -> None:
    levels = [unit(5, 2, 6), unit(5, 2, 9)]
    learnt = isinstance(weights, torch.Tensor)
    inputs = {
        "levels": levels,
        "labels": torch.tensor([0, 1, 1, 2, 0]),
        **({"weights": weights} if learnt else {}),
    }
    assert_close(Problem("multilevel_loss", inputs, {} if learnt else {"weights": weights}))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_learnt_scalars(shape: tuple[int, ...]) -> None:
    """Temperatures and coefficients as tensors of one element get their gradients, in their own shape."""

    def scalar(x: float) -> torch.Tensor:
        return torch.full(shape, x, dtype=torch.float64)

    clip = comparisons.clip_problem("random", 8, 5, 10.0)
    for problem in [*comparisons.problems("random", 8, 5), clip]:
        if problem is clip:
            assert_close(Problem("clip_loss", {**clip.inputs, "logit_scale": scalar(10.0)}))
            continue
        extra = {"temperature": scalar(0.2)}
        if problem.function in ("supcon_loss", "selfcon_loss", "multilevel_loss"):
            extra["base_temperature"] = scalar(0.3)
        if problem.function == "sce_loss":
            extra |= {"target_temperature": scalar(0.1), "coeff": scalar(0.4)}
        if "sigma" in problem.options:
            extra["sigma"] = scalar(0.5)
        options = {key: x for key, x in problem.options.items() if key not in extra}
        assert_close(Problem(problem.function, {**problem.inputs, **extra}, options, problem.frozen))


RARE: dict[str, dict[str, torch.Tensor]] = {
    "labels": {"labels": torch.tensor([0, 1, 1, 2, 1, 0, 3, 1, 1])},
    "one class": {"labels": torch.zeros(9)},
    "mask": {"mask": (torch.arange(9)[:, None] % 3 == torch.arange(9) % 3).double() * 0.7},
}


@pytest.mark.parametrize("given", RARE)
def test_rare_options_in_chunks(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks give what one gives, to the second derivative."""
    features = unit(9, 2, 5).double()
    options = {"summation": "in", "denominator": "one_positive", "positives_cap": 2, "reduction": "none"}

    def derivatives() -> list[torch.Tensor]:
        x, tau = features.clone().requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        loss = clk.supcon_loss(x, **RARE[given], temperature=tau, **options)
        first = torch.autograd.grad((loss**2).sum(), [x, tau], create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), [x, tau])
        return [loss, *first, *second]

    whole = derivatives()
    for sizes in (Sizes(1, 1, 8), Sizes(4, 6, 20), Sizes(99, 99, 20)):
        monkeypatch.setitem(SIZES, "cpu", sizes)
        monkeypatch.setitem(CHUNK_LOGITS, "cpu", 5 * 18)
        for expected, result in zip(whole, derivatives(), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


def test_memory_of_pairs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the sizes of the classes, nothing is held that is larger than the features."""
    monkeypatch.setitem(SIZES, "cpu", Sizes(16, 16, 2**10))
    features = unit(256, 1, 8).requires_grad_()
    held: list[int] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        held.append(x.numel())
        return x

    for labels in (torch.arange(256) // 3, torch.zeros(256), torch.arange(256) % 2):
        for options in ({"denominator": "one_positive"}, {"positives_cap": 5}):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                clk.supcon_loss(features, labels, **options)
    assert max(held) <= features.numel()


def test_named_backends_serve_rare_options() -> None:
    if clk.dispatch.extension.cpu.module is None:
        pytest.skip("no CPU kernels")
    features, mask = unit(6, 2, 3), torch.eye(6) + 0.5
    for options in (
        {"positives_cap": 2}, {"denominator": "one_positive"}, {"summation": "in"},
        {"denominator": "only_negatives"}, {"summation": "in", "denominator": "only_negatives"},
    ):  # fmt: skip
        for given in ({"labels": torch.arange(6) % 2}, {"mask": mask}, {"mask": mask > 1}):
            expected = clk.supcon_loss(features, **given, **options)
            with clk.use_backend("cpu"):
                torch.testing.assert_close(clk.supcon_loss(features, **given, **options), expected)
