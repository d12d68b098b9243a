"""Rows and pairs that are padding: the loss is that of the others alone, whatever stands in them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from comparisons import Problem, assert_close, assert_parity, clustered, near, unit
from torch import Tensor

import cl_kernels as clk
from cl_kernels import reference

pytestmark = pytest.mark.usefixtures("backend", "poisoned", "one_thread")

N, D = 9, 5
VALID = {
    "some": torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 1]).bool(),
    "all": torch.ones(N, dtype=torch.bool),
    "one": torch.arange(N) == 4,
    "none": torch.zeros(N, dtype=torch.bool),
}
LABELS = torch.tensor([0, 0, 1, 2, 2, 0, 1, 3, 5])
FLOATS = torch.where(LABELS == 1, torch.nan, LABELS / 2)
LIMITS = torch.iinfo(torch.int64)
LARGE = torch.tensor([LIMITS.min, LIMITS.max, 0, 1, 2, -1, 3, N, N + 1])[LABELS]
TOWERS = ("features", "z0", "z1", "q", "k", "image_features", "text_features")  # which `valid` is of
FILLS = (torch.nan, torch.inf, -torch.inf, 1e30)


def supcon(views: int, supervision: str = "labels", **options: Any) -> Problem:
    given: dict[str, Any] = {"features": unit(N, views, D)}
    if supervision == "labels":
        given["labels"] = LABELS
    elif supervision == "floats":
        given["labels"] = FLOATS
    elif supervision == "large":
        given["labels"] = LARGE
    elif supervision == "mask":
        given["mask"] = torch.rand(N, N) * (torch.rand(N, N) > 0.4)
    elif supervision == "bool mask":
        given["mask"] = torch.rand(N, N) > 0.5
    elif supervision == "keys":
        given |= {"labels": LABELS, "keys": unit(7, D), "key_labels": torch.arange(7) % 4}
    elif supervision == "memory":
        given |= {"labels": LABELS, "memory": [unit(7, D), torch.arange(7) % 4]}
    elif supervision == "cap":
        given["labels"], options = LABELS, {"positives_cap": views, **options}
    return Problem("supcon_loss", given, {"temperature": 0.3, **options})


def selfcon(**options: Any) -> Problem:
    rows = N * options.get("augmentations", 1)
    return Problem("selfcon_loss", {"features": unit(rows, 3, D), "labels": LABELS}, options)


def info_nce(queue: bool = False, frozen: tuple[str, ...] = (), **options: Any) -> Problem:
    more = {"queue": unit(7, D)} if queue else {}
    return Problem("info_nce_loss", {"q": unit(N, D), "k": unit(N, D), **more}, options, frozen)


def clip(labels: Tensor | None = None) -> Problem:
    more = {} if labels is None else {"labels": labels}
    given = {"image_features": unit(N, D), "text_features": unit(N, D), "logit_scale": torch.tensor(4.0)}
    return Problem("clip_loss", given | more)


def two_views(function: str, **options: Any) -> Problem:
    return Problem(function, {"z0": unit(N, D), "z1": unit(N, D)}, options)


PAIRS: dict[str, Callable[[], Problem]] = {
    "info_nce": lambda: info_nce(),
    "info_nce, frozen": lambda: info_nce(frozen=("k",)),
    "info_nce, queue": lambda: info_nce(queue=True),
    "info_nce, in batch": lambda: info_nce(queue=True, in_batch=True),
    "info_nce, in batch, frozen": lambda: info_nce(queue=True, frozen=("k", "queue"), in_batch=True),
    "clip": lambda: clip(),
    "clip, labels": lambda: clip(LABELS),
    "clip, large labels": lambda: clip(LARGE),
    "clip, float labels": lambda: clip(FLOATS),
    "dcl": lambda: two_views("dcl_loss"),
    "dclw": lambda: two_views("dcl_loss", sigma=0.5),
}
CASES: dict[str, Callable[[], Problem]] = {
    **PAIRS,
    "nt_xent": lambda: two_views("nt_xent_loss"),
    "simclr": lambda: supcon(2, "none"),
    "simclr, one": lambda: supcon(2, "none", contrast_mode="one"),
    "simclr, three views": lambda: supcon(3, "none"),
    "simclr, in, three views": lambda: supcon(3, "none", summation="in"),
    "simclr, only negatives": lambda: supcon(2, "none", denominator="only_negatives"),
    **{
        f"{supervision}, {summation}, {denominator}, {mode}, {alone}": lambda chosen=(
            supervision, summation, denominator, mode, alone
        ): supcon(
            1 if chosen[4] == "drop" else 2, chosen[0], summation=chosen[1], denominator=chosen[2],
            contrast_mode=chosen[3], no_positive=chosen[4],
        )
        for supervision, summation, denominator in itertools.product(
            ("labels", "floats", "mask", "bool mask", "keys", "memory", "cap"),
            ("out", "in"),
            ("all", "one_positive", "only_negatives"),
        )
        for mode, alone in (("all", "zero"), ("one", "drop"))
    },
    "large labels": lambda: supcon(1, "large"),
    "large labels, in": lambda: supcon(2, "large", summation="in"),
    "selfcon": lambda: selfcon(),
    "selfcon, exits": lambda: selfcon(anchors="exits", no_positive="drop"),
    "selfcon, first": lambda: selfcon(anchors="first", augmentations=2),
}  # fmt: skip


def towers(problem: Problem) -> list[str]:
    return [name for name in TOWERS if name in problem.inputs]


def rows_of(problem: Problem, valid: Tensor) -> Problem:
    """The problem of the valid rows alone."""
    given = dict(problem.inputs)
    for name in (*towers(problem), "labels", "mask"):
        if name in given:
            x = given[name]
            given[name] = x[valid.repeat(x.shape[0] // N)]
    if "mask" in given and "keys" not in given:
        given["mask"] = given["mask"][:, valid]
    return replace(problem, inputs=given)


def doubles(x: Any) -> Any:
    """All but labels."""
    if isinstance(x, list):
        return [doubles(part) for part in x]
    return x.double() if x.is_floating_point() and x.dim() != 1 else x


def run(module: Any, problem: Problem, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients in float64, that of the temperature or the scale among them."""
    given = {name: doubles(x) for name, x in problem.inputs.items()}
    if "logit_scale" not in given:
        given["temperature"] = torch.tensor(problem.options.get("temperature", 0.4), dtype=torch.float64)
    names = (*TOWERS, "keys", "queue", "logit_scale", "temperature")
    leaves = {
        name: given[name].detach().clone().requires_grad_()
        for name in names
        if name in given and name not in problem.frozen
    }
    loss = getattr(module, problem.function)(**{**problem.options, **more, **given, **leaves})
    grads = torch.autograd.grad(loss.sum(), list(leaves.values()))
    return loss.detach(), dict(zip(leaves, grads, strict=True))


