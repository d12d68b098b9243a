"""Targets that several student views share: the same loss and gradients as without them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from comparisons import unit

import cl_kernels as clk

CASES: dict[str, dict[str, Any]] = {
    "batch": {},
    "gathered, rank 1": {"k_global": 30, "rank": 1},
    "queue": {"queue": 40},
    "gathered and queue": {"k_global": 12, "queue": 23},
    "one key": {"n": 1},
}


def inputs(dtype: torch.dtype, n: int = 12, rank: int = 0, **rows: int) -> dict[str, Any]:
    k = unit(n, 9, dtype=dtype)
    others = {name: unit(size, 9, dtype=dtype) for name, size in rows.items()}
    if "k_global" in others:
        others["k_global"][n * rank : n * (rank + 1)] = k
    return {"k": k, **others, "rank": rank}


@pytest.mark.parametrize("how", ["exclude", "zero"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_targets_change_nothing(backend: str, case: str, how: str) -> None:
    triton = backend == "triton"
    device = os.environ.get("CL_KERNELS_TEST_DEVICE", "cpu") if triton else "cpu"
    dtype = torch.float32 if triton else torch.float64
    keys = {name: x.to(device) if name != "rank" else x for name, x in inputs(dtype, **CASES[case]).items()}
    tau = torch.tensor(0.15, dtype=dtype, requires_grad=True)
    coeff = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    q = unit(*keys["k"].shape, dtype=dtype).to(device).requires_grad_()
    options = {"temperature": tau, "coeff": coeff}
    with clk.use_backend(backend):
        targets = clk.sce_targets(**keys, target_temperature=0.08, positive_in_target=how)
        loss = clk.sce_loss(q, **keys, **options, targets=targets)
        grads = torch.autograd.grad(loss, (q, tau, coeff), allow_unused=True, materialize_grads=True)
    expected = clk.reference.sce_loss(q, **keys, **options, target_temperature=0.08, positive_in_target=how)
    expected_grads = torch.autograd.grad(expected, (q, tau, coeff), allow_unused=True, materialize_grads=True)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if triton else {"rtol": 1e-9, "atol": 1e-10}
    for found, wanted in zip((loss, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(found, wanted, **tolerance)


def test_module_and_second_derivative() -> None:
    k, queue = unit(6, 5, dtype=torch.float64), unit(8, 5, dtype=torch.float64)
    q = unit(6, 5, dtype=torch.float64).requires_grad_()
    targets = clk.sce_targets(k, queue=queue)
    loss = clk.SCELoss(coeff=0.4)
    torch.testing.assert_close(loss(q, k, queue=queue, targets=targets), loss(q, k, queue=queue))
    assert torch.autograd.gradgradcheck(lambda x: clk.sce_loss(x, k, queue=queue, targets=targets), (q,))


@pytest.mark.parametrize("targets", [3, "x", (torch.zeros(4), torch.zeros(4, 5), "zero")])
def test_targets_of_another_type_are_named(targets: object) -> None:
    q = torch.randn(4, 5)
    with pytest.raises(TypeError, match="targets must be made by sce_targets"):
        clk.sce_loss(q, q, targets=targets)  # type: ignore[arg-type]


def test_bad_targets_are_named() -> None:
    q, k = unit(6, 5), unit(6, 5)
    targets = clk.sce_targets(k)
    with pytest.raises(ValueError, match=r"^targets must be of queries"):
        clk.sce_loss(q[:4], k[:4], targets=targets)
    with pytest.raises(ValueError, match=r"^targets must not be given with keys that require a gradient"):
        clk.sce_loss(q, k.requires_grad_(), targets=targets)
