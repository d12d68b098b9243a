"""The CUDA row kernels on their own: log-softmax, DimCL's columns, sums over positives, norms of rows.

Run by the emulator, each against float64; the ops that are made of them are held to the reference in
test_ops.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comparisons import error
from emulator import build
from op_checks import DEVICE
from torch import Tensor

from cl_kernels import chunked, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = DTYPES[1:]

pytestmark = [
    pytest.mark.usefixtures("one_thread", "poisoned", "emulated"),
    pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the ops are tested"),
]


@pytest.fixture
def emulated() -> None:
    if reason := build.obstacle():
        pytest.skip(reason)
    build.load()


def kernel(name: str, *arguments: Any) -> Any:
    return getattr(torch.ops.cl_kernels_cuda_rows, name)(*arguments)


# Log-softmax. Rows of a warp, of a block, with shared memory too, and cut into parts (70000 float32, and any
# single one of more than 32 KB); whole pieces of 16 bytes and not.
SHORT = [(21, 1), (21, 7), (9, 37), (9, 128), (5, 1000), (3, 1024), (3, 5000)]
LONG = [(2, 16384), (2, 40000), (1, 40001), (2, 70000)]


def some_mask(kind: str, n: int, m: int) -> Tensor | None:
    mask = torch.rand(n, m) > 0.4
    mask[::5] = False  # rows with nothing
    return {
        "none": None,
        "full": mask,
        "transposed": mask.T.contiguous().T,
        "of columns": (torch.rand(1, m) > 0.4).expand(n, m),
        "of rows": (torch.rand(n, 1) > 0.4).expand(n, m),
        "shifted": torch.cat([mask.flatten().new_zeros(3), mask.flatten()])[3:].view(n, m),
    }[kind]


def assert_log_softmax(logits: Tensor, mask: Tensor | None, grad: Tensor) -> None:
    dtype, eps = logits.dtype, torch.finfo(logits.dtype).eps
    leaf = logits.double().requires_grad_()
    truth = reference.masked_log_softmax_matrix(leaf, mask)
    (exact_grad,) = torch.autograd.grad(truth, leaf, grad.double())
    out = kernel("log_softmax", logits, mask)
    ours = kernel("log_softmax_gradient", grad, out, mask)
    assert all(x.is_contiguous() and x.dtype == dtype and x.shape == logits.shape for x in (out, ours))
    excluded = torch.zeros(logits.shape, dtype=torch.bool) if mask is None else ~mask
    assert ((out == -math.inf) == (truth == -math.inf)).all()
    assert (ours[excluded] == 0).all()
    kept, exact = out.masked_fill(excluded, 0), truth.detach().masked_fill(excluded, 0)
    assert error(kept, exact) <= (eps + 4e-7) * float(1 + exact.abs().max())
    # The gradient is made of the output as it was rounded.
    total = float(grad.double().masked_fill(excluded, 0).abs().sum(1).max())
    largest = float(kept.abs().max())
    softmax = float(exact.masked_fill(excluded, -math.inf).exp().max())
    sums = 4e-7 * total + eps * float(grad.double().abs().max())
    assert error(ours, exact_grad) <= sums + 2 * eps * total * softmax * (1 + largest)


@pytest.mark.parametrize("mask", ["none", "full"])
@pytest.mark.parametrize(("n", "m"), SHORT + LONG)
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_softmax(dtype: torch.dtype, n: int, m: int, mask: str) -> None:
    assert_log_softmax((3 * torch.randn(n, m)).to(dtype), some_mask(mask, n, m), torch.randn(n, m).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_softmax_with_less_shared_memory(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared memory of sm_86, sm_89 and sm_120: rows that would need more are cut into parts."""
    monkeypatch.setenv("CL_KERNELS_EMULATED_SHARED", str(99 * 1024))
    n, m = 2, 40000 if dtype == torch.float32 else 70000
    assert_log_softmax((3 * torch.randn(n, m)).to(dtype), None, torch.randn(n, m).to(dtype))


