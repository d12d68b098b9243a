"""First and second derivatives in float64 against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparisons import unit
from torch import Tensor

import cl_kernels as clk
from cl_kernels.losses._common import log_add

pytestmark = pytest.mark.usefixtures("backend", "one_thread")

LABELS = torch.tensor([0, 1, 0, 2])
VALID = torch.tensor([True, True, False, True])
MASK = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0.3], [0, 0, 0, 2.0]])


def f64(*shape: int) -> Tensor:
    return unit(*shape, dtype=torch.float64)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def supcon(**options: Any) -> Callable[..., Tensor]:
    return lambda x, tau: clk.supcon_loss(x, temperature=tau, base_temperature=0.5, **options)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[[], list[Tensor]]]] = {
    **{
        f"supcon {name}": (supcon(**options), lambda: [f64(4, 2, 3), scalar(0.4)])
        for name, options in {
            "two views": {},
            "labels": {"labels": LABELS},
            "one": {"labels": LABELS, "contrast_mode": "one", "reduction": "none"},
            "drop": {"labels": LABELS, "no_positive": "drop"},
            "mask": {"mask": MASK, "reduction": "sum"},
            "in": {"labels": LABELS, "summation": "in"},
            "only negatives": {"labels": LABELS, "denominator": "only_negatives"},
            "in, only negatives": {"labels": LABELS, "summation": "in", "denominator": "only_negatives"},
            "one positive": {"labels": LABELS, "denominator": "one_positive"},
            "capped": {"mask": MASK, "summation": "in", "positives_cap": 2},
        }.items()
    },
    "supcon singletons": (lambda x: clk.supcon_loss(x, LABELS, temperature=0.4), lambda: [f64(4, 1, 3)]),
    "selfcon": (
        lambda x: clk.selfcon_loss(x, LABELS[:2], anchors="exits", augmentations=2, temperature=0.4),
        lambda: [f64(4, 2, 3)],
    ),
    "multilevel": (
        lambda x, y, w: clk.multilevel_loss([x, y], LABELS, weights=w, temperature=0.4),
        lambda: [f64(4, 2, 3), f64(4, 2, 2), torch.tensor([0.5, 1.5], dtype=torch.float64)],
    ),
    "stablerep": (
        lambda x, tau: clk.stablerep_loss(x, LABELS, temperature=tau),
        lambda: [f64(4, 3), scalar(0.4)],
    ),
    "nt_xent": (
        lambda x, y, tau: clk.nt_xent_loss(x, y, temperature=tau),
        lambda: [f64(3, 4), f64(3, 4), scalar(0.4)],
    ),
    "info_nce": (
        lambda q, k, tau: clk.info_nce_loss(q, k, temperature=tau, reduction="none"),
        lambda: [f64(4, 3), f64(4, 3), scalar(0.4)],
    ),
    "info_nce with a queue": (
        lambda q, k, queue, tau: clk.info_nce_loss(q, k, queue, temperature=tau),
        lambda: [f64(3, 3), f64(3, 3), f64(5, 3), scalar(0.4)],
    ),
    "info_nce with a queue, in batch": (
        lambda q, k, queue, tau: clk.info_nce_loss(q, k, queue, temperature=tau, in_batch=True),
        lambda: [f64(3, 3), f64(3, 3), f64(5, 3), scalar(0.4)],
    ),
    "info_nce with keys and a queue": (
        lambda q, keys, queue, tau: clk.info_nce_loss(
            q, q.detach(), queue, temperature=tau, k_global=keys, rank=1, reduction="none"
        ),
        lambda: [f64(2, 3), f64(5, 3), f64(3, 3), scalar(0.4)],
    ),
    "info_nce, valid": (
        lambda q, k, queue: clk.info_nce_loss(q, k, queue, temperature=0.4, in_batch=True, valid=VALID),
        lambda: [f64(4, 3), f64(4, 3), f64(2, 3)],
    ),
    "clip": (clk.clip_loss, lambda: [f64(4, 3), f64(4, 3), scalar(3.0)]),
    **{
        f"clip {name}": (
            lambda x, y, scale, options=options: clk.clip_loss(x, y, scale, **options),
            lambda: [f64(4, 3), f64(4, 3), scalar(3.0)],
        )
        for name, options in {
            "labels": {"labels": LABELS},
            "labels apart": {"labels": LABELS, "reduction": "none"},
            "valid": {"valid": VALID},
            "labels valid": {"labels": LABELS, "valid": VALID},
            "labels valid apart": {"labels": LABELS, "valid": VALID, "reduction": "none"},
        }.items()
    },
    "dcl": (
        lambda x, y, tau: clk.dcl_loss(x, y, temperature=tau),
        lambda: [f64(4, 3), f64(4, 3), scalar(0.4)],
    ),
    "dclw": (
        lambda x, y, tau, sigma: clk.dcl_loss(x, y, temperature=tau, sigma=sigma),
        lambda: [f64(4, 3), f64(4, 3), scalar(0.4), scalar(0.7)],
    ),
    "dclw valid": (
        lambda x, y, tau, sigma: clk.dcl_loss(x, y, temperature=tau, sigma=sigma, valid=VALID),
        lambda: [f64(4, 3), f64(4, 3), scalar(0.4), scalar(0.7)],
    ),
    "dimcl": (
        lambda x, y, tau: clk.dimcl_loss(x, y, temperature=tau),
        lambda: [f64(5, 2), f64(5, 2), scalar(0.4)],
    ),
    "sce": (
        lambda q, k, tau, tau_m, coeff: clk.sce_loss(
            q, k, temperature=tau, target_temperature=tau_m, coeff=coeff
        ),
        lambda: [f64(3, 3), f64(3, 3), scalar(0.4), scalar(0.3), scalar(0.6)],
    ),
    "sce with keys and a queue": (
        lambda q, k, keys, queue: clk.sce_loss(
            q, k, keys, queue, temperature=0.4, positive_in_target="zero", rank=1, reduction="none"
        ),
        lambda: [f64(2, 3), f64(2, 3), f64(4, 3), f64(3, 3)],
    ),
    **{
        f"sce with a queue, {how}": (
            lambda q, k, queue, tau_m, how=how: clk.sce_loss(
                q, k, queue=queue, temperature=0.4, target_temperature=tau_m, positive_in_target=how
            ),
            lambda: [f64(3, 3), f64(3, 3), f64(4, 3), scalar(0.3)],
        )
        for how in ("exclude", "zero")
    },
}


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case: str) -> None:
    function, make = CASES[case]
    inputs = [x.requires_grad_() for x in make()]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("case", CASES)
def test_create_graph_gives_the_same_first_derivative(case: str) -> None:
    function, make = CASES[case]
    inputs = [x.requires_grad_() for x in make()]
    fused = torch.autograd.grad(function(*inputs).sum(), inputs)
    differentiable = torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True)
    for x, y in zip(fused, differentiable, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


def second(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    first = torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True, allow_unused=True)
    total = sum(g.square().sum() for g in first if g is not None)
    return [g for g in torch.autograd.grad(total, inputs, allow_unused=True) if g is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if "dclw" not in case])
def test_far_apart_logits_have_a_second_derivative(case: str, dtype: torch.dtype) -> None:
    """Where the logits of a row lie thousands apart."""
    function, make = CASES[case]
    inputs = [(50 * x if x.dim() > 1 else x).to(dtype) for x in make()]
    assert all(g.isfinite().all() for g in second(function, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_rows_have_a_second_derivative(dtype: torch.dtype) -> None:
    """Rows, or centred columns, that have no direction."""
    x, y = unit(5, 3, dtype=dtype), unit(5, 3, dtype=dtype)
    x[1], y[1], y[2] = 0, 0, 0
    flat, other = x.clone(), y.clone()
    flat[:, 0], other[:, 1] = 2.5, 0

    def lightly(z0: Tensor, z1: Tensor) -> Tensor:
        return clk.DCLLoss(normalize=True, symmetric=True)(z0, z1)

    for function, inputs in (
        (clk.nt_xent_loss, [x, y]),
        (lightly, [x, y]),
        (lambda q, k: clk.similarity(q, k, normalize=True).sin(), [x, y]),
        (lambda q: clk.similarity(q, normalize=True).sin(), [x]),
        (clk.dimcl_loss, [flat, other]),
        (clk.info_nce_loss, [x, y]),
        (lambda q, k, queue: clk.sce_loss(q, k, None, queue), [x, y, 0 * x]),
        (clk.reference.nt_xent_loss, [x, y]),
        (clk.reference.dimcl_loss, [flat, other]),
    ):
        assert all(g.isfinite().all() for g in second(function, inputs))


def test_a_zero_row_gets_no_gradient_to_any_order() -> None:
    x, y = f64(4, 3), f64(4, 3)
    x[1] = 0
    found = second(clk.nt_xent_loss, [x, y])
    assert (found[0][1] == 0).all()
    for ours, truth in zip(found, second(clk.reference.nt_xent_loss, [x, y]), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-8, atol=1e-10)


def test_the_sum_of_far_apart_exponentials() -> None:
    x = torch.tensor([0.0, 3.0, -5.0, 800.0, -2000.0, 39.0, 41.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0.0, 1.0, 30.0, -800.0, 2000.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_add, (x, y))
    assert torch.autograd.gradgradcheck(log_add, (x, y))
    torch.testing.assert_close(log_add(x, y), torch.logaddexp(x, y), rtol=1e-15, atol=1e-15)


def test_third_derivatives() -> None:
    inputs = [f64(4, 3).requires_grad_(), f64(5, 3).requires_grad_(), scalar(1.5).requires_grad_()]

    def third(module: Any) -> tuple[Tensor, ...]:
        q, k, scale = inputs
        value = module.contrastive_lse(q, k, scale=scale, exclude=1).sin().sum()
        for x, function in ((q, torch.sin), (k, torch.cos)):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = function(gradient).sum()
        return torch.autograd.grad(value, inputs)

    for found, expected in zip(third(clk), third(clk.reference), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_saved_tensors_on_the_cpu() -> None:
    """Hooks on saved tensors, which torch.func refuses, are there while a second derivative is taken."""
    function, make = CASES["info_nce with a queue"]
    inputs = [x.requires_grad_() for x in make()]

    def second() -> tuple[Tensor, ...]:
        first = torch.autograd.grad(function(*inputs), inputs, create_graph=True)
        return torch.autograd.grad(sum(x.sin().sum() for x in first), inputs)

    expected = second()
    with torch.autograd.graph.save_on_cpu():
        found = second()
    assert all(map(torch.equal, found, expected))


def test_gradient_penalty() -> None:
    """A second derivative through a network, in float32."""
    torch.manual_seed(1)
    network = torch.nn.Linear(6, 4)
    x = torch.randn(8, 2, 6, requires_grad=True)
    loss = clk.supcon_loss(torch.nn.functional.normalize(network(x), dim=-1), torch.arange(8) % 3)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    gradient.square().sum().backward()
    assert network.weight.grad.isfinite().all()
    assert network.weight.grad.abs().max() > 0
