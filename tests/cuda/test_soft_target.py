"""The soft-target ops by the CUDA C++ kernels, held to the chunked reference in float64.

test_ops.py runs every variant; here are odd segments, extreme logits and gradients, and converged rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from comparisons import Problem, assert_parity, near, tempered, unit
from emulator import build
from op_checks import DEVICE, DTYPES
from soft_target_checks import CASES, EVERYTHING, FROZEN, Case, assert_near, error, flat, rounding, wide
from torch import Tensor

import cl_kernels as clk
from cl_kernels import chunked

pytestmark = [
    pytest.mark.usefixtures("poisoned", "one_thread", "kernels"),
    pytest.mark.skipif(DEVICE != "cpu", reason="runs on CPU tensors, by the emulator"),
]

HALF = [torch.bfloat16, torch.float16]
ops = torch.ops.cl_kernels_cuda


@pytest.fixture(params=["80", "90"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The architecture whose kernels run."""
    if reason := build.obstacle():
        pytest.skip(reason)
    build.load()
    monkeypatch.setenv("CL_KERNELS_EMULATED_ARCHITECTURE", request.param)
    yield request.param


portable = pytest.mark.parametrize("kernels", ["80"], indirect=True)
"""For what has no kernels of its own on Hopper."""


def check(case: Case, dtype: torch.dtype, save_gradient: bool = True, **scales: float) -> None:
    """Forward and, from saved means or not, backward."""
    on_hopper = os.environ["CL_KERNELS_EMULATED_ARCHITECTURE"] == "90"
    logits = max(map(abs, scales.values()), default=14.0)
    arguments = case.arguments(dtype, **scales)
    ours, theirs = (
        f(*arguments, save_gradient) for f in (ops.soft_target_forward, chunked.soft_target_forward)
    )
    truth = chunked.soft_target_forward(*wide(arguments), save_gradient)
    for i in (0, 1, 3):
        assert_near(ours[i : i + 1], theirs[i : i + 1], truth[i : i + 1], 2e-6)
    # Where attentions serve the teacher's mean of S comes from weights rounded to half.
    attentions = on_hopper and dtype in HALF and max(case.d, case.e or 0) <= 256
    assert_near(ours[2:3], theirs[2:3], truth[2:3], rounding(dtype) if attentions else 2e-6)
    assert_near(ours[4:], theirs[4:], truth[4:], max(2e-6, rounding(dtype)))
    grads = [torch.randn(case.n, dtype=torch.float64) for _ in range(4)]
    grads[3] = grads[3] if case.positive else None
    for needs in (FROZEN, EVERYTHING):
        assert_near(
            ops.soft_target_backward(*grads, *arguments, *ours, needs),
            chunked.soft_target_backward(*grads, *arguments, *theirs, needs),
            chunked.soft_target_backward(*grads, *wide(arguments), *truth, needs),
            max(4e-6, 4 * rounding(dtype), 2 * rounding(torch.float32) * logits),
        )


@portable
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case: Case) -> None:
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[9]], ids=str)
@pytest.mark.parametrize("dtype", HALF)
def test_statistics_alone(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, save_gradient=False)


def test_many_keys() -> None:
    """Splits of the attentions; several strides of a block over a row of logits."""
    case = Case(40, n=70, lengths=(1300, 5, 900), positive="zero")
    for dtype in DTYPES:
        check(case, dtype)


@portable
def test_more_segments_than_one_launch_takes() -> None:
    check(Case(19, lengths=(3, 5, 0, 7, 2, 1, 4, 8, 6, 9, 3)), torch.bfloat16)


@portable
def test_negative_and_zero_scales() -> None:
    for dtype in DTYPES:
        check(Case(19), dtype, scale=-30.0, target_scale=0.0)
        check(Case(19), dtype, scale=0.0, target_scale=-5.0)


@portable
def test_large_logits() -> None:
    check(Case(19, positive="zero"), torch.float32, scale=1000.0, target_scale=-3000.0)


