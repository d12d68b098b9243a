"""`python -m cl_kernels estimate`, held to what Gloo processes send and hold."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from group_steps import DTYPES, Sent, held_on_cpu, peak, sent
from groups import in_group
from processes import run_python

from cl_kernels.__main__ import main
from cl_kernels.tools import cost, estimate
from cl_kernels.tools.cost import Rates, Setup
from cl_kernels.tools.estimate import Estimate

ROOT = Path(__file__).resolve().parents[2]
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
    Setup("dimcl", (4,), (11,), dtype="float32"),  # half columns stay float32 on the CPU
]


def cases(world: int) -> list[Setup]:
    """Even and uneven parts under both exchanges; a part of 1 has a half without rows."""
    parts = ((4,) * world, (5, 8, 1)[-world:])
    return [
        replace(setup, samples=samples, exchange=exchange)
        for setup in SETUPS
        for samples in parts
        for exchange in cost.EXCHANGES
    ]


ROWS, WIDTH = 2048, 128
HELD = [
    replace(setup, samples=(ROWS // rows,) * 2, widths=(WIDTH,), dtype=dtype, exchange=exchange)
    for setup, rows in (
        (Setup("supcon", (), ()), 2), (Setup("clip", (), ()), 1), (Setup("sce", (), ()), 1),
        (Setup("sce", (), (), frozen=True), 1), (Setup("info_nce", (), (), frozen=True), 1),
    )
    for dtype in DTYPES
    for exchange in cost.EXCHANGES
]  # fmt: skip


def measured(rank: int) -> dict[str, list[Any]]:
    """Bytes that three processes send, that two of them send, and that these hold."""
    everyone, pair = dist.group.WORLD, dist.new_group([0, 1])
    found = {"three": [sent(replace(setup, rank=rank), everyone) for setup in cases(3)]}
    if rank < 2:
        found["two"] = [sent(replace(setup, rank=rank), pair) for setup in cases(2)]
        found["held"] = [peak(replace(setup, rank=rank), pair) for setup in HELD]
    return found


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    found = in_group(3, measured, tmp_path_factory.mktemp("group"), timeout=120)
    assert all(isinstance(report, dict) for report in found), found
    return found


def estimated(setup: Setup) -> Sent:
    found: Sent = Counter()
    for x in cost.traffic(setup):
        found[x.phase, x.by, "bytes"] += x.bytes
        found[x.phase, x.by, "messages"] += x.messages
    return found


@pytest.mark.parametrize(("name", "world"), [("two", 2), ("three", 3)])
def test_bytes_and_messages_are_those_sent(reports: list[Any], name: str, world: int) -> None:
    for rank in range(world):
        for setup, found in zip(cases(world), reports[rank][name], strict=True):
            assert +found == +estimated(replace(setup, rank=rank)), f"rank {rank}, {setup}"


FACTOR = 1.4  # between what is held and the estimate, either way


def test_memory_is_what_is_held(reports: list[Any]) -> None:
    for rank in range(2):
        for setup, found in zip(HELD, reports[rank]["held"], strict=True):
            wanted = held_on_cpu(replace(setup, rank=rank))
            assert wanted / FACTOR < found < wanted * FACTOR, f"rank {rank}, {setup}: {found}, not {wanted}"


COUNT = """
import contextlib, json, sys
from unittest import mock

import torch
import triton_gate
from cl_kernels.problem import Contrast, SoftTarget
from cl_kernels.triton import entry_points, launch


def launches(name, *args):
    count = 0

    def one(original, *given, **options):
        nonlocal count
        count += 1
        return original(*given, **options)

    with triton_gate.recording("sm_90") as recorder:
        record, product = recorder.record, launch.mm_float32
        recorder.record = lambda *x, **y: one(record, *x, **y)
        with mock.patch.object(launch, "mm_float32", lambda *x, **y: one(product, *x, **y)):
            getattr(entry_points, name)(*args)
    return count


