"""A NaN that takes part in a row, a column or a product comes out of the CUDA C++ kernels as NaN, whatever
its bits, and of what leaves it out it changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_checks import ARCHITECTURES, DTYPES, by_reference, prepare_cuda
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread", "kernels")

ops = torch.ops.cl_kernels_cuda

# Quiet with all bits set, and signalling.
BITS = {
    torch.float32: (0x7FFFFFFF, 0x7F800001),
    torch.float16: (0x7FFF, 0x7C01),
    torch.bfloat16: (-1, 0x7F81),
}
CASES = [(dtype, bits) for dtype in DTYPES for bits in BITS[dtype]]
every_nan = pytest.mark.parametrize(("dtype", "bits"), CASES, ids=str)


@pytest.fixture(params=ARCHITECTURES)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The architecture whose kernels run."""
    prepare_cuda(request.param, monkeypatch)
    if request.param == "90" and request.node.callspec.params["dtype"] == torch.float32:
        pytest.skip("float32 runs on the portable kernels")
    return request.param


def features(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, width).to(dtype)


def put(x: Tensor, row: int, column: int, bits: int) -> Tensor:
    kind = torch.int32 if x.dtype == torch.float32 else torch.int16
    x.view(kind)[row, column] = bits
    assert x.isnan().sum() == 1
    return x


def contrastive(
    q: Tensor,
    k: Tensor | None = None,
    exclude: int | None = None,
    labels: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    among: str = "all",
    positives: Any = None,
    bias: Tensor | None = None,
    both_axes: bool = False,
    save_gradient: bool = False,
    scale: float = 1.0,
) -> list[Any]:
    """Arguments of contrastive_forward. `positives`: "labels", an index or a mask."""
    given = isinstance(positives, Tensor)
    index = positives if given and positives.dim() == 1 else None
    mask = positives if given and positives.dim() == 2 else None
    return [
        q, k, torch.tensor(scale), exclude, *labels, among, positives == "labels" if not given else False,
        index, mask, bias, both_axes, save_gradient,
    ]  # fmt: skip


def assert_same_nans(arguments: list[Any]) -> tuple[Tensor, ...]:
    """Log-sum-exps are NaN where those of the reference are, and close otherwise."""
    found = ops.contrastive_forward(*arguments)
    expected = by_reference("contrastive_forward", *arguments)
    for ours, exact in zip(found[:2], expected[:2], strict=True):
        assert ours.isnan().equal(exact.isnan())
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5, equal_nan=True)
    return found


PLACES = [(0, 0), (-1, -1)]