def padded(problem: Problem, valid: Tensor, fill: float) -> Problem:
    """The problem with other features, labels and weights where it is not valid."""
    given = dict(problem.inputs)
    for name in towers(problem):
        given[name] = given[name].clone()
        given[name][~valid.repeat(given[name].shape[0] // N)] = fill
    if "labels" in given:
        given["labels"] = torch.where(valid, given["labels"], given["labels"][0])
    if "mask" in given:
        given["mask"] = given["mask"].clone()
        given["mask"][~valid] = 1 if given["mask"].dtype == torch.bool else torch.nan
        if "keys" not in given:
            given["mask"][:, ~valid] = given["mask"][~valid][:1, :1] if (~valid).any() else 0
    return replace(problem, inputs=given)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", CASES)
def test_the_other_rows_alone(case: str, reduction: str) -> None:
    problem = CASES[case]().with_options(reduction=reduction)
    for fill, name in zip(FILLS, ("some", "all", "one", "some"), strict=True):
        valid = VALID[name]
        expected, wanted = run(reference, rows_of(problem, valid))
        for module in (clk, reference):
            loss, grads = run(module, padded(problem, valid, fill), valid=valid)
            if reduction == "none":
                rows_valid = valid.repeat(loss.shape[0] // N)
                assert (loss[~rows_valid] == 0).all()
                loss = loss[rows_valid]
            torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
            for leaf, right in wanted.items():
                found = grads[leaf]
                if leaf in TOWERS:
                    rows_valid = valid.repeat(found.shape[0] // N)
                    assert (found[~rows_valid] == 0).all()
                    found = found[rows_valid]
                torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_nothing_but_padding(case: str) -> None:
    for module, reduction in itertools.product((clk, reference), ("mean", "sum", "none")):
        problem = padded(CASES[case](), VALID["none"], torch.nan).with_options(reduction=reduction)
        loss, grads = run(module, problem, valid=VALID["none"])
        assert (loss == 0).all()
        assert all((x == 0).all() for x in grads.values())


@pytest.mark.parametrize("tau", [0.07, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_converged_inputs(dtype: torch.dtype, tau: float) -> None:
    """Positives are taken off where they are summed, also in half precision."""
    labels, valid = torch.arange(24) % 5, torch.arange(24) % 4 != 1
    features, first = clustered(labels, 2, 33), unit(24, 33)
    given = {"features": features, "labels": labels}
    for problem in (
        Problem("supcon_loss", given),
        Problem("supcon_loss", given, {"summation": "in"}),
        Problem("supcon_loss", given, {"denominator": "only_negatives"}),
        Problem("supcon_loss", {"features": features, "mask": labels[:, None] == labels}),
        Problem("supcon_loss", {"features": torch.stack([first, near(first)], 1)}),
        Problem("nt_xent_loss", {"z0": first, "z1": near(first)}),
        Problem("selfcon_loss", given, {"anchors": "exits"}),
    ):
        assert_parity(problem.with_options(temperature=tau, valid=valid).to(dtype))
        assert_close(problem.with_options(temperature=tau, valid=valid))


@pytest.mark.parametrize("tau", [0.07, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_converged_pairs(dtype: torch.dtype, tau: float) -> None:
    first, valid = unit(24, 33), torch.arange(24) % 4 != 1
    pair, views = {"q": first, "k": near(first)}, {"z0": first, "z1": near(first)}
    images = {"image_features": first, "text_features": near(first), "logit_scale": torch.tensor(1 / tau)}
    for problem in (
        Problem("info_nce_loss", pair, {"temperature": tau}),
        Problem("info_nce_loss", pair, {"temperature": tau}, frozen=("k",)),
        Problem("info_nce_loss", {**pair, "queue": unit(9, 33)}, {"temperature": tau, "in_batch": True}),
        Problem("dcl_loss", views, {"temperature": tau, "sigma": 0.5}),
        Problem("clip_loss", images),
        Problem("clip_loss", {**images, "labels": torch.arange(24) % 7}),
        Problem("clip_loss", {**images, "labels": torch.arange(24) % 7}, {"reduction": "none"}),
    ):
        given = replace(problem, inputs={**problem.inputs, "valid": valid})
        assert_parity(given.to(dtype))
        assert_close(given)


def test_labels_of_padding_are_nobody_s() -> None:
    """Whatever integers the labels are, also those that stand in for the label of padding."""
    for seed in range(5):
        torch.manual_seed(seed)
        labels = torch.randint(-2, N + 3, (N,))
        valid = torch.rand(N) > 0.3
        problem = Problem("supcon_loss", {"features": unit(N, 1, D), "labels": labels}, {"valid": valid})
        assert_close(problem)
        assert_close(problem.with_options(no_positive="drop", summation="in"))


@pytest.mark.parametrize(
    "case", ["nt_xent", "simclr", "labels, out, all, all, zero", "cap, in, all, all, zero"]
)
def test_derivatives(case: str) -> None:
    problem, valid = CASES[case](), VALID["some"]
    given = {name: doubles(x) for name, x in problem.inputs.items()}
    leaves = [name for name in ("features", "z0", "z1") if name in given]
    inputs = [given[name].requires_grad_() for name in leaves]

    def loss(*values: Tensor) -> Tensor:
        call = {**given, **dict(zip(leaves, values, strict=True))}
        return getattr(clk, problem.function)(**call, **problem.options, valid=valid)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize(
    "case", [*PAIRS, "nt_xent", "simclr", "labels, out, all, all, zero", "mask, in, all, all, zero"]
)
def test_valid_may_change_before_the_backward(case: str) -> None:
    problem, valid = CASES[case](), VALID["some"].clone()
    first = towers(problem)[0]
    given = {**problem.inputs, first: problem.inputs[first].clone().requires_grad_()}
    function = getattr(clk, problem.function)
    expected = torch.autograd.grad(function(**given, **problem.options, valid=valid), given[first])
    loss = function(**given, **problem.options, valid=valid)
    valid.fill_(True)
    torch.testing.assert_close(torch.autograd.grad(loss, given[first]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["nt_xent", "simclr", "selfcon", "info_nce", "clip", "clip, labels", "dcl"])
def test_what_is_refused(case: str) -> None:
    problem = CASES[case]()
    for module, (valid, error, message) in itertools.product(
        (clk, reference),
        (
            ([True] * N, TypeError, "valid must be a torch.Tensor, got list"),
            (torch.ones(N), TypeError, "valid must be a bool tensor, got torch.float32"),
            (VALID["all"][1:], ValueError, r"valid must have shape \[9\], got \(8,\)"),
            (VALID["all"][:, None], ValueError, r"valid must have shape \[9\], got \(9, 1\)"),
            (VALID["all"].to("meta"), ValueError, "valid must be on cpu, got a tensor on meta"),
        ),
    ):
        with pytest.raises(error, match=message):
            getattr(module, problem.function)(**problem.inputs, **problem.options, valid=valid)


def test_autocast_changes_nothing() -> None:
    for make in PAIRS.values():
        problem = make()
        function = getattr(clk, problem.function)
        expected = function(**problem.inputs, **problem.options, valid=VALID["some"])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = function(**problem.inputs, **problem.options, valid=VALID["some"])
        assert torch.equal(found, expected)
