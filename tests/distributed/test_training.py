"""Losses over a group as training uses them: wrappers, wrong calls, failures, and rows gathered by hand."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from groups import in_group
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import cl_kernels as clk
from cl_kernels import reference

SIZES = (3, 5, 8)
WORLD = len(SIZES)
N = sum(SIZES)
EXCHANGES = ("gather", "ring")


def rows(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator).double(), dim=-1)


def own(x: Tensor, rank: int) -> Tensor:
    return x.split(SIZES)[rank]


def ratio(found: Tensor, wanted: Tensor) -> float:
    """Quotient of their lengths; infinity where they differ by more than rounding."""
    if (found - wanted).abs().max() > 1e-12 * wanted.abs().max():
        return float("inf")
    return (found.norm() / wanted.norm()).item()


class Model(nn.Module):
    """An encoder and a learnable scalar, which leave it together: FSDP gathers parameters in forward."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(7, 6, dtype=torch.float64)
        self.scalar = nn.Parameter(torch.full(shape, 0.3, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.nn.functional.normalize(self.encoder(x), dim=-1), self.scalar * 1.0


LABELS = torch.arange(N) % 5
LOSSES: dict[str, Callable[..., Tensor]] = {
    "supcon": lambda z, y, t, **group: clk.supcon_loss(z, y, temperature=t, **group),
    "selfcon": lambda z, y, t, **group: clk.selfcon_loss(z, y, temperature=t, **group),
    "multilevel": lambda z, y, t, **group: clk.multilevel_loss([z, z.flip(1)], y, temperature=t, **group),
    "stablerep": lambda z, y, t, **group: clk.stablerep_loss(z[:, 0], y, temperature=t, **group),
    "nt_xent": lambda z, y, t, **group: clk.nt_xent_loss(z[:, 0], z[:, 1], temperature=t, **group),
    "info_nce": lambda z, y, t, **group: clk.info_nce_loss(z[:, 0], z[:, 1], temperature=t, **group),
    "clip": lambda z, y, t, **group: clk.clip_loss(z[:, 0], z[:, 1], 1 / t, **group),
    "dcl": lambda z, y, t, **group: clk.dcl_loss(z[:, 0], z[:, 1], temperature=t, sigma=t, **group),
    "sce": lambda z, y, t, **group: clk.sce_loss(z[:, 0], z[:, 1].detach(), temperature=t, coeff=t, **group),
    "dimcl": lambda z, y, t, **group: clk.dimcl_loss(z[:, 0], z[:, 1], temperature=t, **group),
}


def training(rank: int) -> dict[tuple[str, ...], float]:
    """Ratio of the gradient under each wrapper to that of one process on all rows."""
    found = {}
    inputs = rows(N, 2, 7)
    shapes: dict[str, tuple[int, ...]] = {"ddp": (), "fsdp": (1, 1), "sum": (1,)}
    for name, exchange, wrapper in itertools.product(LOSSES, EXCHANGES, shapes):
        torch.manual_seed(0)
        model = Model(*shapes[wrapper])
        alone = copy.deepcopy(model)
        LOSSES[name](alone(inputs)[0], LABELS, alone(inputs)[1]).backward()
        wrapped = DistributedDataParallel(model) if wrapper == "ddp" else model
        if wrapper == "fsdp":
            fully_shard(model)
        z, t = wrapped(own(inputs, rank))
        loss = LOSSES[name](z, own(LABELS, rank), t, group=dist.group.WORLD, exchange=exchange)
        (loss / WORLD if wrapper == "sum" else loss).backward()
        for (parameter, x), wanted in zip(model.named_parameters(), alone.parameters(), strict=True):
            grad = x.grad.full_tensor() if wrapper == "fsdp" else x.grad
            if wrapper == "sum":
                dist.all_reduce(grad)
            found[name, exchange, wrapper, parameter] = ratio(grad, wanted.grad)
    return found


def test_gradients_under_ddp_fsdp_and_sums(tmp_path: Path) -> None:
    for report in in_group(WORLD, training, tmp_path):
        assert isinstance(report, dict), report
        assert {key: x for key, x in report.items() if abs(x - 1) > 1e-12} == {}


def refused(error: type[Exception], match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=match):
        call()


def wrong_calls(rank: int) -> str:
    group, first = dist.group.WORLD, rank == 0
    z = rows(4, 2, 6)
    q, k = z.unbind(1)
    given: dict[str, Any] = {"group": group}
    learnt = torch.tensor(0.2, requires_grad=first)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("same width", lambda: clk.supcon_loss(z[..., : 6 - first], **given)),
        ("same dtype", lambda: clk.supcon_loss(z.to(torch.float32 if first else z.dtype), **given)),
        ("require a gradient", lambda: clk.supcon_loss(z.clone().requires_grad_(first), **given)),
        ("same options", lambda: clk.supcon_loss(z, contrast_mode="one" if first else "all", **given)),
        ("same options", lambda: clk.supcon_loss(z, torch.arange(4) if first else None, **given)),
        ("same loss", lambda: (clk.info_nce_loss if first else clk.dcl_loss)(q, k, **given)),
        ("sizes but the first", lambda: clk.distributed.gather_rows(z[..., : 6 - first], group)),
        ("same options", lambda: clk.supcon_loss(z, exchange="ring" if first else "gather", **given)),
        ("same options", lambda: clk.supcon_loss(z, temperature=learnt, **given)),
        (
            "same options",
            lambda: clk.supcon_loss(z, torch.rand(4).to(torch.float32 if first else torch.float64), **given),
        ),
        ("same options", lambda: clk.sce_loss(q, k, queue=rows(3, 6).requires_grad_(first), **given)),
        ("need of a gradient", lambda: clk.distributed.gather_rows(z.clone().requires_grad_(first), group)),
        ("12 keys", lambda: clk.sce_loss(q, k, targets=clk.sce_targets(k), **given)),
        ("exchange must be", lambda: clk.supcon_loss(z, exchange="star", **given)),
        ("k_global and rank", lambda: clk.sce_loss(q, k, k, **given)),
        ("shape", lambda: clk.supcon_loss(z, mask=torch.ones(4, 4), **given)),  # wanted: [4, 12]
    ]
    for match, call in calls:
        refused(ValueError, match, call)
    refused(TypeError, "ProcessGroup", lambda: clk.supcon_loss(z, group="world"))
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda x: clk.supcon_loss(x, **given))(z)
    # Nothing is left over of the calls before.
    loss = clk.supcon_loss(z, exchange="ring", **given)
    torch.testing.assert_close(loss, clk.supcon_loss(torch.cat([z] * WORLD)))
    return "done"