@portable
def test_positives_out_of_range_are_none() -> None:
    for dtype in DTYPES:
        arguments = Case(19, lengths=(7, 6)).arguments(dtype)
        arguments[6][::2] = 13
        without = [*arguments]
        without[6] = arguments[6].where(arguments[6] < 13, -1)
        for save_gradient in (True, False):
            both = [ops.soft_target_forward(*x, save_gradient) for x in (arguments, without)]
            assert all(torch.equal(x, y) for x, y in zip(*both, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_but_the_positive(dtype: torch.dtype) -> None:
    """Which the target leaves out."""
    arguments = Case(5, n=3, lengths=(1,)).arguments(dtype)
    arguments[6].zero_()
    ones = torch.ones(3, dtype=torch.float64)
    for save_gradient in (True, False):
        saved = ops.soft_target_forward(*arguments, save_gradient)
        truth = chunked.soft_target_forward(*wide(arguments), save_gradient)
        assert saved[1].eq(-torch.inf).all() and saved[2].eq(0).all()
        assert_near(saved, saved, truth, 1e-6)
        for needs in (FROZEN, EVERYTHING):
            ours = ops.soft_target_backward(ones, ones, ones, ones, *arguments, *saved, needs)
            exact = chunked.soft_target_backward(ones, ones, ones, ones, *wide(arguments), *truth, needs)
            assert_near(ours, ours, exact, 2 * rounding(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(0,), (0, 0)])
def test_no_keys(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = Case(5, n=3, lengths=lengths, positive=None).arguments(dtype)
    ones = torch.ones(3, dtype=torch.float64)
    for save_gradient in (True, False):
        saved = ops.soft_target_forward(*arguments, save_gradient)
        lse, target_lse, *rest = saved
        assert lse.eq(-torch.inf).all() and target_lse.eq(-torch.inf).all()
        assert all(x.eq(0).all() for x in rest)
        for needs in (FROZEN, EVERYTHING):
            grads = ops.soft_target_backward(ones, ones, ones, None, *arguments, *saved, needs)
            assert all(x.eq(0).all() for x in flat(grads))


@portable
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_small_gradients_do_not_underflow(dtype: torch.dtype) -> None:
    arguments = Case(19).arguments(dtype)
    saved = ops.soft_target_forward(*arguments, False)
    ones = torch.ones_like(saved[0])
    plain = ops.soft_target_backward(ones, ones, -ones, ones, *arguments, *saved, EVERYTHING)
    small = [1e-9 * g for g in (ones, ones, -ones, ones)]
    tiny = ops.soft_target_backward(*small, *arguments, *saved, EVERYTHING)
    for x, y in zip(flat(tiny), flat(plain), strict=True):
        if x.dtype == torch.float32:
            torch.testing.assert_close(1e9 * x, y, rtol=1e-4, atol=1e-6)


@portable
def test_keys_of_float16_gradients_keep_their_digits() -> None:
    """Each of many keys has a gradient of 1e-4 and less of what its row has."""
    arguments = Case(16, n=16, lengths=(400,), positive=None).arguments(torch.float16, scale=1.0)
    saved = ops.soft_target_forward(*arguments, False)
    grad = torch.full_like(saved[0], 1e-3)
    ours = ops.soft_target_backward(grad, None, -grad, None, *arguments, *saved, FROZEN)[0]
    truth = chunked.soft_target_backward(grad, None, -grad, None, *wide(arguments), *wide(saved), FROZEN)[0]
    assert error(1e3 * ours.double(), 1e3 * truth) < 2e-3


@portable
@pytest.mark.parametrize(
    "needs", [FROZEN, (False,) * 4, (False, True, False, False), (False, False, True, False)]
)
@pytest.mark.parametrize("save_gradient", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_what_is_needed(needs: tuple[bool, ...], save_gradient: bool, dtype: torch.dtype) -> None:
    arguments = Case(5, n=6, lengths=(7, 4)).arguments(dtype)
    outputs = [
        (backward(None, None, saved[0], None, *arguments, *saved, needs), saved)
        for forward, backward in (
            (ops.soft_target_forward, ops.soft_target_backward),
            (chunked.soft_target_forward, chunked.soft_target_backward),
        )
        for saved in [forward(*arguments, save_gradient)]
    ]
    for ours, theirs in zip(*outputs, strict=True):
        for x, y in zip(flat(ours), flat(theirs), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            assert x.isfinite().all()


@portable
def test_expanded_gradients_and_strided_indices() -> None:
    arguments = Case(5, n=6, lengths=(7, 4)).arguments(torch.float32)
    arguments[6] = torch.stack([arguments[6], arguments[6] - 1], 1)[:, 0]
    saved = ops.soft_target_forward(*arguments, True)
    one = torch.ones((), dtype=torch.float64).expand(6)
    for needs in (FROZEN, EVERYTHING):
        expanded = ops.soft_target_backward(one, None, one, one, *arguments, *saved, needs)
        full = [one.clone()] * 3
        plain = ops.soft_target_backward(full[0], None, full[1], full[2], *arguments, *saved, needs)
        assert all(torch.equal(x, y) for x, y in zip(flat(expanded), flat(plain), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_result_each_time(dtype: torch.dtype) -> None:
    arguments = Case(5, n=6, lengths=(20, 4)).arguments(dtype)

    def run() -> list[Tensor]:
        saved = ops.soft_target_forward(*arguments, True)
        ones = torch.ones_like(saved[0])
        backward = ops.soft_target_backward(ones, ones, ones, ones, *arguments, *saved, EVERYTHING)
        return [*saved, *flat(backward)]

    assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [0.5, 0.1, 0.07, 0.01])
def test_converged(tau: float, dtype: torch.dtype) -> None:
    first = unit(20, 19)
    second, queue = near(first), torch.cat([unit(13, 19), near(first, 0.8)])
    inputs = {"q": first, "k": second, "k_global": second, "queue": queue}
    problem = tempered(Problem("sce_loss", inputs, {"coeff": 0.3}, ("k", "k_global", "queue")), tau)
    with clk.use_backend("cuda"):
        assert_parity(problem.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [0.1, 0.01])
def test_converged_with_gradients_of_keys(tau: float, dtype: torch.dtype) -> None:
    first = unit(20, 19)
    problem = Problem(
        "sce_loss", {"q": first, "k": near(first)}, {"coeff": 0.3, "positive_in_target": "zero"}
    )
    with clk.use_backend("cuda"):
        assert_parity(tempered(problem, tau).to(dtype))


@pytest.mark.parametrize("positive", [None, "exclude", "zero"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_from_the_means_takes_the_positives_alone(dtype: torch.dtype, positive: str | None) -> None:
    """The keys of the positives, gathered, as one segment in place of all: nothing else of these is read."""
    q, k, t, u, *scales, found, in_target = Case(
        19, n=21, lengths=(20, 25), positive=positive, transposed=True
    ).arguments(dtype)
    saved = ops.soft_target_forward(q, k, t, u, *scales, found, in_target, True)
    grads = [torch.rand(21, dtype=torch.float64) for _ in range(4)]
    if positive is None:
        grads[3] = None
    full = ops.soft_target_backward(*grads, q, k, t, u, *scales, found, in_target, *saved, FROZEN)
    spoilt = torch.full_like(t, torch.nan)
    if found is None:
        keys, own = [k[0][:0], spoilt[:1, :19]], None
    else:
        keys = [torch.cat(k)[found.clamp(min=0)]]
        own = torch.where(found < 0, -1, torch.arange(21))
    for compact in keys:
        problem = (q, [compact], spoilt, [spoilt[:0]], *scales, own, in_target)
        part = ops.soft_target_backward(*grads, *problem, *saved, FROZEN)
        assert torch.equal(full[0], part[0]) and torch.equal(full[4], part[4])
