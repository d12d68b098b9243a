"""Triton's similarity and its gradient: against float64, and no worse than plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import comparisons
import pytest
import torch
from comparisons import error, near, unit
from torch import Tensor

import cl_kernels as clk
from cl_kernels import autograd, chunked, reference
from cl_kernels.triton import entry_points

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned")


def run(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],  # q, k, scale
    normalize: bool,
    grad: Tensor,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The matrix and the gradients of q, k and scale."""
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs[:2]]
    leaves.append(inputs[2].detach().to(torch.float64 if dtype == torch.float64 else torch.float32))
    leaves[2].requires_grad_()
    out = function(*leaves, normalize)
    wanted = [x for x in leaves if x is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad.to(dtype))]


def assert_exact(
    q: Tensor, k: Tensor | None, scale: float, normalize: bool, grad: Tensor | None = None
) -> list[Tensor]:
    """The errors of ours are at most twice those of plain torch, plus what one rounding of each term does."""
    dtype, keys = q.dtype, q if k is None else k
    inputs = (q, k, torch.tensor(scale))
    if grad is None:
        grad = torch.randn(q.shape[0], keys.shape[0])
    grad = grad.to(dtype)
    truth = run(reference.similarity_matrix, inputs, normalize, grad, torch.float64)
    with comparisons.plain_sums():
        plain = run(reference.similarity_matrix, inputs, normalize, grad, dtype)
    with clk.use_backend("triton"):
        ours = run(autograd.similarity, inputs, normalize, grad, dtype)

    wide = grad.double()
    norms = [x.double().norm(dim=1) if normalize else torch.ones(1) for x in (q, keys)]
    norms = [1 / x[x > 0].min() for x in norms]
    lengths = [1.0 if normalize else float(x.double().norm(dim=1).max()) for x in (q, keys)]
    rows = float(wide.norm(dim=1).max()) * scale * lengths[1] * norms[0]
    columns = float(wide.norm(dim=0).max()) * scale * lengths[0] * norms[1]
    terms = [scale * lengths[0] * lengths[1], rows + columns if k is None else rows]
    terms += [] if k is None else [columns]
    terms.append(float(wide.norm()) * lengths[0] * lengths[1])
    names = ["output", "q", "scale"] if k is None else ["output", "q", "k", "scale"]
    for name, mine, theirs, exact, term in zip(names, ours, plain, truth, terms, strict=True):
        assert mine.isfinite().all(), f"{name} is not finite"
        limit = 2 * error(theirs, exact) + torch.finfo(dtype).eps * (term + float(exact.abs().max()))
        assert error(mine, exact) <= limit, f"{name} is off by {error(mine, exact):.3g}, allowed {limit:.3g}"
    return ours


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype: torch.dtype, own: bool, normalize: bool) -> None:
    q, k = torch.randn(21, 19).to(dtype), torch.randn(35, 19).to(dtype)
    assert_exact(q, None if own else k, 3.0, normalize)