def unusual_batches(rank: int) -> str:
    group = dist.group.WORLD
    for exchange in EXCHANGES:
        given: dict[str, Any] = {"group": group, "exchange": exchange}
        # The first rank's rows have no positives.
        x, labels = rows(N, 1, 6), torch.cat([torch.tensor([-1, -2, -3]), torch.arange(N - 3) % 4])
        for options in ({}, {"no_positive": "drop"}, {"summation": "in"}):
            loss = clk.supcon_loss(own(x, rank), own(labels, rank), **options, **given)
            dist.all_reduce(loss)
            torch.testing.assert_close(loss / WORLD, reference.supcon_loss(x, labels, **options))
        # Fewer dimensions than processes.
        z0, z1 = rows(N, 3)[:, :2], rows(N, 3, seed=1)[:, :2]
        local = own(z0, rank).clone().requires_grad_()
        loss = clk.dimcl_loss(local, own(z1, rank), **given)
        loss.backward()
        whole = z0.clone().requires_grad_()
        wanted = reference.dimcl_loss(whole, z1)
        wanted.backward()
        value = loss.detach().clone()
        dist.all_reduce(value)
        torch.testing.assert_close(value / WORLD, wanted.detach())
        torch.testing.assert_close(local.grad / WORLD, own(whole.grad, rank))
        # Half precision loses no more than one process, whose columns are float32.
        halves = [z.to(torch.bfloat16) for z in (z0, z1)]
        loss = clk.dimcl_loss(*(own(z, rank) for z in halves), **given)
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / WORLD, clk.dimcl_loss(*halves), rtol=1e-6, atol=1e-6)
        # Momentum keys may change before the backward.
        q, k = rows(N, 6), rows(N, 6, seed=1)
        grads = []
        for changed in (False, True):
            local, keys = own(q, rank).clone().requires_grad_(), own(k, rank).clone()
            loss = clk.info_nce_loss(local, keys, **given)
            if changed:
                keys.zero_()
            grads += torch.autograd.grad(loss, local)
        assert torch.equal(*grads)
    return "done"


