"""Pairs that are padding, of the losses with two towers: the loss is that of the other pairs alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparisons import Problem, assert_close, assert_parity, near, unit
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
LIMITS = torch.iinfo(torch.int64)
LARGE = torch.tensor([LIMITS.min, LIMITS.max, 0, 1, 2, -1, 3, N, N + 1])[LABELS]
FILLS = (torch.nan, torch.inf, -torch.inf, 1e30)
PAIRS = {"q": "k", "z0": "z1", "image_features": "text_features"}


def info_nce(queue: bool = False, frozen: tuple[str, ...] = (), **options: Any) -> Problem:
    more = {"queue": unit(7, D)} if queue else {}
    return Problem("info_nce_loss", {"q": unit(N, D), "k": unit(N, D), **more}, options, frozen)


def clip(labels: Tensor | None = None) -> Problem:
    more = {} if labels is None else {"labels": labels}
    given = {"image_features": unit(N, D), "text_features": unit(N, D), "logit_scale": torch.tensor(4.0)}
    return Problem("clip_loss", given | more)


CASES: dict[str, Callable[[], Problem]] = {
    "info_nce": lambda: info_nce(),
    "info_nce, frozen": lambda: info_nce(frozen=("k",)),
    "info_nce, queue": lambda: info_nce(queue=True),
    "info_nce, in batch": lambda: info_nce(queue=True, in_batch=True),
    "info_nce, in batch, frozen": lambda: info_nce(queue=True, frozen=("k", "queue"), in_batch=True),
    "clip": lambda: clip(),
    "clip, labels": lambda: clip(LABELS),
    "clip, large labels": lambda: clip(LARGE),
    "clip, float labels": lambda: clip(torch.where(LABELS == 1, torch.nan, LABELS / 2)),
    "dcl": lambda: Problem("dcl_loss", {"z0": unit(N, D), "z1": unit(N, D)}),
    "dclw": lambda: Problem("dcl_loss", {"z0": unit(N, D), "z1": unit(N, D)}, {"sigma": 0.5}),
}


def towers(problem: Problem) -> list[str]:
    return [name for pair in PAIRS.items() for name in pair if name in problem.inputs]


def of_valid(problem: Problem, valid: Tensor) -> Problem:
    """The problem of the valid pairs alone."""
    kept = {
        name: problem.inputs[name][valid] for name in [*towers(problem), "labels"] if name in problem.inputs
    }
    return Problem(problem.function, {**problem.inputs, **kept}, problem.options, problem.frozen)


def padded(problem: Problem, valid: Tensor, fill: float) -> Problem:
    """The problem with other features and labels where it is not valid."""
    given = dict(problem.inputs)
    for name in towers(problem):
        given[name] = given[name].masked_fill(~valid[:, None], fill)
    if "labels" in given:
        given["labels"] = torch.where(valid, given["labels"], given["labels"][0])
    return Problem(problem.function, given, problem.options, problem.frozen)


def run(module: Any, problem: Problem, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients in float64, by name, that of the scalar among them."""
    given = {name: x.double() if name != "labels" else x for name, x in problem.inputs.items()}
    if "logit_scale" not in given:
        given["temperature"] = torch.tensor(0.3, dtype=torch.float64)
    leaves = {k: x.requires_grad_() for k, x in given.items() if k not in ("labels", *problem.frozen)}
    loss = getattr(module, problem.function)(**given, **problem.options, **more)
    grads = torch.autograd.grad(loss.sum(), list(leaves.values()))
    return loss.detach(), dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", CASES)
def test_the_other_pairs_alone(case: str, reduction: str) -> None:
    problem = CASES[case]().with_options(reduction=reduction)
    for fill, name in zip(FILLS, ("some", "all", "one", "some"), strict=True):
        valid = VALID[name]
        expected, wanted = run(reference, of_valid(problem, valid))
        for module in (clk, reference):
            loss, grads = run(module, padded(problem, valid, fill), valid=valid)
            if reduction == "none":
                assert (loss[~valid] == 0).all()
                loss = loss[valid]
            torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
            for leaf, right in wanted.items():
                found = grads[leaf]
                if leaf in towers(problem):
                    assert (found[~valid] == 0).all()
                    found = found[valid]
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
        given = Problem(problem.function, {**problem.inputs, "valid": valid}, problem.options, problem.frozen)
        assert_parity(given.to(dtype))
        assert_close(given)


@pytest.mark.parametrize("case", CASES)
def test_valid_may_change_before_the_backward(case: str) -> None:
    problem, valid = CASES[case](), VALID["some"].clone()
    given = {**problem.inputs, towers(problem)[0]: unit(N, D).requires_grad_()}
    leaf = given[towers(problem)[0]]
    function = getattr(clk, problem.function)
    expected = torch.autograd.grad(function(**given, **problem.options, valid=valid), leaf)
    loss = function(**given, **problem.options, valid=valid)
    valid.fill_(True)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf), expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["info_nce", "clip", "clip, labels", "dcl"])
def test_what_is_refused(case: str) -> None:
    problem = CASES[case]()
    for module, (valid, error, message) in itertools.product(
        (clk, reference),
        (
            ([True] * N, TypeError, "valid must be a torch.Tensor, got list"),
            (torch.ones(N), TypeError, "valid must be a bool tensor, got torch.float32"),
            (VALID["all"][1:], ValueError, r"valid must have shape \[9\], got \(8,\)"),
            (VALID["all"].to("meta"), ValueError, "valid must be on cpu, got a tensor on meta"),
        ),
    ):
        with pytest.raises(error, match=message):
            getattr(module, problem.function)(**problem.inputs, **problem.options, valid=valid)


def test_autocast_changes_nothing() -> None:
    for case in CASES:
        problem = CASES[case]()
        function = getattr(clk, problem.function)
        expected = function(**problem.inputs, **problem.options, valid=VALID["some"])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = function(**problem.inputs, **problem.options, valid=VALID["some"])
        assert torch.equal(found, expected)