scale, found = torch.ones(()), {}
for width, dtype in ((128, torch.bfloat16), (512, torch.bfloat16), (128, torch.float32)):
    q, k = torch.ones(256, width, dtype=dtype), torch.ones(512, width, dtype=dtype)
    rows, cols = torch.zeros(256, dtype=torch.float64), torch.zeros(512, dtype=torch.float64)
    own, saved, none = torch.arange(256), torch.zeros(256, width), torch.empty(0)

    def note(kind, *counts):
        found[f"{kind} {width} {str(dtype).removeprefix('torch.')}"] = counts

    for kind, keys, both in (("self", None, False), ("keys", k, False), ("both axes", k, True)):
        problem = Contrast(q, keys, scale, positive_index=own, both_axes=both)
        problem = problem._replace(exclude=0 if keys is None else None)
        lse_cols, grad_cols = (cols, cols) if both else (cols[:0], None)
        back = [
            launches("contrastive_backward", rows, grad_cols, rows, *problem, rows, lse_cols, none, needs)
            for needs in ((True, True, True, False), (True, False, True, False))
        ]
        note(kind, launches("contrastive_forward", *problem, False), *back)
    problem = Contrast(q, k, scale, positive_index=own)
    back = launches(
        "contrastive_backward", rows, None, rows, *problem, rows, cols[:0], saved, (True, False, True, False)
    )
    note("frozen keys", launches("contrastive_forward", *problem, True), back)
    problem = SoftTarget(q, [k, k], q, [k, k], scale, scale, own)
    stats = (rows, None, rows, rows), (rows, rows, rows, rows)
    back = launches("soft_target_backward", *stats[0], *problem, *stats[1], none, none, (True,) * 4)
    note("soft targets", launches("soft_target_forward", *problem, False), back)
    note("frozen soft targets", launches("soft_target_forward", *problem, True))
