"""Helpers for tests of the GPU kernels: the cases of op_cases.py at odd sizes, and the truth in float64."""

from __future__ import annotations

import os
from typing import Any

import op_cases
import pytest
import torch
from emulator import build
from torch import Tensor

from cl_kernels import chunked, dispatch, extension

DEVICE = os.environ.get("CL_KERNELS_TEST_DEVICE", "cpu")
# Whose CUDA C++ kernels run: under the emulator those for sm_80 and Hopper's in turn.
ARCHITECTURES = ["80", "90"] if DEVICE == "cpu" else ["here"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = {
    "tails": op_cases.Sizes(75, 53, 19),
    "wide": op_cases.Sizes(50, 37, 300),
    "one": op_cases.Sizes(1, 1, 1),
}
ALL = [(case.op, case.variant, case.rank) for case in op_cases.cases(SIZES["tails"], torch.float32)]
TRIPLES = [
    pytest.param(op, variant, size, id=f"{op}-{variant}-{size}")
    for op, variant, rank in ALL
    for size in SIZES
    if size == "tails" or rank < 2
]


def prepare_cuda(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the backend "cuda" serve, or skip the test."""
    if DEVICE == "cpu":
        if reason := build.obstacle():
            pytest.skip(reason)
        build.load()
        extension.cuda.require()  # finds the emulated ops
        monkeypatch.setenv("CL_KERNELS_EMULATED_ARCHITECTURE", architecture)
    elif reason := dispatch.obstacle("cuda", DEVICE):
        pytest.skip(reason)


def by_reference(name: str, *arguments: Any) -> Any:
    """An op by the reference in float64; saved statistics are taken as they come."""

    def wide(x: Any) -> Any:
        if isinstance(x, list):
            return [wide(part) for part in x]
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return getattr(chunked, name)(*map(wide, arguments))


def run(
    op: str, variant: str, sizes: op_cases.Sizes, dtype: torch.dtype, call: op_cases.Call
) -> list[Tensor]:
    torch.manual_seed(0)
    cases = op_cases.cases(sizes, dtype, DEVICE)
    return next(case for case in cases if (case.op, case.variant) == (op, variant)).run(call)


def assert_features_are_needed(call: op_cases.Call, *ops: str) -> None:
    """Rows of no features are refused."""
    for case in op_cases.cases(op_cases.Sizes(5, 7, 0), torch.float32, DEVICE):
        if case.op in ops and case.rank == 0:
            with pytest.raises(ValueError, match=r"with features|not empty"):
                case.run(call)


def assert_close(results: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> None:
    """Relative to the largest element: sums are float32, and a half-precision gradient or output is rounded
    twice, in its tile and at the end."""
    assert len(results) == len(truth)
    for i, (result, expected) in enumerate(zip(results, truth, strict=True)):
        assert result.shape == expected.shape, f"output {i}"
        finite = expected.isfinite()
        assert torch.equal(result[~finite].double().nan_to_num(), expected[~finite].nan_to_num()), (
            f"output {i}"
        )
        if finite.any():
            error = float((result.double() - expected)[finite].abs().nan_to_num(nan=torch.inf).max())
            size = float(expected[finite].abs().max())
            # A gradient of one row, or of its scale, can be nothing but the difference of equal terms.
            terms = size if expected.numel() > 1 and size > 0 else max(size, 1.0)
            rounding = (
                2e-5 if result.dtype in (torch.float32, torch.float64) and dtype == torch.float32 else 0
            )
            rounding = rounding or 4 * torch.finfo(dtype).eps
            assert error <= rounding * terms, f"output {i} is off by {error:.3g} of {size:.3g}"
