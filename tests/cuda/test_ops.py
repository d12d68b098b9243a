"""Every op in every variant by the CUDA C++ kernels, against the chunked reference in float64.

On the CPU an emulator runs the kernels (tests/emulator), those for sm_80 and those for Hopper in turn;
CL_KERNELS_TEST_DEVICE=cuda runs the GPU's own.
"""

from __future__ import annotations

from typing import Any

import op_cases
import pytest
import torch
from op_checks import (
    ALL,
    ARCHITECTURES,
    DTYPES,
    SIZES,
    TRIPLES,
    assert_close,
    assert_features_are_needed,
    by_reference,
    prepare_cuda,
    run,
)
from torch import Tensor

import cl_kernels as clk
from cl_kernels import dispatch

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread", "kernels")


@pytest.fixture(params=ARCHITECTURES)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The architecture whose kernels run."""
    prepare_cuda(request.param, monkeypatch)
    return request.param


def by_cuda(name: str, *arguments: Any) -> Any:
    return getattr(torch.ops.cl_kernels_cuda, name)(*arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("op", "variant", "size"), TRIPLES)
def test_every_variant(op: str, variant: str, size: str, dtype: torch.dtype, kernels: str) -> None:
    if kernels == "90" and dtype == torch.float32:
        pytest.skip("float32 runs on the portable kernels")
    results = run(op, variant, SIZES[size], dtype, by_cuda)
    assert_close(results, run(op, variant, SIZES[size], dtype, by_reference), dtype)


CONTRASTIVE = [variant for op, variant, _ in ALL if op == "contrastive"]


@pytest.mark.parametrize("variant", CONTRASTIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_problems_in_one_launch(
    variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CL_KERNELS_EMULATED_SMALL", "1")
    sizes = op_cases.Sizes(150, 400, 40)
    results = run("contrastive", variant, sizes, dtype, by_cuda)
    assert_close(results, run("contrastive", variant, sizes, dtype, by_reference), dtype)


@pytest.mark.parametrize("op", ["contrastive", "similarity", "soft_target", "dimcl"])
def test_copies_that_arrive_early(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer that is given up before its last product has read it gives wrong numbers then."""
    monkeypatch.setenv("CL_KERNELS_EMULATED_COPIES", "early")
    for variant in [variant for name, variant, rank in ALL if name == op and rank == 0]:
        sizes = op_cases.Sizes(200, 300, 150)
        results = run(op, variant, sizes, torch.bfloat16, by_cuda)
        assert_close(results, run(op, variant, sizes, torch.bfloat16, by_reference), torch.bfloat16)


LARGER = [
    ("contrastive", "self", (300, 1, 128)),
    ("contrastive", "self, labels", (200, 1, 256)),
    ("contrastive", "both axes", (150, 270, 64)),
    ("contrastive", "keys, frozen", (70, 500, 128)),
    ("contrastive", "self, labels", (300, 1, 290)),
    ("contrastive", "both axes", (150, 270, 290)),
    ("contrastive", "self", (260, 1, 600)),
    ("contrastive", "both axes", (150, 270, 600)),
    ("similarity", "keys, normalize", (140, 264, 72)),
]


@pytest.mark.parametrize(("op", "variant", "sizes"), LARGER)
def test_several_tiles(op: str, variant: str, sizes: tuple[int, int, int]) -> None:
    several = type(SIZES["tails"])(*sizes)
    results = run(op, variant, several, torch.bfloat16, by_cuda)
    assert_close(results, run(op, variant, several, torch.bfloat16, by_reference), torch.bfloat16)


