"""A step of a loss over a group, the bytes that a process gives to torch.distributed in it, and those that
its tensors hold: what tests and bench/gloo.py hold the estimates to."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import cl_kernels as clk
from cl_kernels.tools import cost
from cl_kernels.tools.cost import Setup

Sent = Counter[tuple[str, str, str]]
"""Bytes and messages by phase and call."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def step(setup: Setup, group: Any) -> Callable[[], Tensor]:
    """The mean loss of a setup on random features of this rank."""
    generator = torch.Generator().manual_seed(setup.rank)
    n, d = setup.own, setup.widths[0]
    dtype = DTYPES[setup.dtype]

    def features(*shape: int, needs: bool = True) -> Tensor:
        x = torch.randn(*shape, generator=generator)
        return torch.nn.functional.normalize(x, dim=-1).to(dtype).requires_grad_(needs)

    labels = torch.randint(0, 3, (n,), generator=generator) if setup.labels else None
    arguments: list[Any]
    options: dict[str, Any] = {"group": group, "exchange": setup.exchange}
    if setup.loss in ("supcon", "selfcon"):
        arguments = [features(n, setup.views, d), labels]
    elif setup.loss == "multilevel":
        arguments = [[features(n, setup.views, width) for width in setup.widths], labels]
    elif setup.loss == "stablerep":
        arguments = [features(n, d), labels]
    else:
        arguments = [features(n, d), features(n, d, needs=not setup.frozen)]
    if setup.loss == "clip":
        arguments.append(3.0)
    if setup.queue:
        options["queue"] = features(setup.queue, d, needs=False)
    return lambda: getattr(clk, f"{setup.loss}_loss")(*arguments, **options)


@contextmanager
def counted(group: Any, phase: list[str]) -> Iterator[Sent]:
    """Bytes that this process gives to torch.distributed for others, and messages, by phase and call; of a
    collective W - 1 blocks."""
    found: Sent = Counter()
    others = dist.get_world_size(group) - 1

    def add(by: str, size: int, messages: int) -> None:
        found[phase[0], by, "bytes"] += size
        found[phase[0], by, "messages"] += messages

    def all_gather(original: Any, out: Tensor, x: Tensor, **options: Any) -> Any:
        add("all-gather", x.nbytes * others, others)
        return original(out, x, **options)

    def reduce_scatter(original: Any, out: Tensor, x: Tensor, **options: Any) -> Any:
        add("reduce-scatter", x.nbytes - out.nbytes, others)
        return original(out, x, **options)

    def all_to_all(original: Any, out: Tensor, x: Tensor, received: Any, sent: Any, **options: Any) -> Any:
        rank = dist.get_rank(group)
        rows = sum(sent) - sent[rank]
        add("all-to-all", rows * x[:1].nbytes, others)
        return original(out, x, received, sent, **options)

    def batch(original: Any, messages: list[Any]) -> Any:
        for x in messages:
            if x.op is dist.isend:
                add("to the previous" if x.tag // 2 % 2 else "to the next", x.tensor.nbytes, 1)
        return original(messages)

    def refused(original: Any, *_: Any, **__: Any) -> Any:
        raise AssertionError("a collective that the estimate does not know")

    replacements = {
        "all_gather_single": all_gather, "all_gather_into_tensor": all_gather,
        "reduce_scatter_single": reduce_scatter, "reduce_scatter_tensor": reduce_scatter,
        "all_to_all_single": all_to_all, "batch_isend_irecv": batch,
        "all_reduce": refused, "broadcast": refused, "all_gather": refused, "all_to_all": refused,
    }  # fmt: skip
    known = {name: partial(x, getattr(dist, name)) for name, x in replacements.items() if hasattr(dist, name)}
    with mock.patch.multiple(dist, **known):
        yield found


def sent(setup: Setup, group: Any) -> Sent:
    run, phase = step(setup, group), ["forward"]
    with counted(group, phase) as found:
        loss = run()
        phase[0] = "backward"
        loss.backward()
    return found


def peak(setup: Setup, group: Any) -> int:
    """The most bytes that tensors hold in a second step beyond what they held before, by torch's profiler."""
    run = step(setup, group)
    run().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run().backward()
    events = [x for x in profiled.profiler.kineto_results.events() if x.name() == "[memory]"]
    changes = [x.nbytes() for x in sorted(events, key=lambda x: x.start_ns())]
    return max(itertools.accumulate(changes))


def held_on_cpu(setup: Setup) -> int:
    """The estimate for `peak`: without the inputs and the matrix of a wide gradient, which the CPU's kernels
    do not hold, and with the copies of queries and keys that they pack in float32."""
    parts = cost.memory(setup)
    held = sum(size for name, size in parts.items() if name not in ("inputs", "matrix of a wide gradient"))
    for problem in setup.problems():
        own, everyone = problem.rows[setup.rank], sum(problem.rows)
        held += 4 * problem.width * (own + (own if setup.exchange == "ring" else everyone))
    return held
