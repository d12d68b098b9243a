"""Every loss against the float64 reference and against plain torch in the same dtype."""

from __future__ import annotations

import comparisons
import pytest
import torch
from comparisons import assert_close, assert_parity, unit

import cl_kernels as clk

TEMPERATURES = (0.5, 0.1, 0.07, 0.01, 0.005)
SHAPES = [(1, 1), (1, 3), (2, 1), (2, 127), (3, 3), (17, 127), (67, 1), (131, 33)]
HALF = {torch.bfloat16: 0.015, torch.float16: 0.004}  # how far gradients may be off

pytestmark = pytest.mark.usefixtures("backend", "poisoned", "one_thread")


@pytest.mark.parametrize("kind", ["random", "converged"])
@pytest.mark.parametrize("tau", TEMPERATURES)
def test_temperatures(tau: float, kind: str) -> None:
    for problem in comparisons.problems(kind, 37, 24):
        assert_parity(comparisons.tempered(problem, tau))
    assert_parity(comparisons.clip_problem(kind, 37, 24, 1 / tau))


@pytest.mark.parametrize("kind", ["duplicates", "zero rows", "norm 30", "identical"])
def test_awkward_features(kind: str) -> None:
    for problem in comparisons.problems(kind, 22, 16):
        assert_parity(problem)
        if kind != "identical":  # P is 1 / N, known to the rounding of a logarithm as large as the logits
            assert_parity(comparisons.tempered(problem, 0.005))
    assert_parity(comparisons.clip_problem(kind, 22, 16, 20.0))


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_shapes(n: int, d: int) -> None:
    for problem in comparisons.problems("random", n, d):
        assert_parity(problem)
        assert_close(problem)
    assert_parity(comparisons.clip_problem("random", n, d, 10.0))


def test_plain_torch_stays_in_its_dtype() -> None:
    for problem in comparisons.problems("random", 6, 4):
        results = comparisons.plain(problem.to(torch.bfloat16))
        assert all(x.dtype == torch.bfloat16 for x in results.values())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", ["random", "converged"])
def test_half_parity(kind: str, dtype: torch.dtype) -> None:
    for problem in comparisons.problems(kind, 45, 40):
        assert_parity(problem.to(dtype))
    assert_parity(comparisons.clip_problem(kind, 45, 40, 14.0).to(dtype))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", ["random", "converged"])
def test_half_is_as_good_as_its_inputs(kind: str, dtype: torch.dtype) -> None:
    """Sums are float32; a gradient is rounded in its tile and at the end, and not lost in a converged
    model."""
    every = [*comparisons.problems(kind, 45, 40), comparisons.clip_problem(kind, 45, 40, 14.0)]
    for problem in [p.to(dtype) for p in every if p.function not in comparisons.NORMALISING]:
        truth, mine = comparisons.exact(problem), comparisons.ours(problem)
        assert mine["loss"].dtype == torch.float32
        for name, expected in truth.items():
            bound = 1e-6 * (1 + problem.logits) if name == "loss" else HALF[dtype]
            bound *= max(float(expected.abs().max()), 1.0 if name == "loss" else torch.finfo(dtype).tiny)
            assert comparisons.error(mine[name], expected) <= bound, f"{problem}: {name}"


def test_unnormalised_features_at_low_temperature_stay_finite() -> None:
    """A diagonal that dwarfs the other columns must not underflow them."""
    features = (30 * unit(32, 2, 16)).requires_grad_()
    loss = clk.supcon_loss(features, torch.arange(32) % 5, temperature=0.005)
    loss.backward()
    assert loss.isfinite()
    assert features.grad.isfinite().all()


def test_two_runs_are_bitwise_equal(backend: str) -> None:
    if backend == "cpu":
        torch.set_num_threads(2)
    for problem in [
        *comparisons.problems("random", 150, 33),
        comparisons.clip_problem("random", 150, 33, 10.0),
    ]:
        first, second = comparisons.ours(problem), comparisons.ours(problem)
        for name, result in first.items():
            assert torch.equal(result, second[name]), f"{problem}: {name}"