@pytest.mark.parametrize("n, m, d", [(1, 1, 1), (1, 37, 3), (37, 1, 64), (16, 32, 130), (2, 17, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sizes(n: int, m: int, d: int, dtype: torch.dtype) -> None:
    assert_exact(torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype), 2.0, True)


@pytest.mark.parametrize("tau", [0.5, 0.1, 0.07, 0.01])
@pytest.mark.parametrize("dtype", DTYPES)
def test_converged(dtype: torch.dtype, tau: float) -> None:
    """Positives at cosine 0.99 and the gradient of a cross-entropy, which nearly vanishes."""
    q = unit(18, 19)
    k = near(q)
    grad = (q.double() @ k.double().T / tau).softmax(1) - torch.eye(18)
    assert_exact(q.to(dtype), k.to(dtype), 1 / tau, True, grad)


def test_any_strides() -> None:
    q, k = torch.randn(5, 21).T, torch.randn(18, 10)[:, ::2]
    for grad in (torch.randn(18, 21).T, torch.randn(21, 1).expand(21, 18), torch.tensor(0.5).expand(21, 18)):
        ours = assert_exact(q, k, 2.0, True, grad)
        assert all(x.is_contiguous() for x in ours)
    assert_exact(q, None, 2.0, False, torch.randn(21, 21).T)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_float32_matmul_precision(precision: str) -> None:
    inputs, grad = (torch.randn(21, 19), torch.randn(18, 19), torch.tensor(2.0)), torch.ones(21, 18)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with clk.use_backend("triton"):
            ours = run(autograd.similarity, inputs, True, grad, torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)
    truth = run(reference.similarity_matrix, inputs, True, grad, torch.float64)
    for mine, exact in zip(ours, truth, strict=True):
        assert error(mine, exact) <= 0.01 * float(exact.abs().max())


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
def test_needs(needs: tuple[bool, bool], own: bool) -> None:
    needs = (needs[0], needs[1] and not own)
    q, k, scale = torch.randn(21, 19), None if own else torch.randn(18, 19), torch.tensor(2.0)
    out, *rnorms = entry_points.similarity_forward(q, k, scale, True)
    assert [x.shape[0] for x in rnorms] == [21, 0 if own else 18]
    grads = entry_points.similarity_backward(out, q, k, scale, True, *rnorms, needs)
    expected = chunked.similarity_backward(out, q, k, scale, True, *rnorms, needs)
    for needed, mine, theirs in zip((*needs, True), grads, expected, strict=True):
        assert mine.shape == (theirs.shape if needed else (0,)) and mine.dtype == torch.float32
        if needed:
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_zero_rows_stay_zero_and_nan_stays_nan() -> None:
    q, k = torch.randn(18, 5), torch.randn(19, 5)
    q[3] = 0
    k[4] = float("nan")
    scale = torch.tensor(2.0)
    out, q_rnorm, k_rnorm = entry_points.similarity_forward(q, k, scale, True)
    assert q_rnorm[3] == 0 and k_rnorm[4].isnan() and k_rnorm.isnan().sum() == 1
    assert out[:, 4].isnan().all() and out.isnan().sum() == 18
    assert (out[3][~out[3].isnan()] == 0).all()

    k[4] = 0
    out, *rnorms = entry_points.similarity_forward(q, k, scale, True)
    grad_q, grad_k, _ = entry_points.similarity_backward(
        torch.ones(18, 19), q, k, scale, True, *rnorms, (True, True)
    )
    assert (grad_q[3] == 0).all() and (grad_k[4] == 0).all()
    assert grad_q.isfinite().all() and grad_k.isfinite().all()


@pytest.mark.parametrize("length, size", [(1e-4, 1e4), (300.0, 3e-7), (1e-4, 3e-7)])
def test_float16_norms_keep_to_its_range(length: float, size: float) -> None:
    """G times a reciprocal norm need not fit float16."""
    q, k = unit(21, 19).half(), (length * unit(35, 19)).half()
    scale, grad = torch.tensor(1.0), (size * torch.randn(21, 35)).half()
    _, *rnorms = entry_points.similarity_forward(q, k, scale, True)
    grad_q, _, _ = entry_points.similarity_backward(grad, q, k, scale, True, *rnorms, (True, False))
    wide = [x.double() for x in (grad, q, k, scale)]
    exact, _, _ = chunked.similarity_backward(*wide, True, *(x.double() for x in rnorms), (True, False))
    half = torch.finfo(torch.float16)
    assert error(grad_q, exact) <= half.eps * (4 * float(wide[0].norm(dim=1).max()) + half.smallest_normal)


def test_float16_gradients_of_both_roles_keep_to_its_range() -> None:
    """Nor need G + G^T."""
    q, scale, none = unit(21, 19).half() / 256, torch.tensor(1.0), torch.empty(0)
    grad = 6e4 * (1 - torch.rand(21, 21) / 4).half()
    grad_q, _, _ = entry_points.similarity_backward(grad, q, None, scale, False, none, none, (True, False))
    wide = [grad.double(), q.double()]
    exact, _, _ = chunked.similarity_backward(*wide, None, scale.double(), False, none, none, (True, False))
    assert error(grad_q, exact) <= 2e-3 * float(exact.abs().max())
