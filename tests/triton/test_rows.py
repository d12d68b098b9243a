"""A loss from the statistics of its rows, and rows at unit length, by Triton's kernels: against plain PyTorch
and against autograd in float64. And the derivatives of losses that are made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_checks import DEVICE
from torch import Tensor

import cl_kernels as clk
from cl_kernels import chunked, dispatch, reference
from cl_kernels.problem import Contrast, KeyLoss, KeyStats, SoftTarget
from cl_kernels.triton import key_losses, row_losses, unit_rows

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

BLOCK, FACTOR = 16, 1.7
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")


def statistics(n: int, axes: int, positives: bool) -> list[Tensor]:
    """lse, lse_cols, positive_sum, positive_count: of rows without positives, and of some below 0."""
    none = torch.empty(0, dtype=torch.float64)
    lse, lse_cols, share = torch.randn(3, n, dtype=torch.float64)
    count = torch.tensor([2.0, 0.0, 1.0, 0.5], dtype=torch.float64).repeat(n)[:n]
    return [lse, lse_cols if axes == 2 else none, *((share * count, count) if positives else (none, none))]


def by_autograd(
    given: list[Tensor], factor: float, mean: bool, drop: bool, at_least_zero: bool
) -> tuple[Tensor, Tensor]:
    """The loss, and its derivatives by the log-sum-exps of rows and by the sums over positives."""
    lse, lse_cols, total, count = given
    lse = lse.clone().requires_grad_()
    x = (lse + lse_cols) / 2 if len(lse_cols) else lse
    count = count if len(count) else torch.ones_like(lse)
    total = (total if len(total) else torch.zeros_like(lse)).clone().requires_grad_()
    alive = (x > -INF) | x.isnan() | total.isnan()
    rows = (x * (count > 0) - total / torch.where(count > 0, count, 1))[alive]
    if at_least_zero:
        rows = rows + (rows.clamp(min=0) - rows).detach()
    counted = max(1, int((count > 0).sum())) if drop else len(lse)
    loss = factor * rows.sum() / (counted if mean else 1)
    return loss.detach(), torch.stack(torch.autograd.grad(loss, (lse, total)))


def check_losses(given: list[Tensor], mean: bool, drop: bool, at_least_zero: bool) -> Tensor:
    given = [x.to(DEVICE) for x in given]
    options = (FACTOR, mean, drop, at_least_zero)
    loss, coefs = row_losses.row_losses(*given, *options)
    assert loss.dtype == torch.float32 and coefs.dtype == torch.float64
    for expected, derivatives in (chunked.row_losses(*given, *options), by_autograd(given, *options)):
        torch.testing.assert_close(loss, expected.float(), rtol=1e-6, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(coefs, derivatives, rtol=1e-6, atol=0, equal_nan=True)
    return loss


@pytest.mark.parametrize("at_least_zero", [False, True])
@pytest.mark.parametrize(("mean", "drop"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("positives", [False, True])
@pytest.mark.parametrize("axes", [1, 2])
def test_loss_of_rows(
    axes: int, positives: bool, mean: bool, drop: bool, at_least_zero: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_losses, "_ROWS", BLOCK)
    for n in (1, BLOCK, 2 * BLOCK + 5):
        check_losses(statistics(n, axes, positives), mean, drop, at_least_zero)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("at_least_zero", [False, True])
@pytest.mark.parametrize("axes", [1, 2])
def test_rows_without_columns_and_nan(
    axes: int, at_least_zero: bool, drop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty denominator is a row of 0 without a gradient; a NaN stays one, in a sum over positives too."""
    monkeypatch.setattr(row_losses, "_ROWS", BLOCK)
    given = statistics(BLOCK + 3, axes, True)
    given[0][[1, 2, BLOCK]] = -INF
    assert check_losses(given, True, drop, at_least_zero).isfinite()
    for statistic, row in ((0, 0), (0, 1), (2, 2), (2, BLOCK + 1)):
        poisoned = [x.clone() for x in given]
        poisoned[statistic][row] = NAN
        assert check_losses(poisoned, True, drop, at_least_zero).isnan()


def test_no_positives_at_all() -> None:
    lse, none, *_ = statistics(5, 1, False)
    nothing = torch.zeros_like(lse)
    for drop in (False, True):
        assert check_losses([lse, none, nothing, nothing], True, drop, False) == 0