@pytest.mark.parametrize("mask", ["transposed", "of columns", "of rows", "shifted"])
@pytest.mark.parametrize(("n", "m"), [(9, 37), (9, 40), (2, 5000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_softmax_of_any_mask(dtype: torch.dtype, n: int, m: int, mask: str) -> None:
    assert_log_softmax(torch.randn(n, m).to(dtype), some_mask(mask, n, m), torch.randn(n, m).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_softmax_of_any_strides(dtype: torch.dtype) -> None:
    n, m = 9, 45
    mask = some_mask("full", n, m)
    for logits in (
        torch.randn(m, n).T, torch.randn(n, 2 * m)[:, ::2], torch.randn(n, m + 3)[:, 1 : m + 1],
        torch.randn(n, m + 16)[:, :m], torch.randn(n * m + 5)[5:].view(n, m), torch.randn(1, m).expand(n, m),
    ):  # fmt: skip
        assert_log_softmax(logits.to(dtype), mask, torch.randn(n, m).to(dtype))
    for grad in (torch.randn(m, n).T, torch.randn(n, 1).expand(n, m), torch.tensor(1.0).expand(n, m)):
        assert_log_softmax(torch.randn(n, m).to(dtype), mask, grad.to(dtype))
    grad, out = torch.randn(n, m).to(dtype), kernel("log_softmax", torch.randn(n, m).to(dtype), None)
    expected = kernel("log_softmax_gradient", grad, out, None)
    assert kernel("log_softmax_gradient", grad, out.T.contiguous().T, None).equal(expected)


@pytest.mark.parametrize("m", [1, 7, 1000, 5000, 70000])
def test_range_of_log_softmax(m: int) -> None:
    """Rows that rise, fall or start with nothing; logits far apart, huge, or -inf themselves."""
    rising = torch.arange(m).float() * 1000 - 5e4
    logits = torch.stack([rising, rising.flip(0), torch.full((m,), 3e38), torch.full((m,), -3e38), rising])
    logits[4, : m // 2] = -math.inf
    logits = torch.cat([logits, torch.full((1, m), -math.inf)])
    out = kernel("log_softmax", logits, None)
    torch.testing.assert_close(out[:5], logits[:5].double().log_softmax(1).float())
    assert (out[5] == -math.inf).all()
    grad = kernel("log_softmax_gradient", torch.ones_like(out), out, None)
    torch.testing.assert_close(grad[:5], 1 - m * out[:5].double().exp().float(), rtol=1e-5, atol=1e-5)
    assert grad.isfinite().all()


@pytest.mark.parametrize("m", [7, 1000, 5000, 70000])
def test_nan_stays_where_it_counts(m: int) -> None:
    """A NaN spoils its row if it is included, and nothing if it is not; likewise in a gradient."""
    n = 5
    logits, mask = torch.randn(n, m), torch.ones(n, m, dtype=torch.bool)
    logits[2, -1] = logits[3, 0] = math.nan
    mask[3, 0] = mask[4, -1] = mask[2, 1] = False
    out = kernel("log_softmax", logits, mask)
    assert (out.isnan() == (mask & (torch.arange(n) == 2)[:, None])).all()
    assert (out[~mask] == -math.inf).all()
    grad = torch.randn(n, m)
    grad[4, -1] = math.nan
    out = kernel("log_softmax_gradient", grad, out, mask)
    assert (out.isnan().any(1) == (torch.arange(n) == 2)).all()
    assert (out[~mask] == 0).all()


@pytest.mark.parametrize("m", [1, 7, 1000, 5000, 40001, 70000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_minus_infinity_have_no_gradient(dtype: torch.dtype, m: int) -> None:
    """As rows of which nothing is included; a -inf beside something finite keeps what it gets."""
    logits, mask = torch.full((4, m), -math.inf, dtype=dtype), torch.ones(4, m, dtype=torch.bool)
    logits[1, -1] = 0
    logits[2, 0] = 0
    mask[2, 0] = False
    grad = torch.rand(4, m).to(dtype) + 1
    for given in (None, mask):
        out = kernel("log_softmax", logits, given)
        ours = kernel("log_softmax_gradient", grad, out, given)
        assert (ours[[0, 3]] == 0).all()
        assert ours[1, :-1].equal(grad[1, :-1])
    assert (ours[2] == 0).all()


# DimCL's columns.
def formula(z: Tensor, grad_x: Tensor) -> tuple[Tensor, Tensor]:
    """The centred columns at unit length, and the gradient of z."""
    z = z.detach().requires_grad_()
    x = reference.standardize(z)
    return x.detach(), torch.autograd.grad(x, z, grad_x.to(z.dtype))[0]


def assert_columns(z0: Tensor, z1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The errors of ours are at most twice those of plain torch, plus what one rounding of each term does."""
    n, d = z0.shape
    eps = torch.finfo(z0.dtype).eps
    x, mean, rnorm = kernel("standardise", z0, z1)
    assert (x[:, n:] == 0).all()
    x = x[:, :n]
    grad_x = torch.randn(2 * d, n)
    grads = kernel("column_gradient", grad_x, x, rnorm)
    for i, (z, grad) in enumerate(zip((z0, z1), grads, strict=True)):
        rows = slice(i * d, (i + 1) * d)
        exact_mean, exact_rnorm = chunked._column_statistics(z.double())
        torch.testing.assert_close(mean[i], exact_mean.float(), rtol=1e-6, atol=1e-6 * float(z.abs().max()))
        assert ((rnorm[i] == 0) == (chunked._column_statistics(z)[1] == 0)).all()
        exact_x, exact_grad = formula(z.double(), grad_x[rows].T.double())
        exact_x, exact_grad = (torch.where(rnorm[i] == 0, 0, e) for e in (exact_x, exact_grad))
        plain_x, plain_grad = formula(z, grad_x[rows].T)
        assert error(x[rows].T, exact_x) <= 2 * error(plain_x, exact_x) + eps * float(exact_x.abs().max())
        terms = exact_rnorm * (rnorm[i] != 0) * grad_x[rows].double().norm(dim=1)
        for c in range(d):  # columns differ in size: each is held to its own errors
            limit = 2 * error(plain_grad[:, c], exact_grad[:, c]) + eps * float(terms[c])
            assert error(grad[:, c], exact_grad[:, c]) <= limit
    return x, mean, rnorm


@pytest.mark.parametrize(
    "shape", [(2, 1), (2, 5), (37, 19), (53, 33), (64, 64), (70, 3), (600, 67), (300, 130)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    assert_columns(torch.randn(shape).to(dtype), (3 * torch.randn(shape) + 1).to(dtype))


def test_columns_of_any_row_stride() -> None:
    assert_columns(torch.randn(37, 40)[:, 3:22], torch.randn(74, 19)[::2])


@pytest.mark.parametrize("value", [0.0, 0.1, -1000.3, 3e4])
@pytest.mark.parametrize("n", [53, 700])
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_columns_are_zero(dtype: torch.dtype, n: int, value: float) -> None:
    z0, z1 = torch.randn(n, 3).to(dtype), torch.randn(n, 3).to(dtype)
    z0[:, 1] = z1[:, 2] = value
    x, mean, rnorm = assert_columns(z0, z1)
    assert mean[0, 1] == z0[0, 1] and mean[1, 2] == z1[0, 2]
    assert (rnorm == 0).nonzero().tolist() == [[0, 1], [1, 2]]
    assert (x[[1, 5]] == 0).all()


@pytest.mark.parametrize("mean, spread", [(1.0, 1e-4), (1000.0, 1e-2), (-300.0, 1e-3)])
@pytest.mark.parametrize("n", [37, 700])
def test_nearly_constant_columns(n: int, mean: float, spread: float) -> None:
    z0, z1 = mean + spread * torch.randn(n, 5), mean + spread * torch.randn(n, 5)
    x, _, rnorm = assert_columns(z0, z1)
    exact = [chunked._standardised(z.double(), *chunked._column_statistics(z.double())) for z in (z0, z1)]
    assert error(x, torch.cat(exact)) < 1e-6  # the mean takes no digits from the spread
    for grad in kernel("column_gradient", torch.randn(10, n), x, rnorm):
        # What moves a column as a whole changes nothing.
        assert (grad.double().sum(0).abs() <= 1e-6 * grad.double().abs().sum(0)).all()


def test_nan_stays_in_its_column() -> None:
    z0, z1 = torch.randn(37, 3), torch.randn(37, 3)
    z0[20, 1] = math.nan
    x, _, _ = kernel("standardise", z0, z1)
    assert x[1, :37].isnan().all()
    assert (x.isnan().any(1) == (torch.arange(6) == 1)).all()
    assert (x[:, 37:] == 0).all()


# Sums over positives, of half-precision features.
WIDE = torch.tensor(
    [-(2**63), 2**63 - 1, -(2**30) - 1, -(2**30), -2, -1, 0, 2**32, -(2**32), 2**30 - 1, 2**30, 2**30 + 2**32]
)


@pytest.mark.parametrize("n", [1, 6, 128, 300])
@pytest.mark.parametrize("name", ["ids", "classes"])
def test_ids(name: str, n: int) -> None:
    rows, cols = (WIDE[torch.randint(len(WIDE), (count,))] for count in (n, n + 7))
    row_ids, col_ids = kernel(name, rows, cols)
    assert row_ids.dtype == col_ids.dtype == torch.int32
    assert ((row_ids[:, None] == col_ids) == (rows[:, None] == cols)).all()
    for ids in (row_ids, col_ids):
        assert (ids != -1).all()
        whole = ids.as_strided((-(-len(ids) // 128) * 128,), (1,))
        assert (whole[len(ids) :] == -1).all()
    own, same = kernel(name, cols, cols)
    assert own.equal(same) and own.equal(col_ids)


def assert_sums(
    q: Tensor,
    k: Tensor | None,
    weights: Tensor,
    exclude: int | None,
    keeps_excluded: bool = False,
    **positives: Any,
) -> None:
    """`weights` [N, M] of the pairs, before the excluded ones are taken out."""
    keys = q if k is None else k
    weights = weights.double()
    if exclude is not None and not keeps_excluded:
        j = torch.arange(len(q)) + exclude
        inside = (j >= 0) & (j < len(keys))
        weights[inside.nonzero()[:, 0], j[inside]] = 0
    given = (positives.get(name) for name in ("row_labels", "col_labels", "positive_index", "positive_mask"))
    result = kernel("positive_sums", q, k, torch.tensor(10.0), exclude, *given)
    truth = (weights * (10 * q.double() @ keys.double().T)).sum(1), weights.sum(1)
    terms = 10 * (weights.abs() @ keys.double().abs()).max() * q.double().abs().sum(1).max()
    for ours, exact in zip(result, truth, strict=True):
        assert ours.dtype == torch.float64
        assert error(ours, exact) <= 2e-7 * float(max(terms, 1))


@pytest.mark.parametrize("exclude", [None, 0, -40, 60])
@pytest.mark.parametrize("classes", [1, 3, 50, 1000])
@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_sums_by_label(dtype: torch.dtype, keys: bool, classes: int, exclude: int | None) -> None:
    n, m, d = 150, 700 if keys else 150, 19
    q, k = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype) if keys else None
    rows = torch.randint(-classes, classes, (n,))
    cols = torch.randint(-classes, classes, (m,)) if keys else rows
    weights = rows[:, None] == cols
    assert_sums(q, k, weights, exclude, row_labels=rows, col_labels=cols)


@pytest.mark.parametrize("d", [1, 100, 128, 300])
@pytest.mark.parametrize("dtype", HALF)
def test_sums_by_label_of_any_width(dtype: torch.dtype, d: int) -> None:
    labels = torch.randint(3, (90,))
    q = torch.randn(d, 90).T.to(dtype)
    assert_sums(q, None, labels[:, None] == labels, 0, row_labels=labels, col_labels=labels)


def test_the_only_one_of_its_class_has_no_positives() -> None:
    q, labels = torch.randn(90, 33).bfloat16(), torch.arange(90)
    total, count = kernel("positive_sums", q, None, torch.tensor(10.0), 0, labels, labels, None, None)
    assert (total == 0).all() and (count == 0).all()


@pytest.mark.parametrize("exclude", [None, 0])
@pytest.mark.parametrize("dtype", HALF)
def test_sums_by_index(dtype: torch.dtype, exclude: int | None) -> None:
    n, m, d = 75, 53, 37
    q, k, index = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype), torch.randint(-1, m, (n,))
    weights = index[:, None] == torch.arange(m)
    assert_sums(q, k, weights, exclude, keeps_excluded=True, positive_index=index)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("exclude", [None, 0, -7, 20])
@pytest.mark.parametrize("size", [(60, 96), (20, 32), (60, 1), (7, 41)])
@pytest.mark.parametrize("dtype", HALF)
def test_sums_by_mask(
    dtype: torch.dtype, size: tuple[int, int], exclude: int | None, kind: torch.dtype
) -> None:
    n, m, d = 60, 96, 19
    q, k = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
    mask = torch.rand(size) > 0.6 if kind == torch.bool else torch.randn(size)
    weights = mask[torch.arange(n) % size[0]][:, torch.arange(m) % size[1]]
    assert_sums(q, k, weights, exclude, positive_mask=mask)
    assert_sums(q, k, weights, exclude, positive_mask=mask.T.contiguous().T)


# Norms of rows.
@pytest.mark.parametrize(("n", "d"), [(5, 1), (21, 7), (9, 64), (9, 300), (3, 1100)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_norms(dtype: torch.dtype, n: int, d: int) -> None:
    x = torch.randn(n, d).to(dtype)
    x[1] = 0
    rnorm, unit = kernel("row_norms", x)
    norm = x.double().norm(dim=1)
    exact = torch.where(norm == 0, 0, 1 / norm)
    torch.testing.assert_close(rnorm, exact.float(), rtol=1e-6, atol=0)
    assert error(unit[:, :d], x.double() * exact[:, None]) <= torch.finfo(dtype).eps + 1e-6
    assert (unit[:, d:] == 0).all()

    grad = torch.randn(n, d)
    u = x.double() * exact[:, None]
    dot = (u * grad).sum(1)
    out, along = kernel("row_gradient", grad, x, rnorm, torch.tensor(3.0), 2.0, 0.5)
    torch.testing.assert_close(along, 0.5 * dot, rtol=1e-5, atol=1e-5)
    truth = 6 * exact[:, None] * (grad - u * dot[:, None])
    limit = (torch.finfo(dtype).eps + 1e-6) * float((6 * exact * grad.norm(dim=1)).max())
    assert error(out, truth) <= limit
    out, along = kernel("row_gradient", grad, x, None, torch.tensor(3.0), 2.0, 0.5)
    torch.testing.assert_close(along, 0.5 * (x.double() * grad).sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, (6 * grad).to(dtype))
