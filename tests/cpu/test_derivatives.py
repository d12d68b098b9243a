"""Derivatives of the primitives: first and second order by finite differences, and what the first needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from primitive_checks import (
    BACKENDS,
    contrastive_examples,
    grad_inputs,
    inputs_of,
    over_inputs,
    rand,
    soft_target_example,
    soft_target_of,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import cl_kernels as clk
from cl_kernels import autograd, dispatch, reference
from cl_kernels.problem import Contrast

pytestmark = pytest.mark.usefixtures("small_chunks")


def check_derivatives(function: Callable, inputs: Sequence[Tensor | None]) -> None:
    leaves = grad_inputs(*inputs)
    for backend in BACKENDS:
        with clk.use_backend(backend):
            assert gradcheck(function, leaves)
            assert gradgradcheck(function, leaves)


def finite_outputs(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(out[out.isfinite()] for out in outputs if out.requires_grad and out.numel() > 0)


@pytest.mark.parametrize("problem", contrastive_examples())
def test_contrastive_derivatives(problem: Contrast) -> None:
    q, k, scale, bias = inputs_of(problem)
    ours = over_inputs(autograd.contrastive, problem)
    if bias is not None:
        bias = bias.masked_fill(bias == -torch.inf, -1.0)  # finite differences of -inf are NaN
    check_derivatives(lambda *inputs: finite_outputs(ours(*inputs)), (q, k, scale, bias))


@pytest.mark.parametrize("how", ["exclude", "zero", "none"])
@pytest.mark.parametrize("frozen", [False, True])
def test_soft_target_derivatives(how: str, frozen: bool) -> None:
    problem = soft_target_example("exclude" if how == "none" else how, own=how != "none")
    ours, inputs = soft_target_of(autograd.soft_target, problem, frozen)
    check_derivatives(lambda *leaves: finite_outputs(ours(*leaves)), inputs)


@pytest.mark.parametrize("masked", [False, True])
def test_dimcl_derivatives(masked: bool) -> None:
    mask = rand(9, 6, 6) > 0 if masked else None
    scale = torch.tensor(2.0, dtype=torch.float64)
    check_derivatives(
        lambda *inputs: finite_outputs(autograd.dimcl(*inputs, mask)), (rand(0, 5, 3), rand(1, 5, 3), scale)
    )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_similarity_derivatives(normalize: bool, own: bool) -> None:
    inputs = (rand(0, 4, 3), None if own else rand(1, 5, 3), torch.tensor(2.0, dtype=torch.float64))
    check_derivatives(lambda *leaves: autograd.similarity(*leaves, normalize), inputs)


def test_masked_log_softmax_derivatives() -> None:
    mask = rand(1, 5, 6) > 0
    mask[2] = False
    check_derivatives(lambda x: autograd.masked_log_softmax(x, mask)[mask], (rand(0, 5, 6),))
    check_derivatives(lambda x: autograd.masked_log_softmax(x, None), (rand(0, 5, 6),))


def test_second_derivative_keeps_related_inputs_apart() -> None:
    """Keys computed from the queries: the recomputation must not differentiate through that."""

    def penalty(lse: Callable[[Tensor, Tensor], Tensor], q: Tensor) -> Tensor:
        k = q.flip(0) * 2
        (grad,) = torch.autograd.grad(lse(q, k).sum(), k, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), q)[0]

    (q,) = grad_inputs(rand(0, 5, 3))
    torch.testing.assert_close(
        penalty(lambda q, k: autograd.contrastive(Contrast(q, k, 1.5, 0)).lse, q),
        penalty(lambda q, k: reference.contrastive_stats(Contrast(q, k, 1.5, 0))[0], q),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scale_gets_its_gradient_in_its_own_dtype(dtype: torch.dtype) -> None:
    q = rand(0, 6, 3, dtype=torch.float32)
    scale = torch.tensor(1.5, dtype=dtype, requires_grad=True)
    autograd.contrastive(Contrast(q, None, scale, 0)).lse.sum().backward()
    step = 1e-2
    low, high = (
        autograd.contrastive(Contrast(q.double(), None, 1.5 + s, 0)).lse.sum() for s in (-step, step)
    )
    assert scale.grad.dtype == dtype
    assert scale.grad.item() == pytest.approx(((high - low) / (2 * step)).item(), rel=1e-2)


def test_frozen_keys_save_the_gradient_only_where_a_backward_can_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved = []
    call = dispatch.call
    monkeypatch.setattr(
        dispatch,
        "call",
        lambda name, backend, *args: (saved.append((name, args[-1])), call(name, backend, *args))[1],
    )
    problem = soft_target_example()
    q, k, t = problem.q.requires_grad_(), problem.k, problem.target_q

    def run(q: Tensor, k: list[Tensor], t: Tensor) -> bool:
        autograd.soft_target(problem._replace(q=q, k=k, target_q=t))
        return saved[-1][1]

    assert run(q, k, t)
    assert not run(q, k, t.clone().requires_grad_())
    assert not run(q, [k[0].clone().requires_grad_(), k[1]], t)
    assert not run(q.detach(), k, t)
    with torch.no_grad():
        assert not run(q, k, t)
