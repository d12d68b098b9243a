"""The soft-target ops by Triton's kernels, held to the chunked reference in float64."""

from __future__ import annotations

import pytest
import torch
from comparisons import Problem, assert_parity, near, tempered, unit
from soft_target_checks import CASES, EVERYTHING, FROZEN, Case, assert_near, error, flat, rounding, wide
from torch import Tensor

import cl_kernels as clk
from cl_kernels import chunked, configs

pytest.importorskip("triton")

from cl_kernels.triton import entry_points, soft_target_means, soft_target_softmax

pytestmark = [
    pytest.mark.usefixtures("poisoned", "one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs on CPU tensors, by the interpreter"),
]


def check(case: Case, dtype: torch.dtype, **scales: float) -> None:
    """Forward and both ways of the backward."""
    logits = max(map(abs, scales.values()), default=14.0)
    arguments = case.arguments(dtype, **scales)
    ours, theirs = (
        f(*arguments, True) for f in (entry_points.soft_target_forward, chunked.soft_target_forward)
    )
    truth = chunked.soft_target_forward(*wide(arguments), True)
    assert_near(ours[:4], theirs[:4], truth[:4], 2e-6)
    assert_near(ours[4:], theirs[4:], truth[4:], max(2e-6, rounding(dtype)))
    grads = [torch.randn(case.n, dtype=torch.float64) for _ in range(4)]
    grads[3] = grads[3] if case.positive else None
    for needs in (FROZEN, EVERYTHING):
        assert_near(
            entry_points.soft_target_backward(*grads, *arguments, *ours, needs),
            chunked.soft_target_backward(*grads, *arguments, *theirs, needs),
            chunked.soft_target_backward(*grads, *wide(arguments), *truth, needs),
            max(4e-6, 4 * rounding(dtype), 2 * rounding(torch.float32) * logits),
        )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case: Case) -> None:
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [CASES[1], CASES[5]], ids=str)
def test_half(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("case", [Case(33), Case(19, 40, positive="zero", transposed=True)], ids=str)
def test_tiles_of_the_whole_width(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_INTERPRETED", configs.Shape(16, 16, 64, 1, 1))
    check(case, torch.float32)


def test_rows_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft_target_softmax, "MATRIX_BYTES", 16 * 33 * 2)
    check(Case(19, 5, lengths=(17, 33), positive="zero"), torch.float16)


def test_means_by_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for keys too wide for the pass to keep their means."""
    monkeypatch.setattr(soft_target_means, "WIDEST", {"half": 0, "float32": 0})
    check(Case(19, lengths=(17, 33)), torch.float16)


def test_negative_and_zero_scales() -> None:
    check(Case(19), torch.float32, scale=-30.0, target_scale=0.0)
    check(Case(19), torch.float32, scale=0.0, target_scale=-5.0)


def test_large_logits() -> None:
    check(Case(19, positive="zero"), torch.float32, scale=1000.0, target_scale=-3000.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_small_gradients_do_not_underflow(dtype: torch.dtype) -> None:
    arguments = Case(19).arguments(dtype)
    saved = entry_points.soft_target_forward(*arguments, False)
    ones = torch.ones_like(saved[0])
    plain = entry_points.soft_target_backward(ones, ones, -ones, ones, *arguments, *saved, EVERYTHING)
    small = [1e-9 * g for g in (ones, ones, -ones, ones)]
    tiny = entry_points.soft_target_backward(*small, *arguments, *saved, EVERYTHING)
    for x, y in zip(flat(tiny), flat(plain), strict=True):
        if x.dtype == torch.float32:
            torch.testing.assert_close(1e9 * x, y, rtol=1e-4, atol=1e-6)


def test_keys_of_float16_gradients_keep_their_digits() -> None:
    """Each of many keys has a gradient of 1e-4 and less of what its row has."""
    arguments = Case(16, n=16, lengths=(400,), positive=None).arguments(torch.float16, scale=1.0)
    saved = entry_points.soft_target_forward(*arguments, False)
    grad = torch.full_like(saved[0], 1e-3)
    needs = (True, False, False, False)
    ours = entry_points.soft_target_backward(grad, None, -grad, None, *arguments, *saved, needs)[0]
    truth = chunked.soft_target_backward(grad, None, -grad, None, *wide(arguments), *wide(saved), needs)[0]
    assert error(1e3 * ours.double(), 1e3 * truth) < 2e-3


@pytest.mark.parametrize(
    "needs", [FROZEN, (False,) * 4, (False, True, False, False), (False, False, True, False)]
)
@pytest.mark.parametrize("save_gradient", [True, False])
def test_only_what_is_needed(needs: tuple[bool, ...], save_gradient: bool) -> None:
    arguments = Case(5, n=6, lengths=(7, 4)).arguments(torch.bfloat16)
    outputs = [
        (backward(None, None, saved[0], None, *arguments, *saved, needs), saved)
        for forward, backward in (
            (entry_points.soft_target_forward, entry_points.soft_target_backward),
            (chunked.soft_target_forward, chunked.soft_target_backward),
        )
        for saved in [forward(*arguments, save_gradient)]
    ]
    for ours, theirs in zip(*outputs, strict=True):
        for x, y in zip(flat(ours), flat(theirs), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            assert x.isfinite().all()


def test_expanded_gradients_and_strided_indices() -> None:
    arguments = Case(5, n=6, lengths=(7, 4)).arguments(torch.float32)
    arguments[6] = torch.stack([arguments[6], arguments[6] - 1], 1)[:, 0]
    saved = entry_points.soft_target_forward(*arguments, True)
    one = torch.ones((), dtype=torch.float64).expand(6)
    for needs in (FROZEN, EVERYTHING):
        expanded = entry_points.soft_target_backward(one, None, one, one, *arguments, *saved, needs)
        full = [one.clone()] * 3
        plain = entry_points.soft_target_backward(full[0], None, full[1], full[2], *arguments, *saved, needs)
        assert all(torch.equal(x, y) for x, y in zip(flat(expanded), flat(plain), strict=True))


def test_the_same_result_each_time() -> None:
    arguments = Case(5, n=6, lengths=(20, 4)).arguments(torch.bfloat16)

    def run() -> list[Tensor]:
        saved = entry_points.soft_target_forward(*arguments, True)
        ones = torch.ones_like(saved[0])
        return [
            *saved,
            *flat(entry_points.soft_target_backward(ones, ones, ones, ones, *arguments, *saved, EVERYTHING)),
        ]

    assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [0.5, 0.1, 0.07, 0.01])
def test_converged(tau: float, dtype: torch.dtype) -> None:
    first = unit(20, 19)
    second, queue = near(first), torch.cat([unit(13, 19), near(first, 0.8)])
    inputs = {"q": first, "k": second, "k_global": second, "queue": queue}
    problem = tempered(Problem("sce_loss", inputs, {"coeff": 0.3}, ("k", "k_global", "queue")), tau)
    with clk.use_backend("triton"):
        assert_parity(problem.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [0.1, 0.01])
def test_converged_with_gradients_of_keys(tau: float, dtype: torch.dtype) -> None:
    first = unit(20, 19)
    problem = Problem(
        "sce_loss", {"q": first, "k": near(first)}, {"coeff": 0.3, "positive_in_target": "zero"}
    )
    with clk.use_backend("triton"):
        assert_parity(tempered(problem, tau).to(dtype))
