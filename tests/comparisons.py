"""Assertions over `cl_kernels.tools.parity`, and problems for each loss."""

from __future__ import annotations

import os

import torch
from torch import Tensor

import cl_kernels as clk
from cl_kernels import dispatch
from cl_kernels.reference import plain_sums
from cl_kernels.tools.parity import (
    NORMALISING,
    Problem,
    clustered,
    compared,
    compared_in_float64,
    error,
    exact,
    near,
    plain,
    run,
    unit,
)

__all__ = [
    "KINDS",
    "NORMALISING",
    "Problem",
    "assert_close",
    "assert_parity",
    "clip_problem",
    "clustered",
    "error",
    "exact",
    "near",
    "ours",
    "plain",
    "plain_sums",
    "problems",
    "run",
    "tempered",
    "two_views",
    "unit",
]


def ours(problem: Problem) -> dict[str, Tensor]:
    """Our loss and gradients, on CL_KERNELS_TEST_DEVICE where kernels for GPUs serve."""
    on_gpu = dispatch.requested() in ("triton", "cuda")
    device = os.environ.get("CL_KERNELS_TEST_DEVICE", "cpu") if on_gpu else "cpu"
    return run(getattr(clk, problem.function), problem, device=device)


def assert_parity(problem: Problem) -> None:
    """Errors of the loss and of all gradients: at most twice those of plain torch in the same dtype, plus
    `floor`."""
    for result in compared(problem, exact(problem), ours(problem), plain(problem)):
        assert result.fault is None, f"{problem}: {result.fault}"


def assert_close(problem: Problem, rtol: float = 1e-9) -> None:
    """Loss and gradients in float64 are as the reference has them, relative to the largest element."""
    mine = run(getattr(clk, problem.function), problem, torch.float64)
    assert all(x.dtype == torch.float64 for x in mine.values())
    for result in compared_in_float64(problem, exact(problem), mine, rtol):
        assert result.fault is None, f"{problem}: {result.fault}"


# Inputs


def two_views(kind: str, n: int, d: int) -> tuple[Tensor, Tensor]:
    """A pair of [n, d], both with unit rows unless the kind says otherwise."""
    first = unit(n, d)
    second = near(first) if kind == "converged" else unit(n, d)
    if kind == "duplicates":
        first[n // 2 :] = first[: n - n // 2]
        second[n // 2 :] = first[: n - n // 2]
    elif kind == "zero rows":
        first[::3] = 0
        second[1::4] = 0
    elif kind == "norm 30":
        first, second = 30 * first, 30 * second
    elif kind == "identical":
        first[:] = first[0]
        second[:] = first[0]
    return first, second


KINDS = ("random", "converged", "duplicates", "zero rows", "norm 30", "identical")


def problems(kind: str, n: int, d: int) -> list[Problem]:
    """One problem for each loss and each way that it is served."""
    first, second = two_views(kind, n, d)
    features = torch.stack([first, second], dim=1)
    labels = torch.arange(n) % max(1, n // 3)
    if kind == "converged":
        features = clustered(labels, 2, d)
    weights = torch.rand(n, n) * (torch.rand(n, n) > 0.6)
    queue = torch.cat(
        [
            unit(2 * n + 3, d) * float(first.norm(dim=1).max()),
            second if kind == "duplicates" else near(second, 0.8),
        ]
    )
    wider = torch.cat([features, features.flip(1)], dim=2)
    found = [
        Problem("supcon_loss", {"features": torch.stack([first, second], dim=1)}),
        Problem("supcon_loss", {"features": features, "labels": labels}),
        Problem("supcon_loss", {"features": features, "labels": labels}, {"contrast_mode": "one"}),
        Problem("supcon_loss", {"features": features, "labels": labels}, {"denominator": "only_negatives"}),
        Problem("supcon_loss", {"features": features, "labels": labels}, {"summation": "in"}),
        Problem("supcon_loss", {"features": features, "mask": weights}),
        Problem(
            "supcon_loss",
            {"features": features, "labels": labels, "memory": [queue, torch.arange(len(queue)) % (n + 1)]},
        ),
        Problem("selfcon_loss", {"features": features, "labels": labels}, {"anchors": "exits"}),
        Problem("multilevel_loss", {"levels": [features, wider], "labels": labels}, {"weights": [1.0, 0.5]}),
        Problem("stablerep_loss", {"features": features[:, 0], "labels": labels}),
        Problem("nt_xent_loss", {"z0": first, "z1": second}),
        Problem("info_nce_loss", {"q": first, "k": second}),
        Problem("info_nce_loss", {"q": first, "k": second, "queue": queue}),
        Problem("dcl_loss", {"z0": first, "z1": second}),
        Problem("dcl_loss", {"z0": first, "z1": second}, {"sigma": 0.5}),
        Problem("sce_loss", {"q": first, "k": second}, {"coeff": 0.3}),
        Problem("sce_loss", {"q": first, "k": second, "k_global": queue.flip(0)}, {"coeff": 0.3, "rank": 1}),
        Problem("sce_loss", {"q": first, "k": second, "queue": queue}, {"coeff": 0.3}),
        Problem(
            "sce_loss",
            {"q": first, "k": second, "k_global": second, "queue": queue},
            {"coeff": 0.3},
            frozen=("k", "k_global", "queue"),
        ),
    ]
    if n > 1:
        found.append(Problem("dimcl_loss", {"z0": first, "z1": second}))
    return found


def tempered(problem: Problem, tau: float) -> Problem:
    """The problem at a temperature; for CLIP at its inverse."""
    extra = {"target_temperature": 0.7 * tau} if problem.function == "sce_loss" else {}
    return problem.with_options(temperature=tau, **extra)


def clip_problem(kind: str, n: int, d: int, scale: float) -> Problem:
    first, second = two_views(kind, n, d)
    return Problem(
        "clip_loss",
        {"image_features": first, "text_features": second, "logit_scale": torch.tensor(scale)},
    )