@every_nan
@pytest.mark.parametrize("small", [False, True])
def test_of_a_query_or_a_key(
    dtype: torch.dtype, bits: int, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        monkeypatch.setenv("CL_KERNELS_EMULATED_SMALL", "1")
    for row, column in PLACES:
        q, k = put(features(35, 19, dtype), row, column, bits), features(37, 19, dtype)
        index = torch.arange(35)
        lse, _, positive_sum, *_ = assert_same_nans(contrastive(q, k, positives=index))
        assert lse.isnan().nonzero().flatten().tolist() == [row % 35]
        assert positive_sum.isnan().equal(lse.isnan())
        _, lse_cols, *_ = assert_same_nans(contrastive(k, q, both_axes=True))
        assert lse_cols.isnan().nonzero().flatten().tolist() == [row % 35]
        assert_same_nans(contrastive(q, exclude=0, positives=index.roll(5)))


@every_nan
def test_of_frozen_keys(dtype: torch.dtype, bits: int) -> None:
    """The log-sum-exps of an attention."""
    for row, column in PLACES:
        q, k = put(features(35, 19, dtype), row, column, bits), features(140, 19, dtype)
        lse, _, positive_sum, _, residual = assert_same_nans(
            contrastive(q, k, positives=torch.arange(35), save_gradient=True)
        )
        assert positive_sum.isnan().equal(lse.isnan()) and residual.isnan().any(1).equal(lse.isnan())
        arguments = contrastive(features(35, 19, dtype), put(k, row, column, bits), save_gradient=True)
        assert assert_same_nans(arguments)[0].isnan().all()


@every_nan
def test_what_is_left_out_does_not_count(dtype: torch.dtype, bits: int) -> None:
    q, k = features(35, 19, dtype), put(features(37, 19, dtype), 20, 18, bits)
    rows, cols = torch.arange(35) % 4, torch.arange(37) % 4
    for save_gradient in (False, True):
        lse = assert_same_nans(contrastive(q, k, exclude=1, save_gradient=save_gradient))[0]
        assert lse.isfinite().nonzero().flatten().tolist() == [19]
        for among in ("same", "different"):
            problem = contrastive(
                q, k, labels=(rows, cols), among=among, both_axes=not save_gradient,
                save_gradient=save_gradient,
            )  # fmt: skip
            lse = assert_same_nans(problem)[0]
            assert lse.isnan().equal((rows == cols[20]) == (among == "same"))


@every_nan
@pytest.mark.parametrize("kind", ["labels", "index", "mask"])
def test_of_positives(kind: str, dtype: torch.dtype, bits: int) -> None:
    """A pair that takes part in a sum over positives."""
    k = put(features(37, 19, dtype), 36, 0, bits)
    rows, cols = torch.arange(35) % 4, torch.arange(37) % 4
    weights = rows[:, None] == cols
    positives: Any = kind
    if kind == "index":
        positives = torch.arange(35).clamp(min=3) + 2
        weights = positives[:, None] == torch.arange(37)
    elif kind == "mask":
        positives = weights.float()
    labels = (rows, cols) if kind == "labels" else (None, None)
    _, _, total, count, _ = ops.contrastive_forward(
        *contrastive(features(35, 19, dtype), k, labels=labels, positives=positives)
    )
    assert total[weights[:, 36]].isnan().all() and count.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_scale_and_bias(dtype: torch.dtype) -> None:
    q, k, bias = features(35, 19, dtype), features(37, 19, dtype), torch.zeros(37)
    assert assert_same_nans(contrastive(q, k, scale=torch.nan))[0].isnan().all()
    bias[36] = torch.nan
    assert assert_same_nans(contrastive(q, k, bias=bias))[0].isnan().all()
    bias[36] = -torch.inf
    assert assert_same_nans(contrastive(q, k, bias=bias))[0].isfinite().all()


@every_nan
@pytest.mark.parametrize("in_target", ["exclude", "zero"])
@pytest.mark.parametrize("save_gradient", [False, True])
def test_of_soft_targets(in_target: str, save_gradient: bool, dtype: torch.dtype, bits: int) -> None:
    """In the student's query, the teacher's, and a key of the teacher's that some row leaves out."""
    for row, column in PLACES:
        q, t = features(35, 19, dtype), features(35, 19, dtype)
        k, u = features(140, 19, dtype), features(140, 19, dtype)
        positive = torch.arange(35) - 1
        options = (torch.tensor(1.0), torch.tensor(1.0), positive, in_target, save_gradient)
        spoilt = torch.arange(35) == row % 35
        for of_teacher in (False, True):
            x = [q.clone(), t.clone()]
            put(x[of_teacher], row, column, bits)
            lse, target_lse, cross, *_ = ops.soft_target_forward(x[0], [k], x[1], [u], *options)
            assert lse.isnan().equal(spoilt & (not of_teacher))
            assert target_lse.isnan().equal(spoilt & of_teacher)
            assert cross.isnan().equal(spoilt)
        key = put(u.clone(), 7, column, bits)
        lse, target_lse, cross, *_ = ops.soft_target_forward(q, [k], t, [key], *options)
        assert lse.isfinite().all()
        assert target_lse.isnan().equal(positive != 7) and cross.isnan().equal(positive != 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_a_key_without_weight_in_the_target(dtype: torch.dtype) -> None:
    """A weight of the teacher's that is rounded to nothing, times NaN, is NaN."""
    q, k, t = features(5, 8, dtype), features(9, 8, dtype), torch.eye(5, 8).to(dtype)
    u = torch.eye(9, 8).to(dtype)
    k[7] = torch.nan
    _, target_lse, cross, *_ = ops.soft_target_forward(
        q, [k], t, [u], torch.tensor(1.0), torch.tensor(500.0), None, "exclude", False
    )
    assert target_lse.isfinite().all() and cross.isnan().all()


@every_nan
def test_of_dimcl(dtype: torch.dtype, bits: int) -> None:
    for row, column in PLACES:
        z0, z1 = put(features(37, 35, dtype), row, column, bits), features(37, 35, dtype)
        lse, positive_sum, _, mean, rnorm = ops.dimcl_forward(z0, z1, torch.tensor(1.0), None)
        assert lse.isnan().all()
        own = torch.arange(70) % 35 == column % 35
        assert positive_sum[own].isnan().all()
        assert mean.flatten().isnan().nonzero().flatten().tolist() == [column % 35]
        assert rnorm.isnan().equal(mean.isnan())


@every_nan
@pytest.mark.parametrize("normalize", [False, True])
def test_of_similarity(normalize: bool, dtype: torch.dtype, bits: int) -> None:
    for row, column in PLACES:
        q, k = put(features(35, 19, dtype), row, column, bits), features(37, 19, dtype)
        for out in (
            ops.similarity_forward(q, k, torch.tensor(1.0), normalize)[0],
            ops.similarity_forward(k, q, torch.tensor(1.0), normalize)[0].T,
        ):
            assert out.isnan().equal((torch.arange(35) == row % 35)[:, None].expand(35, 37))