def gathered_by_hand(rank: int) -> str:
    """Losses of one process, given gathered rows: views of them, uneven and empty parts, two derivatives."""
    group = dist.group.WORLD
    everything = rows(N, 2, 6).requires_grad_()
    wanted = clk.supcon_loss(everything, LABELS)
    (wanted_grad,) = torch.autograd.grad(wanted, everything)
    local = own(everything.detach(), rank).clone().requires_grad_()
    across = clk.distributed.gather_rows(local.transpose(1, 2), group).transpose(1, 2)
    assert not across.is_contiguous()
    labels = clk.distributed.gather_rows(own(LABELS, rank), group)
    loss = clk.supcon_loss(across, labels)
    torch.testing.assert_close(loss, wanted)
    (grad,) = torch.autograd.grad(loss, local)
    torch.testing.assert_close(grad / WORLD, own(wanted_grad, rank))
    # The transpose of what was gathered, as a queue.
    q, keys = rows(5, 6), rows(N, 6, seed=2)
    columns = clk.distributed.gather_rows(own(keys, rank), group).T.contiguous().T
    torch.testing.assert_close(clk.info_nce_loss(q, q, columns), clk.info_nce_loss(q, q, keys))
    sizes = (4, 0, 2)
    x = rows(6, 3).split(sizes)[rank].clone().requires_grad_()
    y = clk.distributed.gather_rows(x, group)
    torch.testing.assert_close(y.detach(), rows(6, 3))
    (first,) = torch.autograd.grad((y**3).sum() * (rank + 1), x, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), x)
    torch.testing.assert_close(first, 18 * x**2)  # 1 + 2 + 3 losses
    torch.testing.assert_close(second, 1296 * x**3)
    x = (torch.complex(rows(2, 3), rows(2, 3, seed=1)) * (rank + 1)).requires_grad_()
    (grad,) = torch.autograd.grad((clk.distributed.gather_rows(x, group) * 1j).sum().real, x)
    torch.testing.assert_close(grad, torch.full_like(grad, -3j))
    assert clk.distributed.gather_rows(torch.ones(2), None).tolist() == [1.0, 1.0]
    return "done"


def derivatives(rank: int) -> str:
    x, given = rows(N, 2, 6), {"group": dist.group.WORLD}
    whole = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(clk.supcon_loss(whole, LABELS), whole, create_graph=True)
    (wanted,) = torch.autograd.grad(grad.square().sum(), whole)
    local = own(x, rank).clone().requires_grad_()
    loss = clk.supcon_loss(local, own(LABELS, rank), **given) / WORLD
    (grad,) = torch.autograd.grad(loss, local, create_graph=True)
    (found,) = torch.autograd.grad(grad.square().sum(), local)
    torch.testing.assert_close(found, own(wanted, rank))
    for call in (
        lambda z: clk.supcon_loss(z, own(LABELS, rank), exchange="ring", **given),
        lambda z: clk.sce_loss(z[:, 0], z[:, 1], exchange="ring", **given),
    ):
        (grad,) = torch.autograd.grad(call(local), local, create_graph=True)
        refused(NotImplementedError, 'take exchange="gather"', lambda g=grad: g.sum().backward())
    return "done"


