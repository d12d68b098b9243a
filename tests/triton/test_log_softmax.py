"""Triton's masked log-softmax: against float64, and no worse than plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import comparisons
import pytest
import torch
from comparisons import error
from torch import Tensor

import cl_kernels as clk
from cl_kernels import autograd, reference
from cl_kernels.triton import entry_points

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
N = 21
LENGTHS = [1, 7, 16, 37]  # of rows; the interpreter's block holds 16 entries

pytestmark = [
    pytest.mark.usefixtures("one_thread", "poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, at the infinities of the interpreter
]


def some_mask(kind: str, m: int) -> Tensor | None:
    mask = torch.rand(N, m) > 0.4
    mask[::5] = False  # rows with nothing
    return {
        "none": None,
        "full": mask,
        "transposed": mask.T.contiguous().T,
        "of columns": (torch.rand(1, m) > 0.4).expand(N, m),
        "of rows": (torch.rand(N, 1) > 0.4).expand(N, m),
    }[kind]


def run(
    function: Callable[..., Tensor], logits: Tensor, mask: Tensor | None, grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().to(dtype).requires_grad_()
    out = function(leaf, mask)
    return out.detach(), torch.autograd.grad(out, leaf, grad.to(dtype))[0]


def assert_exact(logits: Tensor, mask: Tensor | None, grad: Tensor) -> None:
    """The errors of ours are at most twice those of plain torch, plus what one rounding of each term does;
    what is excluded is -inf, with gradient 0."""
    dtype = logits.dtype
    truth = run(reference.masked_log_softmax_matrix, logits, mask, grad, torch.float64)
    with comparisons.plain_sums():
        plain = run(reference.masked_log_softmax_matrix, logits, mask, grad, dtype)
    with clk.use_backend("triton"):
        ours = run(autograd.masked_log_softmax, logits, mask, grad, dtype)
    assert all(x.is_contiguous() and x.dtype == dtype for x in ours)
    excluded = torch.zeros(logits.shape, dtype=torch.bool) if mask is None else ~mask
    assert ((ours[0] == -math.inf) == (truth[0] == -math.inf)).all()
    assert (ours[1][excluded] == 0).all()
    out, theirs, exact = (x[0].masked_fill(excluded, 0) for x in (ours, plain, truth))
    limit = 2 * error(theirs, exact) + torch.finfo(dtype).eps * float(1 + exact.abs().max())
    assert error(out, exact) <= limit
    total = float(grad.double().masked_fill(excluded, 0).abs().sum(1).max())
    assert error(ours[1], truth[1]) <= 2 * error(plain[1], truth[1]) + torch.finfo(dtype).eps * total


@pytest.mark.parametrize("mask", ["none", "full", "transposed", "of columns", "of rows"])
@pytest.mark.parametrize("m", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype: torch.dtype, m: int, mask: str) -> None:
    grad = torch.randn(N, m).to(dtype)
    assert_exact((3 * torch.randn(N, m)).to(dtype), some_mask(mask, m), grad)


@pytest.mark.parametrize("tau", [0.5, 0.1, 0.07, 0.01])
@pytest.mark.parametrize("dtype", DTYPES)
def test_converged(dtype: torch.dtype, tau: float) -> None:
    """A large logit on the diagonal, and the gradient of its cross-entropy."""
    logits = (torch.rand(N, N) * 0.5 + 0.49 * torch.eye(N)) / tau
    assert_exact(logits.to(dtype), None, -torch.eye(N))


def test_any_strides() -> None:
    logits, mask = torch.randn(37, N).T, some_mask("full", 37)
    for grad in (torch.randn(37, N).T, torch.randn(N, 1).expand(N, 37), torch.tensor(1.0).expand(N, 37)):
        assert_exact(logits, mask, grad)
    assert_exact(torch.randn(N, 74)[:, ::2], mask, torch.randn(N, 37))
    output = entry_points.masked_log_softmax_forward(logits, None)
    grad = torch.randn(N, 37)
    expected = entry_points.masked_log_softmax_backward(grad, output, None)
    assert entry_points.masked_log_softmax_backward(grad, output.T.contiguous().T, None).equal(expected)


@pytest.mark.parametrize("m", LENGTHS)
def test_range(m: int) -> None:
    """Rows that rise, fall or start with nothing; logits far apart, huge, or -inf themselves."""
    rising = torch.arange(m).float() * 1000 - 5e4
    logits = torch.stack([rising, rising.flip(0), torch.full((m,), 3e38), torch.full((m,), -3e38), rising])
    logits[4, : m // 2] = -math.inf
    logits = torch.cat([logits, torch.full((1, m), -math.inf)])
    out = entry_points.masked_log_softmax_forward(logits, None)
    torch.testing.assert_close(out[:5], logits[:5].double().log_softmax(1).float())
    assert (out[5] == -math.inf).all()
    grad = entry_points.masked_log_softmax_backward(torch.ones_like(out), out, None)
    assert (grad[5] == 0).all()
    torch.testing.assert_close(grad[:5], 1 - m * logits[:5].double().softmax(1).float())
    assert grad.isfinite().all()


@pytest.mark.parametrize("m", LENGTHS)
def test_nan_stays_where_it_counts(m: int) -> None:
    """A NaN spoils its row if it is included, and nothing if it is not; likewise in a gradient."""
    logits, mask = torch.randn(N, m), torch.ones(N, m, dtype=torch.bool)
    logits[2, -1] = logits[3, 0] = math.nan
    mask[3, 0] = mask[4, -1] = False
    out = entry_points.masked_log_softmax_forward(logits, mask)
    assert (out.isnan() == (mask & (torch.arange(N) == 2)[:, None])).all()
    assert (out[~mask] == -math.inf).all()

    grad = torch.randn(N, m)
    grad[4, -1] = math.nan
    out = entry_points.masked_log_softmax_backward(grad, out, mask)
    assert (out.isnan().any(1) == (torch.arange(N) == 2)).all()
    assert (out[~mask] == 0).all()


@pytest.mark.parametrize("m", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_include_only_minus_infinity(dtype: torch.dtype, m: int) -> None:
    """Have gradient 0; beside finite logits one of -inf has the gradient that torch gives it."""
    logits, mask = torch.randn(4, m).to(dtype), torch.ones(4, m, dtype=torch.bool)
    logits[0] = logits[1, : m // 2] = logits[2, 0] = -math.inf
    mask[1, m // 2 :] = False  # all that is finite
    grad = torch.randn(4, m).to(dtype)
    for given in (None, mask):
        out = entry_points.masked_log_softmax_forward(logits, given)
        found = entry_points.masked_log_softmax_backward(grad, out, given)
        empty = [0] if given is None else [0, 1]
        if m == 1:
            empty = [0, 1, 2] if given is not None else [0, 2]
        assert (found[empty] == 0).all()
        if m > 1:
            torch.testing.assert_close(found[2, 0], grad[2, 0])
            leaf = logits[2:].double().requires_grad_()
            leaf.log_softmax(1).backward(grad[2:].double())
            torch.testing.assert_close(found[2:].double(), leaf.grad, rtol=0.02, atol=0.05)