@pytest.mark.parametrize("op", ["contrastive", "dimcl", "soft_target"])
def test_two_runs_are_bitwise_equal(op: str) -> None:
    variant = next(variant for name, variant, rank in ALL if name == op and rank == 0)

    def once() -> list[Tensor]:
        return run(op, variant, SIZES["tails"], torch.bfloat16, by_cuda)

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.parametrize("size", [3.0, 30.0, 1000.0])
@pytest.mark.parametrize("both_axes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_range_of_logits(size: float, both_axes: bool, dtype: torch.dtype) -> None:
    """Bounds up to 2^100, past it, and so far past that sums of some rows vanish next to others."""
    q = (torch.randn(60, 8) * torch.logspace(-3, 0, 60)[torch.randperm(60)][:, None] * size).to(dtype)
    k = (torch.randn(45, 8) * torch.logspace(-3, 0, 45)[:, None]).to(dtype) if both_axes else None
    arguments = (
        q, k, torch.tensor(1.0), 0 if k is None else None, None, None, "all", False, None, None, None,
        both_axes, False,
    )  # fmt: skip
    lse_rows, lse_cols, *_ = by_cuda("contrastive_forward", *arguments)
    expected, expected_cols, *_ = by_reference("contrastive_forward", *arguments)
    largest = 1e-6 * float(expected.abs().max()) + 1e-5
    torch.testing.assert_close(lse_rows, expected, rtol=0, atol=largest)
    torch.testing.assert_close(lse_cols, expected_cols, rtol=0, atol=largest)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_matmul_precision(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        results = run("contrastive", "keys", SIZES["tails"], torch.float32, by_cuda)
    finally:
        torch.set_float32_matmul_precision(before)
    truth = run("contrastive", "keys", SIZES["tails"], torch.float32, by_reference)
    errors = [
        float((x.double() - y).abs().max() / y.abs().max()) for x, y in zip(results[:1], truth, strict=False)
    ]
    assert 1e-7 < max(errors) < 1e-3  # tf32: it made a difference


def test_nan_stays_nan_in_its_rows_only() -> None:
    q, k = torch.randn(40, 5), torch.randn(30, 5)
    q[3] = torch.nan
    arguments = (q, k, torch.tensor(1.0), None, None, None, "all", False, None, None, None, False, False)
    found = by_cuda("contrastive_forward", *arguments)[0]
    assert found.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("positives", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_labels_of_64_bits(dtype: torch.dtype, positives: bool) -> None:
    """Labels that differ in their upper bits alone are others; numbered from 0 they give the same bits."""
    small = [torch.randint(4, (count,)) for count in (150, 140)]
    wide = [torch.tensor([7, 7 + 2**32, 7 - 2**40, -1])[labels] for labels in small]
    q, k = torch.randn(150, 24).to(dtype), torch.randn(140, 24).to(dtype)
    grads = (torch.rand(150).double(), None, torch.rand(150).double() if positives else None)
    found = []
    for labels in (small, wide):
        problem = (
            q, k, torch.tensor(0.3), None, *labels, "all" if positives else "different", positives, None,
            None, None, False,
        )  # fmt: skip
        forward = by_cuda("contrastive_forward", *problem, False)
        saved = (*forward[:2], forward[4], (True, True, True, False))
        found.append([*forward, *by_cuda("contrastive_backward", *grads, *problem, *saved)])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_no_features() -> None:
    assert_features_are_needed(by_cuda, "contrastive", "soft_target", "dimcl", "similarity")


def test_backend_by_name() -> None:
    q = torch.randn(6, 4)
    with clk.use_backend("cuda"):
        assert dispatch.select("contrastive_forward", q) == "cuda"
        with pytest.raises(clk.BackendError, match="float64"):
            clk.contrastive_lse(q.double())


def test_a_matrix_of_the_first_rows_of_another() -> None:
    """The same pointer is not the same matrix: the largest logits are those of the other rows."""
    for dtype in DTYPES:
        k = torch.nn.functional.normalize(torch.randn(40, 2, 16), dim=2).transpose(0, 1).flatten(0, 1)
        k[40:] *= 20
        k = k.to(dtype)
        for q, both_axes in ((k[:40], False), (k[:40], True), (k[::2], False), (k[:, :8], False)):
            keys = k if q.shape[1] == 16 else k[:40, :8]
            arguments = (
                q, keys, torch.tensor(1 / 0.07), 0, None, None, "all", False, None, None, None, both_axes,
                False,
            )  # fmt: skip
            found = by_cuda("contrastive_forward", *arguments)
            expected = by_reference("contrastive_forward", *arguments)
            for lse, exact in zip(found[:2], expected[:2], strict=True):
                torch.testing.assert_close(lse, exact, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("size", [-90.0, -500.0, 90.0, 1e5])
def test_a_bias_of_any_size(size: float) -> None:
    """Where it is below everything that sums without a shift can tell from 0, too."""
    q, k = torch.randn(40, 8), torch.randn(30, 8)
    arguments = (
        q, k, torch.tensor(1.0), None, None, None, "all", False, None, None, torch.randn(30) + size, True,
        False,
    )  # fmt: skip
    found = by_cuda("contrastive_forward", *arguments)
    expected = by_reference("contrastive_forward", *arguments)
    for lse, exact in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(lse, exact, rtol=3e-7, atol=1e-5)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_from_the_residual_takes_the_positives_alone(dtype: torch.dtype, index: bool) -> None:
    """The keys of the positives, gathered, in place of all keys: nothing else of these is read."""
    q, k = torch.randn(21, 19).to(dtype), torch.randn(45, 19).to(dtype)
    found = torch.randint(-1, 45, (21,)) if index else None
    scale, bias = torch.tensor(0.5), torch.randn(45)
    none = (None, None, "all", False)
    forward = by_cuda("contrastive_forward", q, k, scale, 1, *none, found, None, bias, False, True)
    lse, lse_cols, _, _, residual = forward
    grads = (torch.rand(21).double(), None, torch.rand(21).double() if index else None)
    needs = (True, False, True, False)
    saved = (lse, lse_cols, residual, needs)
    full = by_cuda(
        "contrastive_backward", *grads, q, k, scale, 1, *none, found, None, bias, False, *saved
    )  # fmt: skip
    keys = [k[found.clamp(min=0)]] if found is not None else [k[:0], k[:1].fill_(torch.nan)]
    own = None if found is None else torch.where(found < 0, -1, torch.arange(21))
    for compact in keys:
        problem = (q, compact, scale, None, *none, own, None, None, False)
        part = by_cuda("contrastive_backward", *grads, *problem, *saved)
        assert all(torch.equal(x, y) for x, y in zip(full, part, strict=True))