def the_same_bits(rank: int) -> str:
    x = rows(N, 2, 16).float()
    for name, exchange in itertools.product(LOSSES, EXCHANGES):
        results = []
        for _ in range(2):
            z = own(x, rank).clone().requires_grad_()
            t = torch.tensor(0.3, requires_grad=True)
            loss = LOSSES[name](z, own(LABELS, rank), t, group=dist.group.WORLD, exchange=exchange)
            loss.backward()
            results.append((loss.detach(), z.grad, t.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), (name, exchange)
    return "done"


def as_modules(rank: int) -> str:
    group, z = dist.group.WORLD, rows(4, 2, 6)
    halves = dist.new_group([0, 1])
    for module in (clk.SupConLoss(0.2, group=group), clk.MultiLevelConLoss(group=group, exchange="ring")):
        args = (z,) if isinstance(module, clk.SupConLoss) else ([z],)
        expected = module(*args)
        assert f"group of {WORLD}" in repr(module)
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)):
            assert torch.equal(copied(*args), expected)
    if rank < 2:
        part = clk.ClipLoss(group=halves)
        pair = z.unbind(1)
        for copied in (copy.deepcopy(part), copy.copy(part)):
            assert torch.equal(copied(*pair, 2.0), part(*pair, 2.0))
        refused(TypeError, "not pickled", lambda: pickle.dumps(part))
    else:
        refused(TypeError, "belongs to", lambda: clk.clip_loss(z[:, 0], z[:, 1], 2.0, group=halves))
    return "done"


def compiled(rank: int) -> str:
    x = rows(N, 2, 6)
    for name, exchange in (("supcon", "gather"), ("clip", "ring")):
        step = LOSSES[name]

        def loss(z: Tensor, step: Callable[..., Tensor] = step, exchange: str = exchange) -> Tensor:
            found = step(z * 1.0, own(LABELS, rank), 0.3, group=dist.group.WORLD, exchange=exchange)
            return found * 2.0

        grads = []
        for function in (loss, torch.compile(loss, backend="aot_eager")):
            z = own(x, rank).clone().requires_grad_()
            function(z).backward()
            grads.append(z.grad)
        torch.testing.assert_close(*grads)
    gathered = torch.compile(
        lambda x: clk.distributed.gather_rows(x * 1.0, dist.group.WORLD).T * 2.0, backend="aot_eager"
    )
    torch.testing.assert_close(gathered(own(x[:, 0], rank)), x[:, 0].T * 2.0)
    return "done"


PARTS = (wrong_calls, unusual_batches, gathered_by_hand, derivatives, the_same_bits, as_modules, compiled)


def every_part(rank: int) -> list[str]:
    return [part(rank) for part in PARTS]


def test_calls_of_all_kinds(tmp_path: Path) -> None:
    assert in_group(WORLD, every_part, tmp_path) == [["done"] * len(PARTS)] * WORLD


TIMEOUT = 4.0


def failing_step(rank: int, exchange: str, how: str) -> tuple[float, str]:
    """Seconds to the error of a rank, and its text; rank 1 fails between forward and backward."""
    model = Model()
    step = DistributedDataParallel(model)
    for fails in (False, True):
        z, t = step(own(rows(N, 2, 7), rank))
        loss = clk.supcon_loss(z, temperature=t, group=dist.group.WORLD, exchange=exchange)
        start = time.monotonic()
        if fails and rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(3 * TIMEOUT)  # what it raised was caught, and it does not go on
            return 0.0, "stopped"
        try:
            loss.backward()
        except RuntimeError as error:
            return time.monotonic() - start, str(error)
    return time.monotonic() - start, "no error"


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_rank_that_fails_ends_the_others(how: str, exchange: str, tmp_path: Path) -> None:
    first, _, last = in_group(WORLD, failing_step, tmp_path, exchange, how, timeout=TIMEOUT)
    for report in (first, last):
        assert not isinstance(report, str), report
        seconds, text = report
        assert text != "no error"
        assert seconds < 2.5 * TIMEOUT
        print(f"{exchange}, {how}: {seconds:.1f} s, {text.splitlines()[0]}")
