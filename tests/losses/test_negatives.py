"""InfoNCE over the batch's keys, gathered keys and a queue together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparisons import Problem, assert_close, assert_parity, two_views, unit
from torch import Tensor

import cl_kernels as clk

pytestmark = pytest.mark.usefixtures("backend", "poisoned", "one_thread")

N, D, K = 9, 7, 13
KEYS = ("k", "k_global", "queue")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gathered(k: Tensor) -> Tensor:
    """The keys of three processes, those of rank 1 being k, and a few more."""
    return torch.cat([unit(*k.shape), k, unit(*k.shape), unit(2, k.shape[1])])


def problems(kind: str) -> list[Problem]:
    q, k = two_views(kind, N, D)
    pair, queue, everyone = {"q": q, "k": k}, {"queue": unit(K, D)}, {"k_global": gathered(k)}
    transposed = {"queue": unit(D, K).T}
    return [
        *(Problem("info_nce_loss", pair | x, {"in_batch": True}) for x in ({}, queue, transposed)),
        *(Problem("info_nce_loss", pair | x, {"in_batch": True}, KEYS) for x in (queue, transposed)),
        *(Problem("info_nce_loss", pair | everyone | x, {"rank": 1}, KEYS) for x in ({}, queue, transposed)),
        *(Problem("info_nce_loss", pair | everyone | x, {"rank": 1}, ("k",)) for x in ({}, queue)),
    ]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["random", "converged", "zero rows", "identical"])
def test_values_and_gradients(kind: str, reduction: str) -> None:
    for problem in problems(kind):
        assert_close(problem.with_options(reduction=reduction))
        assert_parity(problem.with_options(reduction=reduction))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", [0.07, 0.01])
def test_converged_inputs(tau: float, dtype: torch.dtype) -> None:
    for problem in problems("converged"):
        assert_parity(problem.with_options(temperature=tau).to(dtype))


def learnt(function: Any, *inputs: Tensor, **options: Any) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = function(*leaves, **options)
    return [loss, *torch.autograd.grad(loss, leaves)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_the_batch_and_a_queue_are_keys_together() -> None:
    """As for gathered keys that hold both."""
    q, k, queue = (unit(n, D).double() for n in (N, N, K))

    def together(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
        return clk.info_nce_loss(q, k, k_global=torch.cat([k, queue]))

    expected = learnt(together, q, k, queue)
    assert_equal(learnt(clk.info_nce_loss, q, k, queue, in_batch=True), expected)

    def own_keys(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
        return clk.info_nce_loss(q, k, queue, k_global=k)

    assert_equal(learnt(own_keys, q, k, queue), expected)
    sce = clk.sce_loss(q, k, k, queue, temperature=0.07, coeff=1.0)
    torch.testing.assert_close(sce, expected[0])


def test_more_negatives_than_those_of_a_queue() -> None:
    q, k, queue = unit(N, D), unit(N, D), unit(K, D)
    alone = clk.info_nce_loss(q, k, queue, reduction="none")
    assert (clk.info_nce_loss(q, k, queue, in_batch=True, reduction="none") > alone).all()
    assert torch.equal(clk.info_nce_loss(q, k, in_batch=True), clk.info_nce_loss(q, k))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_rank_of_gathered_keys(rank: int) -> None:
    """As a part of the union's rows; k itself is not read."""
    q, k = unit(3 * N, D), unit(3 * N, D)
    own = slice(N * rank, N * (rank + 1))
    found = clk.info_nce_loss(q[own], torch.full((N, D), torch.nan), k_global=k, rank=rank, reduction="none")
    torch.testing.assert_close(found, clk.info_nce_loss(q, k, reduction="none")[own])


def test_key_queues() -> None:
    """The rows that are filled count, and an empty queue is none."""
    q, k = unit(N, D), unit(N, D)
    queue = clk.KeyQueue(2 * K, D)
    for options in ({"in_batch": True}, {"k_global": k}):
        assert torch.equal(clk.info_nce_loss(q, k, queue, **options), clk.info_nce_loss(q, k))
    queue.enqueue(unit(K, D))
    for options in ({"in_batch": True}, {"k_global": k}):
        expected = clk.info_nce_loss(q, k, queue.filled.clone(), **options)
        assert torch.equal(clk.info_nce_loss(q, k, queue, **options), expected)


@pytest.mark.parametrize("options", [{"in_batch": True}, {"k_global": "k"}], ids=str)
def test_frozen_keys_may_change_before_the_backward(options: dict[str, Any]) -> None:
    def gradient(change: bool) -> Tensor:
        torch.manual_seed(0)
        q, k, queue = unit(N, D).requires_grad_(), unit(N, D), unit(K, D)
        given = {name: k if value == "k" else value for name, value in options.items()}
        loss = clk.info_nce_loss(q, k, queue, **given)
        if change:
            k.zero_()
            queue.zero_()
        return torch.autograd.grad(loss, q)[0]

    assert torch.equal(gradient(True), gradient(False))


def test_nan_among_the_keys() -> None:
    q, k, queue = unit(N, D), unit(N, D), unit(K, D)
    for module in (clk, clk.reference):
        for name in ("k", "queue", "k_global"):
            given = {"k": k, "queue": queue, "k_global": k}
            given[name] = given[name].index_fill(0, torch.tensor([2]), torch.nan)
            options = {"in_batch": True, "reduction": "none"}
            if name != "k_global":
                given.pop("k_global")
            assert module.info_nce_loss(q, **given, **options).isnan().all()


def test_with_a_group_the_keys_are_gathered_there() -> None:
    q, k = unit(N, D), unit(N, D)
    for options in ({"k_global": k}, {"rank": 1}):
        with pytest.raises(ValueError, match="k_global and rank must not be given with a group"):
            clk.info_nce_loss(q, k, group=torch.distributed.GroupMember.NON_GROUP_MEMBER, **options)
