"""A NaN that takes part in a row comes out as NaN in that row, as in plain PyTorch: for every loss and
primitive, every input, and NaNs of any bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comparisons
import pytest
import torch
from comparisons import Problem
from torch import Tensor

import cl_kernels as clk
from cl_kernels import autograd, extension
from cl_kernels.problem import SoftTarget

N, D, M = 6, 19, 11  # no width is a multiple of a vector
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BITS = {torch.float64: torch.int64, torch.float32: torch.int32}
# Beside the usual NaN those with the low bits set too, which torch's own conversions make.
PATTERNS = ("usual", "low bits", "low bits, negative")
PLACES = {"first": 0, "tail": -1}
CAPABILITIES = extension.cpu.module.cpu_capabilities() if extension.cpu.module else []


def poison(x: Tensor, place: str, pattern: str) -> Tensor:
    """A copy with one NaN, in its first or in its last element."""
    x = x.clone()
    flat = x.view(-1)
    flat[PLACES[place]] = torch.nan
    if pattern != "usual":
        bits = flat.view(BITS.get(x.dtype, torch.int16))
        limits = torch.iinfo(bits.dtype)
        bits[PLACES[place]] = limits.max if pattern == "low bits" else -1
    assert flat[PLACES[place]].isnan()
    return x


def poisoned(problem: Problem, name: str, place: str, pattern: str) -> Problem:
    """The problem with a NaN in one of its tensors, by its name in `Problem.tensors`."""
    base, _, index = name.partition("[")
    value = problem.inputs[base]
    if index:
        at = int(index.rstrip("]"))
        value = [poison(x, place, pattern) if i == at else x for i, x in enumerate(value)]
    else:
        value = poison(value, place, pattern)
    return Problem(problem.function, {**problem.inputs, base: value}, problem.options, problem.frozen)


def losses() -> list[Problem]:
    found = [
        problem if problem.function == "dcl_loss" else problem.with_options(reduction="none")
        for problem in comparisons.problems("random", N, D)
    ]
    return [*found, comparisons.clip_problem("random", N, D, 10.0)]


def primitives() -> list[Problem]:
    q, k, u, t = (comparisons.unit(n, D) for n in (N, M, M, N))
    # What lies two columns further is left out of a row: the last rows of k are left out of none.
    labels = {"row_labels": torch.arange(N) % 3, "col_labels": torch.arange(M) % 3}
    mask = (torch.arange(M) + torch.arange(N)[:, None]) % 3 != 0
    scales = {"scale": 10.0, "target_scale": 20.0}
    soft = {"q": q, "k": k, "target_q": t, "target_k": u}
    positive = (torch.arange(N) + M - 3) % M
    bias = torch.linspace(-1, 1, M)
    bias[2] = -torch.inf
    logits = torch.randn(N, M)
    logits[:, 1] = -torch.inf
    return [
        Problem("contrastive_lse", {"q": q}, {"scale": 10.0}),
        Problem("contrastive_lse", {"q": q}, {"scale": 300.0}),
        Problem("contrastive_lse", {"q": q, "k": k}, {"scale": 10.0, "exclude": 2}),
        Problem("contrastive_lse", {"q": q, "k": k}, {"scale": 10.0, "among": "same", **labels}),
        Problem("contrastive_lse", {"q": q, "k": k}, {"scale": 10.0, "among": "different", **labels}),
        Problem("contrastive_lse", {"q": q, "k": k, "key_bias": bias}, {"scale": 10.0}),
        Problem("contrastive_lse", {"q": q, "k": k}, {"scale": 10.0, "exclude": 2, "both_axes": True}),
        Problem("contrastive_lse", {"q": q, "k": k}, {"scale": 300.0, "exclude": 2, "both_axes": True}),
        Problem("soft_target_cross_entropy", soft, {**scales, "reduction": "none"}),
        Problem(
            "soft_target_cross_entropy",
            {**soft, "k": list(k.split([4, M - 4])), "target_k": list(u.split([4, M - 4]))},
            {**scales, "positive": positive, "coeff": 0.3, "reduction": "none"},
        ),
        Problem(
            "soft_target_cross_entropy",
            soft,
            {**scales, "positive": positive, "positive_in_target": "zero", "reduction": "none"},
        ),
        Problem("similarity", {"q": q}, {"scale": 3.0}),
        Problem("similarity", {"q": q, "k": k}, {"normalize": True}),
        Problem("masked_log_softmax", {"logits": logits}),
        Problem("masked_log_softmax", {"logits": logits}, {"mask": mask}),
    ]


with torch.random.fork_rng():
    torch.manual_seed(0)
    PROBLEMS = [*losses(), *primitives()]
CASES = [
    pytest.param(problem, name, id=f"{i}-{problem.function}-{name}")
    for i, problem in enumerate(PROBLEMS)
    for name, x in problem.tensors.items()
    if x.is_floating_point() and x.dim() > 0
]


def values(function: Any, problem: Problem) -> list[Tensor]:
    result = function(**problem.inputs, **problem.options)
    return list(result) if isinstance(result, tuple) else [result]


def assert_same_rows(problem: Problem, name: str, patterns: Sequence[str] = PATTERNS) -> None:
    for dtype in DTYPES:
        for place in PLACES:
            for pattern in patterns:
                given = poisoned(problem.to(dtype), name, place, pattern)
                truth = values(getattr(clk.reference, problem.function), given.to(torch.float64))
                found = values(getattr(clk, problem.function), given)
                for ours, expected in zip(found, truth, strict=True):
                    assert torch.equal(ours.isnan(), expected.isnan()), (dtype, place, pattern)
                assert any(expected.isnan().any() for expected in truth) or not takes_part(given, name)


def takes_part(problem: Problem, name: str) -> bool:
    """Whether a NaN reaches a row at all: under a mask, or in a weight of the pair of an anchor with itself,
    it need not."""
    return name != "mask" and "mask" not in problem.options


@pytest.mark.parametrize("problem, name", CASES)
def test_same_rows_as_plain_torch(problem: Problem, name: str, backend: str) -> None:
    assert_same_rows(problem, name)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set(capability: str) -> None:
    before = extension.cpu.module.cpu_capability()
    extension.cpu.module.set_cpu_capability(capability)
    try:
        for case in CASES:
            problem, name = case.values
            assert_same_rows(problem, name, ["low bits"])
    finally:
        extension.cpu.module.set_cpu_capability(before)


@pytest.mark.parametrize("name", ["q", "k", "target_q", "target_k"])
@pytest.mark.parametrize("save_gradient", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_of_soft_targets(name: str, save_gradient: bool, dtype: torch.dtype, backend: str) -> None:
    inputs = {"q": comparisons.unit(N, D), "k": comparisons.unit(M, D)}
    inputs |= {"target_q": comparisons.unit(N, D), "target_k": comparisons.unit(M, D)}
    inputs = {key: x.to(dtype) for key, x in inputs.items()}
    for place in PLACES:
        given = {**inputs, name: poison(inputs[name], place, "low bits")}
        wide = [x.double() for x in given.values()]
        q, k, t, u = given.values()
        scales = (10.0, 20.0)
        found = autograd.soft_target(SoftTarget(q.requires_grad_(save_gradient), [k], t, [u], *scales))
        q, k, t, u = wide
        expected = clk.reference.soft_target_stats(SoftTarget(q, [k], t, [u], *scales))
        for ours, truth in zip(found[:3], expected[:3], strict=True):
            assert torch.equal(ours.isnan(), truth.isnan()), place


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_a_row(dtype: torch.dtype, backend: str) -> None:
    """NaN in a row's incoming gradient, whatever its bits, reaches that row's and every key's gradient."""
    q, k = (comparisons.unit(n, D).to(dtype).requires_grad_() for n in (N, M))
    lse = clk.contrastive_lse(q, k, scale=10.0, exclude=None)
    for pattern in PATTERNS:
        incoming = poison(torch.ones_like(lse), "tail", pattern)
        grad_q, grad_k = torch.autograd.grad(lse, (q, k), incoming, retain_graph=True)
        assert torch.equal(grad_q.isnan().all(1), incoming.isnan()) and grad_q[:-1].isfinite().all()
        assert grad_k.isnan().all()