def test_negative_rounding() -> None:
    """A row below 0 counts as 0, and its gradient is what it would be."""
    lse, none, *_ = statistics(3, 1, False)
    given = [lse, none, lse + 1e-9, torch.ones_like(lse)]
    assert check_losses(given, True, False, True) == 0


# Losses over keys without a gradient

KEY_LOSSES: dict[str, dict[str, Any]] = {
    "beside": {"beside": True},
    "among": {},
    "target, beside": {"beside": True, "target": True},
    "target with 0, beside": {"beside": True, "target": True, "zero": True},
    "target, among": {"target": True, "segments": (30, 0, 9)},
    "target with 0, among": {"target": True, "zero": True, "segments": (30, 0, 9)},
}


def key_problem(
    n: int,
    d: int,
    dtype: torch.dtype,
    beside: bool = False,
    target: bool = False,
    zero: bool = False,
    segments: tuple[int, ...] = (39,),
) -> KeyLoss:
    """Keys of unit length in segments, of which the first holds the positives or none."""
    q, t, own, *k = (F.normalize(torch.randn(m, d), dim=1).to(DEVICE, dtype) for m in (n, n, n, *segments))
    k = [x.T.contiguous().T if i % 2 else x for i, x in enumerate(k)]
    scales = (torch.tensor(7.0), torch.tensor(5.0), torch.tensor(0.3))
    index = torch.randint(0, segments[0], (n,), device=DEVICE)
    problem = KeyLoss(q, k, None, scales[0], own=own if beside else None, positive=None if beside else index)
    if not target:
        return problem
    return problem._replace(target_q=t, target_scale=scales[1], coeff=scales[2], positive_is_zero=zero)


def key_statistics(problem: KeyLoss) -> KeyStats:
    """By the reference's ops."""
    q, k, target_q, scale, target_scale, _, _, positive, zero = problem
    if target_q is None:
        contrast = Contrast(q, k[0], scale, positive_index=positive)
        lse, _, total, _, mean = chunked.contrastive_forward(*contrast, True)
        return KeyStats(lse, total, mean)
    given = SoftTarget(q, k, target_q, k, scale, target_scale, positive, "zero" if zero else "exclude")
    lse, target_lse, cross, total, mean, target_mean = chunked.soft_target_forward(*given, True)
    return KeyStats(lse, total, mean, target_lse, cross, target_mean)


def copied(stats: KeyStats) -> KeyStats:
    return KeyStats(*(None if x is None else x.clone() for x in stats))


def wide_problem(problem: KeyLoss) -> KeyLoss:
    def wide(x: Any) -> Any:
        return x.double().to(DEVICE) if isinstance(x, Tensor) and x.is_floating_point() else x

    return KeyLoss(*([wide(y) for y in x] if isinstance(x, list) else wide(x) for x in problem))


