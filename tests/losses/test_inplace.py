"""Changes in place between forward and backward: a queue of frozen keys freely, the rest never silently."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparisons import unit
from torch import Tensor

import cl_kernels as clk

pytestmark = pytest.mark.usefixtures("backend", "one_thread")

N, D, QUEUE = 6, 5, 300


def moco(q: Tensor, k: Tensor, queue: Tensor, tau: float | Tensor) -> Tensor:
    return clk.info_nce_loss(q, k, queue.T, temperature=tau)


def sce(**options: Any) -> Callable[..., Tensor]:
    return lambda q, k, queue, tau: clk.sce_loss(
        q, k, k, queue.T, temperature=tau, target_temperature=0.3, **options
    )


def sce_beside_queue(q: Tensor, k: Tensor, queue: Tensor, tau: float | Tensor) -> Tensor:
    return clk.sce_loss(q, k, queue=queue.T, temperature=tau, positive_in_target="zero")


def sce_with_targets(q: Tensor, k: Tensor, queue: Tensor, tau: float | Tensor) -> Tensor:
    targets = clk.sce_targets(k, k, queue.T)
    return clk.sce_loss(q, k, k, queue.T, temperature=tau, targets=targets)


def by_index(q: Tensor, k: Tensor, queue: Tensor, tau: float | Tensor) -> Tensor:
    """Positives anywhere, or none."""
    positive = torch.tensor([N + 3, 0, -1, 5, N + QUEUE - 1, N])
    keys, scale = [k, queue.T], 1.0 / tau
    return clk.soft_target_cross_entropy(
        q, keys, k, keys, scale=scale, target_scale=3.0, positive=positive, coeff=0.3
    )


def lse_with_options(q: Tensor, k: Tensor, queue: Tensor, tau: float | Tensor) -> Tensor:
    rows, cols = torch.arange(N) % 3, torch.arange(QUEUE) % 3
    return clk.contrastive_lse(
        q, queue.T, scale=1.0 / tau, exclude=1, row_labels=rows, col_labels=cols, among="different",
        key_bias=queue[0],
    ).sum()  # fmt: skip


STEPS = {
    "MoCo": moco,
    "SCE": sce(),
    "SCE, zero": sce(positive_in_target="zero", reduction="sum"),
    "SCE beside a queue": sce_beside_queue,
    "SCE with targets": sce_with_targets,
    "soft targets by index": by_index,
    "log-sum-exp": lse_with_options,
}


def step(loss: Callable[..., Tensor], enqueue: bool, learned: bool, dtype: torch.dtype) -> list[Tensor]:
    """Loss and gradients of a step, whose queue [D, K] takes the new keys before the backward."""
    torch.manual_seed(0)
    q, k, queue = (
        unit(N, D, dtype=dtype).requires_grad_(),
        unit(N, D, dtype=dtype),
        unit(D, QUEUE, dtype=dtype),
    )
    tau = torch.tensor(0.2, dtype=dtype, requires_grad=True) if learned else 0.2
    value = loss(q, k, queue, tau)
    if enqueue:
        queue[:, :N] = k.T
        queue.mul_(-3)
    return [value, *torch.autograd.grad(value, [q, tau] if learned else [q])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("name", STEPS)
def test_an_enqueue_before_the_backward_changes_nothing(name: str, learned: bool, dtype: torch.dtype) -> None:
    expected, found = (step(STEPS[name], enqueue, learned, dtype) for enqueue in (False, True))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", STEPS)
def test_nothing_as_large_as_the_queue_is_saved(name: str) -> None:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        step(STEPS[name], enqueue=True, learned=True, dtype=torch.float64)
    assert saved
    assert max(x.untyped_storage().nbytes() for x in saved) <= N * max(N, D) * 8


@pytest.mark.parametrize("name", ["MoCo", "SCE", "SCE with targets", "soft targets by index"])
def test_an_enqueue_under_compile(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(STEPS[name], fullgraph=True, backend="aot_eager")
    expected = step(STEPS[name], False, True, torch.float32)
    for x, y in zip(step(compiled, True, True, torch.float32), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def changed_in_the_graph(q: Tensor, k: Tensor, queue: Tensor, labels: Tensor) -> Tensor:
    """Losses whose frozen keys, and the memory of one, are overwritten in the graph of the forward."""
    memory = (queue.T, torch.arange(QUEUE) % 3)
    loss = clk.sce_loss(q, k, queue=queue.T, temperature=0.2) + clk.info_nce_loss(q, k, temperature=0.2)
    loss = loss + clk.supcon_loss(q[:, None], labels, memory=memory, temperature=0.2)
    k.mul_(-2)
    queue.mul_(-3)
    return loss


@pytest.mark.slow
def test_an_enqueue_under_inductor() -> None:
    torch._dynamo.reset()
    labels, results = torch.arange(N) % 3, []
    compiled = torch.compile(changed_in_the_graph, fullgraph=True, backend="inductor")
    for function in (changed_in_the_graph, compiled):
        torch.manual_seed(0)
        q, k, queue = unit(N, D).requires_grad_(), unit(N, D), unit(D, QUEUE)
        loss = function(q, k, queue, labels)
        results.append([loss, *torch.autograd.grad(loss, q), k, queue])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def penalty(name: str, changed: str) -> Tensor:
    """A second derivative, with something changed in place before the first or before the second."""
    torch.manual_seed(0)
    q, k, queue = unit(N, D, dtype=torch.float64), unit(N, D, dtype=torch.float64), unit(D, QUEUE).double()
    q.requires_grad_()
    value = STEPS[name](q, k, queue, 0.2)
    if changed == "before the first":
        queue[:, :N] = k.T
    (gradient,) = torch.autograd.grad(value, q, create_graph=True)
    if changed == "before the second":
        queue[:, :N] = k.T
    return torch.autograd.grad(gradient.square().sum(), q)[0]


@pytest.mark.parametrize("changed", ["before the first", "before the second"])
@pytest.mark.parametrize("name", ["MoCo", "SCE", "soft targets by index", "log-sum-exp"])
def test_a_second_derivative_after_a_change_is_refused(name: str, changed: str) -> None:
    assert penalty(name, "").isfinite().all()
    with pytest.raises(RuntimeError, match=r"second derivative.*modified in place"):
        penalty(name, changed)


def test_what_the_backward_needs_must_not_change() -> None:
    """Keys that get a gradient are read again."""
    q, k = unit(N, D).requires_grad_(), unit(N, D).requires_grad_()
    keys = k * 1
    loss = clk.info_nce_loss(q, keys)
    with torch.no_grad():
        keys.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("targets", [False, True], ids=["info_nce", "sce with targets"])
def test_the_key_of_a_row_beside_a_queue(targets: bool) -> None:
    """A buffer of keys that the next step writes into."""

    def gradient(change: bool) -> Tensor:
        torch.manual_seed(0)
        q, k, queue = unit(N, D).requires_grad_(), unit(N, D), unit(QUEUE, D)
        if targets:
            loss = clk.sce_loss(q, k, queue=queue, targets=clk.sce_targets(k, queue=queue))
        else:
            loss = clk.info_nce_loss(q, k, queue) + clk.sce_loss(q, k, queue=queue)
        if change:
            k.zero_()
        return torch.autograd.grad(loss, q)[0]

    assert torch.equal(gradient(True), gradient(False))


def test_the_keys_of_a_step_do_not_live_on_with_its_loss() -> None:
    q, k = unit(N, D).requires_grad_(), unit(N, D)
    loss, alive = clk.info_nce_loss(q, k), weakref.ref(k)
    del k
    assert alive() is not None  # a second derivative reads it
    loss.backward(retain_graph=True)
    assert alive() is None
    (first,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="went with an earlier backward"):
        first.sum().backward()


def test_inference_mode_counts_no_changes() -> None:
    """So a second derivative by its tensors is refused, not wrong."""
    with torch.inference_mode():
        k = unit(N, D)
    q = unit(N, D).requires_grad_()
    (first,) = torch.autograd.grad(clk.info_nce_loss(q, k), q, create_graph=True)
    with torch.inference_mode():
        k.zero_()
    with pytest.raises(RuntimeError, match="inference mode"):
        first.sum().backward()


def test_labels_made_under_inference_mode() -> None:
    with torch.inference_mode():
        labels = torch.arange(N) % 2
    x = unit(N, D).requires_grad_()
    clk.supcon_loss(x[:, None], labels).backward()
    assert x.grad is not None


def test_keys_made_under_inference_mode() -> None:
    """Such tensors cannot be saved for a backward."""
    with torch.inference_mode():
        k, queue = unit(N, D), unit(D, QUEUE)
    q = unit(N, D).requires_grad_()
    lse = clk.contrastive_lse(q, queue.T)
    found = torch.autograd.grad(lse.sum() + clk.contrastive_lse(q, k, exclude=None).sum(), q)[0]
    k, queue = k.clone(), queue.clone()
    lse = clk.contrastive_lse(q, queue.T)
    expected = torch.autograd.grad(lse.sum() + clk.contrastive_lse(q, k, exclude=None).sum(), q)[0]
    assert torch.equal(found, expected)
