"""Triton's prologue and epilogue of DimCL: against float64, and no worse than plain torch."""

from __future__ import annotations

import pytest
import torch
from comparisons import error
from torch import Tensor

from cl_kernels import chunked, reference
from cl_kernels.triton.columns import column_gradient, standardise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned")


def formula(z: Tensor, grad_x: Tensor) -> tuple[Tensor, Tensor]:
    """The centred columns at unit length, and the gradient of z."""
    z = z.detach().requires_grad_()
    x = reference.standardize(z)
    return x.detach(), torch.autograd.grad(x, z, grad_x.to(z.dtype))[0]


def assert_exact(z0: Tensor, z1: Tensor) -> None:
    """The errors of ours are at most twice those of plain torch, plus what one rounding of each term does."""
    n, d = z0.shape
    dtype = z0.dtype
    x, mean, rnorm, _ = standardise(z0, z1)
    assert x.shape == (n, 2 * d) and x.dtype == dtype and x.is_contiguous()
    assert mean.dtype == rnorm.dtype == torch.float32
    grad_x = torch.randn(2 * d, n)
    grads = column_gradient(grad_x, x, rnorm, dtype)
    for i, (z, grad) in enumerate(zip((z0, z1), grads, strict=True)):
        assert grad.shape == (n, d) and grad.dtype == dtype and grad.is_contiguous()
        columns = slice(i * d, (i + 1) * d)
        g = grad_x[columns].T
        exact_mean, exact_rnorm = chunked._column_statistics(z.double())
        torch.testing.assert_close(mean[i], exact_mean.float(), rtol=1e-6, atol=1e-6 * float(z.abs().max()))
        assert ((rnorm[i] == 0) == (chunked._column_statistics(z)[1] == 0)).all()
        exact_x, exact_grad = formula(z.double(), g.double())
        exact_x, exact_grad = (torch.where(rnorm[i] == 0, 0, e) for e in (exact_x, exact_grad))
        plain_x, plain_grad = formula(z, g)
        eps = torch.finfo(dtype).eps
        assert error(x[:, columns], exact_x) <= 2 * error(plain_x, exact_x) + eps * float(exact_x.abs().max())
        # Columns differ in size: each is held to its own errors.
        terms = exact_rnorm * (rnorm[i] != 0) * g.double().norm(dim=0)
        for c in range(d):
            limit = 2 * error(plain_grad[:, c], exact_grad[:, c]) + eps * float(terms[c])
            assert error(grad[:, c], exact_grad[:, c]) <= limit


@pytest.mark.parametrize("n, d", [(2, 1), (2, 5), (37, 1), (37, 19), (53, 33), (16, 16), (70, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype: torch.dtype, n: int, d: int) -> None:
    assert_exact(torch.randn(n, d).to(dtype), (3 * torch.randn(n, d) + 1).to(dtype))


def test_any_strides() -> None:
    assert_exact(torch.randn(19, 37).T, torch.randn(37, 19))
    assert_exact(torch.randn(37, 38)[:, ::2], torch.randn(19, 37).T)
    x, _, rnorm, _ = standardise(torch.randn(37, 3), torch.randn(37, 3))
    grad_x = torch.randn(6, 37)
    expected = column_gradient(grad_x, x, rnorm, torch.float32)
    strided = column_gradient(grad_x.T.contiguous().T, x.T.contiguous().T, rnorm, torch.float32)
    assert all(a.equal(b) for a, b in zip(strided, expected, strict=True))


@pytest.mark.parametrize("value", [0.0, 0.1, -1000.3, 3e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_columns_are_zero(dtype: torch.dtype, value: float) -> None:
    z0, z1 = torch.randn(53, 3).to(dtype), torch.randn(53, 3).to(dtype)
    z0[:, 1] = z1[:, 2] = value
    x, mean, rnorm, _ = standardise(z0, z1)
    assert mean[0, 1] == z0[0, 1] and mean[1, 2] == z1[0, 2]
    assert (rnorm == 0).nonzero().tolist() == [[0, 1], [1, 2]]
    assert (x[:, [1, 5]] == 0).all()
    grad_z0, grad_z1 = column_gradient(torch.randn(6, 53), x, rnorm, dtype)
    assert (grad_z0[:, 1] == 0).all() and (grad_z1[:, 2] == 0).all()
    assert_exact(z0, z1)


@pytest.mark.parametrize("mean, spread", [(1.0, 1e-4), (1000.0, 1e-2), (-300.0, 1e-3)])
def test_nearly_constant_columns(mean: float, spread: float) -> None:
    z0, z1 = mean + spread * torch.randn(37, 5), mean + spread * torch.randn(37, 5)
    assert_exact(z0, z1)
    x, *_ = standardise(z0, z1)
    exact = torch.cat(
        [chunked._standardised(z.double(), *chunked._column_statistics(z.double())) for z in (z0, z1)]
    )
    assert error(x.T, exact) < 1e-6  # the mean takes no digits from the spread


def test_gradient_of_equal_changes_vanishes() -> None:
    """Moving a column as a whole changes nothing: the gradient of each column adds up to 0."""
    z0, z1 = 100 + 1e-3 * torch.randn(37, 5), torch.randn(37, 5)
    x, _, rnorm, _ = standardise(z0, z1)
    for grad in column_gradient(torch.randn(10, 37), x, rnorm, torch.float32):
        assert (grad.double().sum(0).abs() <= 1e-6 * grad.double().abs().sum(0)).all()


def test_nan_stays_in_its_column() -> None:
    z0, z1 = torch.randn(37, 3), torch.randn(37, 3)
    z0[20, 1] = float("nan")
    x, *_ = standardise(z0, z1)
    assert (x.isnan().any(0) == torch.tensor([False, True, False, False, False, False])).all()
    assert x[:, 1].isnan().all()