print(json.dumps(found))
"""


def test_launches_are_those_of_the_launchers() -> None:
    """Kernels for GPUs, recorded as the compile gate does in place of running them."""
    pytest.importorskip("triton")
    path = os.pathsep.join([str(ROOT / "gates"), str(ROOT / "tests"), str(ROOT)])
    done = run_python("-c", COUNT, PYTHONPATH=path, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    recorded = json.loads(done.stdout)
    assert len(recorded) == 18
    for name, counts in recorded.items():
        kind, width, dtype = name.rsplit(" ", 2)
        size = (int(width), dtype)
        if kind == "frozen soft targets":
            wanted = [cost.forward("soft targets", 256, [512, 512], *size, saves=True)]
        elif kind == "soft targets":
            wanted = [run(kind, 256, [512, 512], *size) for run in (cost.forward, cost.backward)]
        elif kind == "frozen keys":
            wanted = [cost.forward("keys", 256, [512], *size, saves=True), cost.Work(0, 1)]
        else:
            wanted = [cost.forward(kind, 256, [512], *size)]
            wanted += [cost.backward(kind, 256, [512], *size, keys=keys) for keys in (True, False)]
        assert counts == [work.launches for work in wanted], name


def test_operations_are_those_of_the_model_of_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import model

    alone = {
        Setup("supcon", (4096,), (128,)): model.self_similarity("", "", 8192, 128),
        Setup("nt_xent", (8192,), (512,)): model.self_similarity("", "", 16384, 512),
        Setup("dimcl", (16384,), (2048,)): model.self_similarity("", "", 4096, 16384),
        Setup("clip", (32768,), (512,)): model.both_axes("", "", 32768, 512),
        Setup("info_nce", (8192,), (128,)): model.one_axis("", "", 8192, 8192, 128),
        Setup("info_nce", (256,), (128,), frozen=True, queue=65536): model.frozen_keys(
            "", "", 256, 65536, 128
        ),
        Setup("sce", (512,), (256,), frozen=True, queue=65537 - 512): model.sce("", 512, 65537, 256),
    }
    for setup, known in alone.items():
        work = Estimate(setup, RATES).work
        assert [work["forward"].flops, work["backward"].flops] == [known.forward, known.backward], setup


RATES = Rates(1e12, 1e9, 1e9)


def test_the_ring_does_no_more_work_than_gathering() -> None:
    """Over the rows of all: only the triangle at home is saved."""
    for loss in ("supcon", "clip", "dcl"):
        gathered = Setup(loss, (64,) * 4, (512,))
        ring = replace(gathered, exchange="ring")
        for rank in range(4):
            apart = [Estimate(replace(x, rank=rank), RATES).flops for x in (ring, gathered)]
            assert apart[0] < apart[1] if loss != "clip" else apart[0] == apart[1]


def test_the_smallest_hidden_batch_is_the_smallest() -> None:
    setup = Setup("clip", (1024,) * 16, (512,), exchange="ring")
    fewest = cost.smallest_hidden(setup, RATES)
    assert fewest is not None and 900 < fewest < 4000  # about FLOPs over bytes a second
    for n, hidden in ((fewest - 1, False), (fewest, True), (2 * fewest, True)):
        assert cost.hides(replace(setup, samples=(n,) * 16), RATES) is hidden


def test_a_ring_waits_for_what_it_does_not_hide() -> None:
    """With links of no cost nothing but the work is left, with slow ones the bytes over the rate."""
    setup = Setup("supcon", (256,) * 8, (128,), exchange="ring")
    free = cost.passes(setup, Rates(1e12, 1e30, 1e30))
    assert sum(x.exposed for x in free) == pytest.approx(0, abs=1e-12)
    slow = cost.passes(setup, Rates(1e30, 1e30, 1e6))
    travelled = [x for x in cost.traffic(setup) if x.by.startswith("to ")]
    assert sum(x.exposed for x in slow) == pytest.approx(1e-6 * sum(x.bytes for x in travelled), rel=1e-6)


def test_one_process_sends_nothing() -> None:
    for loss in cost.LOSSES:
        assert cost.traffic(Setup(loss, (8,), (16,))) == []


@pytest.mark.parametrize("loss", cost.LOSSES)
def test_every_loss_is_estimated(loss: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", loss, "--batch", "1k", "--processes", "3", "--width", "64", "--json"]) == 0
    gathered, ring = json.loads(capsys.readouterr().out)
    assert gathered["setup"]["samples"] == ring["setup"]["samples"] == 342
    for found in (gathered, ring):
        assert min(found["flops"].values()) > 0 and min(found["launches"].values()) > 0
        assert {x["by"] for x in found["sent"]} >= {"all-gather"}
    assert gathered["hidden"] is None and ring["hidden"] > 0
    assert sum(ring["memory"].values()) < sum(gathered["memory"].values())


def test_given_rates_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["estimate", "clip", "--tflops", "2", "--link-gbps", "3", "--latency-us", "0", "--json"]
    assert main([*command, "--processes", "64"]) == 0
    rates = json.loads(capsys.readouterr().out)[0]["rates"]
    assert rates == {"flops": 2e12, "link": 3e9, "ring": 3e9, "latency": 0, "launch": pytest.approx(5e-6)}


def test_text_says_that_it_is_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "supcon"]) == 0
    text = capsys.readouterr().out
    assert "modelled, not measured" in text and "reduce-scatter" in text
    assert main(["estimate", "supcon", "--batch", "64k", "1M", "--processes", "8", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.split()[2:3] == ["ring"] for line in lines) == 4 and "1M" in lines[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["clip", "--views", "2"],
        ["clip", "--queue", "8"],
        ["supcon", "--frozen-keys"],
        ["supcon", "--width", "8", "16"],
        ["supcon", "--views", "1", "--no-labels"],
        ["nt_xent", "--no-labels"],
        ["clip", "--batch", "4", "--processes", "8"],
    ],
)
def test_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *arguments]) == 2
    assert capsys.readouterr().err.startswith("estimate: ")


@pytest.mark.parametrize(
    ("text", "value"), [("65536", 65536), ("64k", 65536), ("16M", 1 << 24), ("0", None), ("1.5k", None)]
)
def test_counts(text: str, value: int | None) -> None:
    if value is not None:
        assert estimate.count(text) == value
        return
    with pytest.raises(argparse.ArgumentTypeError, match="positive integer"):
        estimate.count(text)
