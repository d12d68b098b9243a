"""The primitives under torch.compile: one graph, and what eager mode gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from primitive_checks import (
    BACKENDS,
    assert_same,
    contrastive_examples,
    grad_inputs,
    inputs_of,
    over_inputs,
    rand,
    soft_target_example,
    soft_target_of,
    values_and_gradients,
)
from torch import Tensor

import cl_kernels as clk
from cl_kernels import autograd, reference
from cl_kernels.problem import Contrast, SoftTarget

pytestmark = pytest.mark.usefixtures("small_chunks")


def compiled_and_eager(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], backend: str = "aot_eager"
) -> None:
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    expected, expected_grads = values_and_gradients(lambda *leaves: [function(*leaves)], inputs)
    outputs, grads = values_and_gradients(lambda *leaves: [compiled(*leaves)], inputs)
    assert_same(outputs, expected)
    assert_same(grads, expected_grads)


@pytest.mark.parametrize(
    ("problem", "clk_backend"),
    [
        (*p.values, b)
        for b in BACKENDS
        for p in contrastive_examples()
        if b == "auto" or p.id in ("same", "mask")
    ],
)
def test_compile_contrastive(problem: Contrast, clk_backend: str) -> None:
    inputs = [x for x in inputs_of(problem) if x is not None]
    ours = over_inputs(autograd.contrastive, problem)

    def loss(*leaves: Tensor) -> Tensor:
        given = iter(leaves)
        stats = ours(*(None if x is None else next(given) for x in inputs_of(problem)))
        total = stats.lse.masked_fill(stats.lse == -torch.inf, 0).sin().sum() + 2 * stats.positive_sum.sum()
        return total + stats.lse_cols.masked_fill(stats.lse_cols == -torch.inf, 0).cos().sum()

    with clk.use_backend(clk_backend):
        compiled_and_eager(loss, inputs)


@pytest.mark.parametrize("clk_backend", BACKENDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_compile_soft_target(frozen: bool, clk_backend: str) -> None:
    ours, inputs = soft_target_of(autograd.soft_target, soft_target_example(), frozen)
    with clk.use_backend(clk_backend):
        compiled_and_eager(lambda *leaves: sum(out.sin().sum() for out in ours(*leaves)), inputs)


@pytest.mark.parametrize("clk_backend", BACKENDS)
def test_compile_the_other_primitives(clk_backend: str) -> None:
    q, k, scale = rand(0, 6, 3), rand(1, 5, 3), torch.tensor(2.0, dtype=torch.float64)
    mask = rand(2, 6, 5) > 0
    with clk.use_backend(clk_backend):
        compiled_and_eager(
            lambda q, s: sum(x.sin().sum() for x in autograd.dimcl(q, q.flip(0) + q.sin(), s)), (q, scale)
        )
        compiled_and_eager(lambda q, k, s: autograd.similarity(q, k, s, True).sin().sum(), (q, k, scale))
        compiled_and_eager(
            lambda q, k: autograd.masked_log_softmax(q @ k.T, mask).masked_fill(~mask, 0).sin().sum(), (q, k)
        )


def test_compile_takes_one_tensor_in_several_places() -> None:
    scale = torch.tensor(2.0, dtype=torch.float64)
    compiled_and_eager(
        lambda q, s: sum(x.sum() for x in autograd.soft_target(SoftTarget(q, [q, q], q, [q, q], s, s))),
        (rand(0, 4, 3), scale),
    )
    compiled_and_eager(lambda q: autograd.contrastive(Contrast(q, q, 2.0, 0)).lse.sum(), (rand(0, 4, 3),))
    compiled_and_eager(lambda q: autograd.similarity(q, q, 2.0, True).sin().sum(), (rand(0, 4, 3),))
    compiled_and_eager(lambda q: autograd.dimcl(q, q, 2.0)[0].sin().sum(), (rand(0, 4, 3),))


def test_compile_for_any_batch_size() -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, labels: autograd.contrastive(Contrast(q, None, 2.0, 0, labels, labels, "same")).lse,
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for n in (4, 5, 9):
        q, labels = rand(n, n, 3).requires_grad_(), torch.arange(n) % 2
        with torch.compiler.set_stance("default" if n == 4 else "fail_on_recompile"):
            lse = compiled(q, labels)
        (grad,) = torch.autograd.grad(lse.sum(), q)
        expected = reference.contrastive_stats(Contrast(q, None, 2.0, 0, labels, labels, "same"))[0]
        torch.testing.assert_close(lse, expected)
        torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), q)[0])


def test_compile_with_inductor() -> None:
    labels = torch.tensor([0, 1, 0, 1, 2, 2])

    def loss(q: Tensor) -> Tensor:
        stats = autograd.contrastive(Contrast(q * 2, None, 1.5, 0, labels, labels, "all", True))
        return (stats.lse - stats.positive_sum / stats.positive_count).mean()

    compiled_and_eager(loss, (rand(0, 6, 3),), backend="inductor")


def test_compile_under_autocast() -> None:
    def loss(q: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return clk.contrastive_lse(q, scale=1.5).sum()

    compiled_and_eager(loss, (rand(0, 6, 3, dtype=torch.float32),))


def test_compile_traces_again_for_another_backend_but_not_for_another_float() -> None:
    torch.compiler.reset()
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    q = rand(0, 6, 3)
    compiled = torch.compile(
        lambda q, s: autograd.contrastive(Contrast(q, None, s, 0)).lse, fullgraph=True, backend=counting
    )
    for scale in (0.5, 1.25, 2.5, 3.75, 4.5):
        torch.testing.assert_close(compiled(q, scale), autograd.contrastive(Contrast(q, None, scale, 0)).lse)
    assert len(graphs) <= 2
    assert any("contrastive_forward" in target for target in graphs[-1])
    with clk.use_backend("reference"):
        compiled(q, 2.5)
    assert not any("contrastive_forward" in target for target in graphs[-1])
    compiled(q, 2.5)
    assert len(graphs) <= 3


def test_double_backward_of_compiled_code_is_refused() -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q: autograd.contrastive(Contrast(q, None, 1.0, 0)).lse, fullgraph=True, backend="aot_eager"
    )
    (q,) = grad_inputs(rand(0, 5, 3))
    (grad,) = torch.autograd.grad(compiled(q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not currently support double backward"):
        torch.autograd.grad(grad.sum(), q)


@pytest.mark.parametrize("clk_backend", ["auto", *BACKENDS])
def test_a_backend_is_chosen_within_a_graph(clk_backend: str) -> None:
    def loss(q: Tensor, k: Tensor) -> Tensor:
        with clk.use_backend(clk_backend):
            return clk.info_nce_loss(q, k)

    compiled_and_eager(loss, (rand(0, 5, 3), rand(1, 5, 3)))
