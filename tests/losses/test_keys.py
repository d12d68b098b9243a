"""`supcon_loss` of anchors against keys of their own."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from comparisons import Problem, assert_close, assert_parity, clustered, near, unit
from torch import Tensor

import cl_kernels as clk
from cl_kernels.losses._common import CHUNK_LOGITS

pytestmark = pytest.mark.usefixtures("backend", "poisoned", "one_thread")

B, M, D = 7, 11, 5
OPTIONS: list[dict[str, Any]] = [
    {"summation": summation, "denominator": denominator, "contrast_mode": mode}
    for summation, denominator, mode in itertools.product(
        ("out", "in"), ("all", "one_positive", "only_negatives"), ("all", "one")
    )
]


def labelled(views: int = 2) -> dict[str, Any]:
    """Anchors of classes 0 to 3, of which no key is of the last, and keys of classes 0 to 4."""
    return {
        "features": unit(B, views, D),
        "labels": torch.arange(B) % 4,
        "keys": unit(M, D),
        "key_labels": torch.tensor([0, 1, 2, 4, 0, 0, 1, 4, 2, 0, 1]),
    }


def by_definition(given: dict[str, Any], tau: float, summation: str, denominator: str) -> Tensor:
    """The losses of the anchors, pair by pair."""
    features, keys = given["features"].double(), given["keys"].double()
    rows = []
    for view in range(features.shape[1]):
        for i in range(len(features)):
            logits = [float(features[i, view] @ k) / tau for k in keys]
            same = [bool(label == given["labels"][i]) for label in given["key_labels"]]
            negatives = sum(torch.tensor(s).exp().item() for s, p in zip(logits, same, strict=True) if not p)
            everything = sum(torch.tensor(s).exp().item() for s in logits)
            ratios = []
            for s, p in zip(logits, same, strict=True):
                value = torch.tensor(s).double().exp().item()
                below = {
                    "all": everything, "one_positive": negatives + value, "only_negatives": negatives
                }[denominator]  # fmt: skip
                ratios += [value / below] if p else []
            found = torch.tensor(ratios, dtype=torch.float64)
            if not ratios:
                rows.append(0.0)
            elif summation == "out":
                rows.append(float(-found.log().mean()))
            else:
                rows.append(float(-found.mean().log()))
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("denominator", ["all", "one_positive", "only_negatives"])
@pytest.mark.parametrize("summation", ["out", "in"])
def test_the_definition(summation: str, denominator: str) -> None:
    given = labelled()
    expected = by_definition(given, 0.3, summation, denominator)
    options = {"summation": summation, "denominator": denominator, "temperature": 0.3}
    for module in (clk, clk.reference):
        doubles = {k: x.double() if x.is_floating_point() else x for k, x in given.items()}
        found = module.supcon_loss(**doubles, base_temperature=0.3, reduction="none", **options)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (expected == 0).sum() == 2  # the views of the anchor of the last class


@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: "-".join(x.values()))
def test_value_and_gradients(options: dict[str, Any]) -> None:
    for given, tau, rest in (
        (labelled(1), 0.1, {"no_positive": "drop"}),
        (labelled(3), 0.5, {"reduction": "none"}),
        ({**labelled(), "key_labels": torch.full((M,), 9)}, 0.2, {"no_positive": "drop"}),
        ({**labelled(), "labels": torch.arange(B) / 2, "key_labels": torch.arange(M) / 4}, 0.2, {}),
        ({**labelled(), "keys": unit(1, D), "key_labels": torch.tensor([2])}, 0.2, {"reduction": "sum"}),
    ):
        learnt = {**given, "temperature": torch.tensor(tau), "base_temperature": torch.tensor(0.3)}
        assert_close(Problem("supcon_loss", learnt, {**options, **rest}))
        assert_close(Problem("supcon_loss", given, {**options, **rest, "temperature": tau}, ("keys",)))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: "-".join(x.values()))
def test_a_mask_of_positives(options: dict[str, Any]) -> None:
    features, keys = unit(B, 2, D), unit(M, D)
    weights = torch.rand(B, M) * (torch.rand(B, M) > 0.5)
    weights[2] = 0
    for mask, rest in itertools.product((weights, weights > 0), ({}, {"no_positive": "drop"})):
        given = {"features": features, "keys": keys, "mask": mask, "temperature": torch.tensor(0.2)}
        assert_close(Problem("supcon_loss", given, {**options, **rest}))
    labels = labelled()
    same = labels["labels"][:, None] == labels["key_labels"]
    by_mask = clk.supcon_loss(labels["features"], mask=same, keys=labels["keys"], **options)
    torch.testing.assert_close(by_mask, clk.supcon_loss(**labels, **options))


@pytest.mark.parametrize("tau", [0.07, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("summation", ["out", "in"])
def test_converged_inputs(summation: str, dtype: torch.dtype, tau: float) -> None:
    labels, key_labels = torch.arange(24) % 6, torch.arange(31) % 8
    centres = unit(8, 33)
    given = {
        "features": near(centres[labels])[:, None], "labels": labels,
        "keys": near(centres[key_labels]), "key_labels": key_labels,
    }  # fmt: skip
    for mode, frozen in itertools.product(("all", "only_negatives"), ((), ("keys",))):
        options = {"summation": summation, "denominator": mode, "temperature": tau}
        assert_parity(Problem("supcon_loss", given, options, frozen).to(dtype))


def test_the_batch_itself_as_keys() -> None:
    """Nothing is left out: an anchor that is among the keys is its own positive."""
    features, labels = clustered(torch.arange(6) % 2, 1, D).double(), torch.arange(6) % 2
    rows = features[:, 0]
    found = clk.supcon_loss(features, labels, keys=rows, key_labels=labels, reduction="none")
    logits = rows @ rows.T / 0.07
    positive = (labels[:, None] == labels).double()
    expected = torch.logsumexp(logits, 1) - (logits * positive).sum(1) / positive.sum(1)
    torch.testing.assert_close(found, expected)


def test_a_nan_label_is_equal_to_nothing() -> None:
    given = {**labelled(1), "labels": torch.full((B,), torch.nan), "key_labels": torch.full((M,), torch.nan)}
    assert (clk.supcon_loss(**given, reduction="none") == 0).all()


def test_frozen_keys_may_change_before_the_backward() -> None:
    for options in ({}, {"summation": "in"}, {"denominator": "one_positive"}):
        given = labelled()
        x = given["features"].requires_grad_()
        (expected,) = torch.autograd.grad(clk.supcon_loss(**given, **options), x)
        loss = clk.supcon_loss(**given, **options)
        given["keys"].zero_()
        given["key_labels"].zero_()
        torch.testing.assert_close(torch.autograd.grad(loss, x), (expected,), rtol=1e-6, atol=1e-7)


def test_keys_alone_get_a_gradient() -> None:
    given = labelled()
    for options in ({}, {"denominator": "one_positive"}):
        assert_close(Problem("supcon_loss", given, options, ("features",)))


def test_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", 3 * M)
    for options in OPTIONS:
        assert_close(Problem("supcon_loss", labelled(), options))


def test_memory_is_that_of_the_features() -> None:
    """Frozen keys cost a copy of themselves; no matrix of logits is held."""
    given = {"features": unit(4, 1, 8), "labels": torch.arange(4), "keys": unit(4096, 8)}
    given |= {"key_labels": torch.arange(4096) % 5}
    held: list[int] = []
    given["features"].requires_grad_()

    def pack(x: Tensor) -> Tensor:
        held.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        clk.supcon_loss(**given)
    assert max(held) <= given["keys"].numel()


def test_mixed_dtypes_and_autocast() -> None:
    given = labelled()
    half = {**given, "keys": given["keys"].bfloat16()}
    wide = {**given, "keys": half["keys"].float()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = clk.supcon_loss(**half)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, clk.supcon_loss(**wide))


def test_the_module() -> None:
    given = labelled()
    module = clk.SupConLoss(0.2, summation="in", no_positive="drop")
    expected = clk.supcon_loss(**given, temperature=0.2, summation="in", no_positive="drop")
    assert module(**given) == expected


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no key_labels": ({"key_labels": None}, ValueError, "labels and key_labels must be given together"),
    "no labels": ({"labels": None}, ValueError, "labels and key_labels must be given together"),
    "neither": ({"labels": None, "key_labels": None}, ValueError, "must be given with keys, got none"),
    "no keys": ({"keys": None}, ValueError, "keys must be given with key_labels, got None"),
    "rank": ({"keys": unit(3, 2, D)}, ValueError, r"keys must have shape \[M, D\], got \(3, 2, 5\)"),
    "empty": ({"keys": unit(0, D)}, ValueError, "keys must not be empty"),
    "width": ({"keys": unit(M, D + 1)}, ValueError, r"keys must have as many features as features \(5\)"),
    "type": ({"keys": [0.0]}, TypeError, "keys must be a torch.Tensor, got list"),
    "dtype": ({"keys": torch.ones(M, D).int()}, TypeError, "keys must be float16"),
    "length": ({"key_labels": torch.arange(B)}, ValueError, r"key_labels must have shape \[11\]"),
    "device": ({"keys": unit(M, D).to("meta")}, ValueError, "keys must be on the device of features"),
    "memory": ({"memory": (unit(M, D), torch.arange(M))}, ValueError, "keys and memory must not be given"),
    "cap": ({"positives_cap": 2}, ValueError, "keys and positives_cap must not be given together"),
    "mask and labels": ({"mask": torch.ones(B, M)}, ValueError, "mask and key_labels must not be given"),
    "square mask": (
        {"labels": None, "key_labels": None, "mask": torch.ones(B, B)}, ValueError,
        r"mask must have shape \[7, 11\], got \(7, 7\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case: str) -> None:
    change, error, message = WRONG[case]
    for module in (clk, clk.reference):
        with pytest.raises(error, match=message):
            module.supcon_loss(**{**labelled(), **change})
