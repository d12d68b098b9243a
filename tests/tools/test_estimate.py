"""`python -m cl_kernels estimate`, held to what Gloo processes send and hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from groups import in_group
from torch import Tensor

import cl_kernels as clk
from cl_kernels.tools import cost
from cl_kernels.tools.cost import Setup

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
def counted(group: Any, phase: list[str]) -> Iterator[Counter[tuple[str, str, str]]]:
    """Bytes that this process gives to torch.distributed for others, and messages, by phase and call; of a
    collective W - 1 blocks."""
    found: Counter[tuple[str, str, str]] = Counter()
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
    with pytest.MonkeyPatch.context() as patch:
        for name, replacement in replacements.items():
            if original := getattr(dist, name, None):
                called = lambda *args, f=replacement, g=original, **options: f(g, *args, **options)  # noqa: E731
                patch.setattr(dist, name, called)
        yield found


SETUPS = [
    Setup("supcon", (4,), (8,)),
    Setup("supcon", (4,), (8,), labels=False),
    Setup("supcon", (4,), (8,), views=3, labels=False, dtype="float32"),
    Setup("selfcon", (4,), (8,)),
    Setup("multilevel", (4,), (8, 16)),
    Setup("stablerep", (4,), (8,), dtype="float32"),
    Setup("nt_xent", (4,), (8,)),
    Setup("clip", (4,), (8,)),
    Setup("clip", (4,), (8,), dtype="float32"),
    Setup("info_nce", (4,), (8,)),
    Setup("info_nce", (4,), (8,), frozen=True),
    Setup("info_nce", (4,), (8,), frozen=True, queue=11),
    Setup("dcl", (4,), (8,)),
    Setup("sce", (4,), (8,)),
    Setup("sce", (4,), (8,), frozen=True),
    Setup("sce", (4,), (8,), frozen=True, queue=11),
    Setup("sce", (4,), (8,), queue=11, dtype="float32"),
    Setup("dimcl", (4,), (11,)),
]


def cases(world: int) -> list[Setup]:
    """Even and uneven parts under both exchanges; a part of 1 has a half without rows."""
    parts = ((4,) * world, (3, 5, 8, 1)[:world])
    return [
        cost.replace(setup, samples=samples, exchange=exchange)
        for setup in SETUPS
        for samples in parts
        for exchange in cost.EXCHANGES
    ]


def sent(rank: int, world: int) -> list[Counter[tuple[str, str, str]]]:
    results = []
    for setup in cases(world):
        loss_of = step(cost.replace(setup, rank=rank), dist.group.WORLD)
        phase = ["forward"]
        with counted(dist.group.WORLD, phase) as found:
            loss = loss_of()
            phase[0] = "backward"
            loss.backward()
        results.append(found)
    return results


def estimated(setup: Setup) -> Counter[tuple[str, str, str]]:
    found: Counter[tuple[str, str, str]] = Counter()
    for x in cost.traffic(setup):
        found[x.phase, x.by, "bytes"] += x.bytes
        found[x.phase, x.by, "messages"] += x.messages
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_and_messages_are_those_sent(world: int, tmp_path: Path) -> None:
    for rank, report in enumerate(in_group(world, sent, tmp_path, world)):
        assert isinstance(report, list), f"rank {rank}: {report}"
        for setup, found in zip(cases(world), report, strict=True):
            wanted = estimated(cost.replace(setup, rank=rank))
            assert +found == +wanted, f"rank {rank}, {setup}"