def key_loss_by_autograd(problem: KeyLoss, mean: bool) -> list[Tensor]:
    """The loss and the gradients of q and of the scale, by the plain formula in float64."""
    problem = wide_problem(problem)
    leaves = [x.detach().requires_grad_() for x in (problem.q, problem.scale)]
    loss = reference.key_loss(problem._replace(q=leaves[0], scale=leaves[1]), mean)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("case", KEY_LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_over_keys(dtype: torch.dtype, case: str, mean: bool) -> None:
    for n, d in ((1, 3), (16, 128), (21, 130)):
        problem = key_problem(n, d, dtype, **KEY_LOSSES[case])
        stats, exact = key_statistics(problem), key_loss_by_autograd(problem, mean)
        for needs in ((True, True), (True, False), (False, True)):
            found = key_losses.key_losses(problem, copied(stats), mean, needs)
            expected = chunked.key_losses(problem, copied(stats), mean, needs)
            for x, y, truth, needed in zip(found, expected, exact, (True, *needs), strict=True):
                assert x.dtype == torch.float32 and x.shape == y.shape == (truth.shape if needed else (0,))
                if needed:
                    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
                    torch.testing.assert_close(x.double(), truth, rtol=1e-4, atol=1e-5)
        nothing = stats._replace(mean=stats.mean[:0, 0], target_mean=None)
        loss, *grads = key_losses.key_losses(problem, nothing, mean, (False, False))
        torch.testing.assert_close(loss.double(), exact[0], rtol=1e-4, atol=1e-5)
        assert [x.numel() for x in grads] == [0, 0]


@pytest.mark.parametrize("case", KEY_LOSSES)
def test_key_losses_of_rows_that_are_sure(case: str) -> None:
    """Logits far apart, equal ones, and a NaN, which stays in its row's gradient and in the loss."""
    problem = key_problem(20, 8, torch.float32, **KEY_LOSSES[case])
    problem = problem._replace(scale=torch.tensor(900.0))
    found = key_losses.key_losses(problem, key_statistics(problem), True, (True, True))
    expected = chunked.key_losses(problem, key_statistics(problem), True, (True, True))
    for x, y in zip(found, expected, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    problem.q[3] = NAN
    loss, grad, _ = key_losses.key_losses(problem, key_statistics(problem), True, (True, True))
    assert loss.isnan() and grad.isnan().any(1).nonzero().flatten().tolist() == [3]


def test_a_small_loss_keeps_its_digits() -> None:
    """log(1 + e^x) for x far below 0, and 0 for what rounding put below."""
    problem = key_problem(1, 4, torch.float32, beside=True)
    problem = problem._replace(own=problem.q, scale=torch.tensor(1.0))
    for below in (-20.0, -30.0, -60.0, -1000.0):
        lse = torch.tensor([below], dtype=torch.float64, device=DEVICE)
        stats = KeyStats(lse, lse[:0], torch.zeros(0, device=DEVICE))
        loss, *_ = key_losses.key_losses(problem, stats, False, (False, False))
        exact = torch.log1p(torch.exp(lse[0] - problem.q.square().sum(1).double()[0]))
        torch.testing.assert_close(loss, exact.float(), rtol=1e-6, atol=0)
    among = key_problem(3, 4, torch.float32)
    lse = torch.tensor([-20.0, -60.0, -1000.0], dtype=torch.float64, device=DEVICE)
    below = KeyStats(lse, lse + 1e-9, torch.zeros(0, device=DEVICE))
    assert key_losses.key_losses(among, below, False, (False, False))[0] == 0


# Rows at unit length

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "of a wider one": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every second row and feature": lambda x: x.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
    "transposed": lambda x: x.T.contiguous().T,
}
SHAPES = [(1, 1), (1, 5), (16, 128), (37, 130)]


def features(n: int, d: int, dtype: torch.dtype) -> Tensor:
    """Rows of many lengths, every third row zero."""
    x = torch.randn(n, d) * torch.logspace(-2, 2, n)[:, None]
    x[2::3] = 0
    return x.to(DEVICE, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unit_rows(dtype: torch.dtype, layout: str) -> None:
    eps = torch.finfo(dtype).eps
    for n, d in SHAPES:
        plain, grad = features(n, d, dtype), torch.randn(n, d).to(DEVICE, dtype)
        x = LAYOUTS[layout](plain)
        unit, rnorm = unit_rows.unit_rows(x)
        grad_x = unit_rows.unit_rows_gradient(LAYOUTS[layout](grad), x, rnorm)
        assert (unit.dtype, rnorm.dtype, grad_x.dtype) == (dtype, torch.float32, dtype)
        assert unit.is_contiguous() and grad_x.is_contiguous()

        exact = plain.double().requires_grad_()
        length = exact.detach().norm(dim=1)
        truth = F.normalize(exact, dim=1, eps=1e-30)
        (of_truth,) = torch.autograd.grad(truth, exact, grad.double())
        zero = length == 0
        of_truth[zero] = 0
        reference, reference_rnorm = chunked.unit_rows(plain)
        of_reference = chunked.unit_rows_gradient(grad, plain, reference_rnorm)
        for expected in (truth.detach(), reference.double()):
            torch.testing.assert_close(unit.double(), expected, rtol=eps, atol=1e-6 + eps * 1e-3)
        for expected in (of_truth, of_reference.double()):
            within = 2 * eps * (1 + expected.abs().amax(1, keepdim=True))
            if d > 1:  # of one feature it is the rounding of a difference
                assert ((grad_x.double() - expected).abs() <= within).all()
        torch.testing.assert_close(rnorm, reference_rnorm, rtol=1e-6, atol=0)
        assert not (unit[zero].any() or rnorm[zero].any() or grad_x[zero].any())


def test_a_nan_stays_in_its_row() -> None:
    x = features(5, 40, torch.float32)
    x[3, 7] = NAN
    unit, rnorm = unit_rows.unit_rows(x)
    grad_x = unit_rows.unit_rows_gradient(torch.ones_like(x), x, rnorm)
    for rows in (unit, rnorm[:, None], grad_x):
        assert rows.isnan().all(1).tolist() == rows.isnan().any(1).tolist() == [i == 3 for i in range(5)]


# Derivatives of losses made of them

LABELS = torch.tensor([0, 1, 0, 2, 1])
QUEUE = F.normalize(torch.randn(9, 12, generator=torch.Generator().manual_seed(1)), dim=1)
LOSSES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "labels": ("supcon_loss", (5, 2, 12), {"labels": LABELS}),
    "labels, drop": ("supcon_loss", (5, 1, 12), {"labels": LABELS, "no_positive": "drop"}),
    "sum": ("supcon_loss", (5, 2, 12), {"reduction": "sum"}),
    "unit rows": ("nt_xent_loss", (2, 6, 12), {}),
    "both axes": ("clip_loss", (2, 6, 12), {}),
    "queue": ("info_nce_loss", (2, 6, 12), {"queue": QUEUE}),
    "queue, sum": ("info_nce_loss", (2, 6, 12), {"queue": QUEUE, "reduction": "sum"}),
    "keys": ("info_nce_loss", (2, 6, 12), {}),
    "frozen keys of all": ("info_nce_loss", (2, 6, 12), {"k_global": QUEUE}),
    "soft targets": ("sce_loss", (2, 6, 12), {"queue": QUEUE, "positive_in_target": "zero"}),
    "soft targets, keys of all": ("sce_loss", (2, 6, 12), {"k_global": QUEUE, "queue": QUEUE, "coeff": 0.2}),
    "columns": ("dimcl_loss", (2, 6, 4), {}),
    "columns, mask": ("dimcl_loss", (2, 6, 3), {"positive_mask": torch.eye(6).bool().roll(1, 0)}),
}
FROZEN = ("queue", "k_global")


def derivatives(module: Any, name: str, dtype: torch.dtype) -> list[Tensor]:
    """The loss, its gradient, and the gradient of a sum of that one's numbers."""
    function, shape, options = LOSSES[name]
    torch.manual_seed(0)
    x = F.normalize(torch.randn(shape), dim=-1)
    weights = torch.randn(shape).to(DEVICE, dtype)
    x = x.to(DEVICE, dtype).requires_grad_()
    given = {key: v.to(DEVICE) if isinstance(v, Tensor) else v for key, v in options.items()}
    given = {key: v.to(dtype) if key in FROZEN else v for key, v in given.items()}
    scale = torch.tensor(4.0, dtype=dtype, requires_grad=True)
    if function == "clip_loss":
        loss = module.clip_loss(*x, scale, **given)
    else:
        views = (x,) if function == "supcon_loss" else x.unbind()
        if any(key in given for key in FROZEN):
            views = (views[0], views[1].detach())
        loss = getattr(module, function)(*views, temperature=1 / scale, **given)
    first = torch.autograd.grad(loss, (x, scale), create_graph=True)
    second = torch.autograd.grad((first[0] * weights).sum() + first[1], (x, scale))
    return [loss.detach(), *(g.detach() for g in first), *second]


@pytest.mark.parametrize("name", LOSSES)
def test_first_and_second_derivatives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    of_rows = dispatch.of_rows
    monkeypatch.setattr(dispatch, "of_rows", lambda *args: (made.append(args[0]), of_rows(*args))[1])
    with clk.use_backend("triton"):
        found = derivatives(clk, name, torch.float32)
    assert {"row_losses", "key_losses"} & set(made)
    for x, expected in zip(found, derivatives(clk.reference, name, torch.float64), strict=True):
        assert (x.double() - expected).abs().max() <= 2e-5 * expected.abs().max().clamp(min=0.1)
