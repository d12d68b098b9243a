"""A KeyQueue over a group is one process's queue of all rows, and the losses that take it are that one's."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from groups import in_group
from torch import Tensor

import cl_kernels as clk

WORLD, SIZE, WIDTH = 3, 11, 5
ROUNDS = ((2, 0, 1), (3, 1, 2), (0, 0, 0), (1, 4, 0), (0, 5, 3), (9, 8, 0), (1, 1, 1))  # rows of each rank
LOSSES_AT = (0, 2, 5)  # before these rounds: empty, filling, in mid-wrap
SIZES = (3, 5, 1)


def _batches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(sum(sizes), WIDTH, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(0, 4, (sum(sizes),), generator=generator),
        )
        for sizes in ROUNDS
    ]


def _queues(labels: bool, dtype: torch.dtype) -> tuple[clk.KeyQueue, clk.KeyQueue]:
    """A queue of all processes, and that of one."""
    over_group, alone = (
        clk.KeyQueue(SIZE, WIDTH, labels=labels, group=group, dtype=dtype)
        for group in (dist.group.WORLD, None)
    )
    return over_group, alone


def _same(queue: clk.KeyQueue, other: clk.KeyQueue) -> bool:
    pairs = zip(queue.buffers(), other.buffers(), strict=True)
    return len(queue) == len(other) and all(torch.equal(x, y) for x, y in pairs)


def enqueued(rank: int) -> dict[str, bool]:
    """Uneven batches, of no rows as well, in the order of the ranks."""
    found = {}
    for labels, dtype in itertools.product((False, True), (torch.float64, torch.float32, torch.bfloat16)):
        queue, alone = _queues(labels, dtype)
        for i, (batch, sizes) in enumerate(zip(_batches(torch.float32), ROUNDS, strict=True)):
            batch = batch[: 1 + labels]
            queue.enqueue(*(x.split(sizes)[rank].requires_grad_(x.is_floating_point()) for x in batch))
            alone.enqueue(*batch)
            found[f"round {i}, labels {labels}, {dtype}"] = _same(queue, alone)
            if i == 3:
                queue = copy.deepcopy(queue)
                found["copies share the group"] = queue.group is dist.group.WORLD
            if i == 4:
                queue = pickle.loads(pickle.dumps(queue))
        found["shown"] = repr(queue).endswith(", group of 3)")
    return found


def _info_nce(q: Tensor, k: Tensor, labels: Tensor, queue: clk.KeyQueue, **options: Any) -> Tensor:
    return clk.info_nce_loss(q, k, queue, temperature=0.2, **options)


def _sce(q: Tensor, k: Tensor, labels: Tensor, queue: clk.KeyQueue, **options: Any) -> Tensor:
    if not options:  # the keys of all ranks are beside the queue
        options = {"k_global": k}
    return clk.sce_loss(q, k, queue=queue, **options)


def _supcon(q: Tensor, k: Tensor, labels: Tensor, queue: clk.KeyQueue, **options: Any) -> Tensor:
    return clk.supcon_loss(torch.stack([q, k], 1), labels, memory=queue, temperature=0.2, **options)


def _supcon_in(q: Tensor, k: Tensor, labels: Tensor, queue: clk.KeyQueue, **options: Any) -> Tensor:
    memory = queue.filled.clone().requires_grad_(), queue.filled_labels
    features = torch.stack([q, k], 1)
    return clk.supcon_loss(features, labels, memory=memory, temperature=0.2, summation="in", **options)


def _supcon_one_positive(q: Tensor, k: Tensor, labels: Tensor, queue: clk.KeyQueue, **options: Any) -> Tensor:
    features = torch.stack([q, k], 1)
    return clk.supcon_loss(
        features, labels, memory=queue, temperature=0.2, denominator="one_positive", **options
    )


LOSSES = (_info_nce, _sce, _supcon, _supcon_in, _supcon_one_positive)


def losses(rank: int) -> dict[tuple[Any, ...], float]:
    """The largest error of value and gradient, with an empty queue, one that fills and a full one."""
    found: dict[tuple[Any, ...], float] = {}
    queue, alone = _queues(True, torch.float64)
    generator = torch.Generator().manual_seed(1)
    for i, (batch, sizes) in enumerate(zip(_batches(torch.float64), ROUNDS, strict=True)):
        shape = 2, sum(SIZES), WIDTH
        views = F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)
        labels = torch.randint(0, 4, (sum(SIZES),), generator=generator)
        for loss, exchange in itertools.product(LOSSES, ("gather", "ring")):
            if i in LOSSES_AT and not (loss is _supcon_in and i == 0):
                error = _error(rank, loss, (views, labels), (queue, alone), exchange)
                found[loss.__name__, exchange, i] = error
        queue.enqueue(*(x.split(sizes)[rank] for x in batch))
        alone.enqueue(*batch)
    return found


def _error(
    rank: int,
    loss: Callable[..., Tensor],
    batch: tuple[Tensor, Tensor],
    queues: tuple[clk.KeyQueue, clk.KeyQueue],
    exchange: str,
) -> float:
    views, labels = batch
    everyone = [x.clone().requires_grad_() for x in views]
    wanted = loss(*everyone, labels, queues[1])
    own = [x.split(SIZES)[rank].clone().requires_grad_() for x in views]
    found = loss(*own, labels.split(SIZES)[rank], queues[0], group=dist.group.WORLD, exchange=exchange)
    grads, wanted_grads = torch.autograd.grad(found, own), torch.autograd.grad(wanted, everyone)
    mean = found.detach() / WORLD
    dist.all_reduce(mean)
    errors = [(mean - wanted.detach()).abs() / wanted.detach().abs().clamp(min=0.1)]
    for x, y in zip(grads, wanted_grads, strict=True):
        errors.append((x / WORLD - y.split(SIZES)[rank]).abs().max() / y.abs().max().clamp(min=0.1))
    return max(x.item() for x in errors)


def faults(rank: int) -> dict[str, tuple[str, bool]]:
    """The errors where rank 1 has something wrong, and whether the queue is unchanged."""
    found = {}
    keys, labels = torch.ones(2, WIDTH), torch.arange(2)
    for name, wrong in (
        ("no tensor", ([1.0], labels)),
        ("width", (keys[:, :3], labels)),
        ("labels", (keys, labels.float())),
        ("without labels", (keys,)),
    ):
        queue, before = _queues(True, torch.float32)
        for x in (queue, before):
            x.keys.fill_(7)
        try:
            queue.enqueue(*(wrong if rank == 1 else (keys, labels)))
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}", _same(queue, before)
    queue, before = _queues(True, torch.float32)
    for x in (queue, before):
        x._count(3 + rank)
    try:
        queue.enqueue(keys, labels)
    except ValueError as error:
        found["other queues"] = f"ValueError: {error}", _same(queue, before)
    return found


def everything(rank: int) -> tuple[dict[Any, Any], ...]:
    return enqueued(rank), losses(rank), faults(rank)


def test_a_queue_of_all_processes(tmp_path: Path) -> None:
    raised = {
        "no tensor": "TypeError: keys must be a torch.Tensor",
        "width": "ValueError: keys must have as many features",
        "labels": "TypeError: labels must be integers or booleans",
        "without labels": "ValueError: labels must be given",
    }
    for rank, report in enumerate(in_group(WORLD, everything, tmp_path)):
        assert isinstance(report, tuple), f"rank {rank}: {report}"
        same, errors, refused = report
        assert [name for name, right in same.items() if not right] == []
        assert len(errors) == 2 * (len(LOSSES_AT) * len(LOSSES) - 1)
        assert {key: error for key, error in errors.items() if not error < 1e-12} == {}
        assert list(refused) == [*raised, "other queues"]
        assert all(unchanged for _, unchanged in refused.values())
        for name, message in raised.items():
            expected = (
                message if rank == 1 else "ValueError: enqueue got wrong arguments on rank 1 of the group"
            )
            assert refused[name][0].startswith(expected)
        assert refused["other queues"][0].startswith("ValueError: the queues of the ranks must have the same")
