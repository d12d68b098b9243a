"""The parts of `python -m cl_kernels tune` that need no GPU."""

from __future__ import annotations

import pytest
import torch

from cl_kernels import __main__, configs, dispatch
from cl_kernels.bench.workloads import differentiate
from cl_kernels.configs import Shape
from cl_kernels.dispatch import Case, Serving
from cl_kernels.tools import tune

ROW = Shape(128, 64, 64, 8, 3)


def test_candidates_start_with_the_row_and_are_distinct() -> None:
    found = tune.candidates(ROW)
    assert found[0] == ROW and len(set(found)) == len(found)
    assert Shape(64, 64, 64, 4, 2) in found and Shape(128, 128, 64, 8, 4) in found
    assert ROW._replace(block_d=32) in found and ROW._replace(block_d=128) in found
    assert all(min(shape[:3]) >= 16 and shape.stages >= 1 for shape in found)


def test_candidates_leave_sizes_that_a_kernel_does_not_have() -> None:
    assert {shape[:3] for shape in tune.candidates(Shape(16, 0, 128, 4, 1))} == {
        (16, 0, 128),
        (32, 0, 128),
        (16, 0, 64),
        (16, 0, 256),
    }


def test_rows_are_merged_with_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    key = ("lse", "sm_90", "half")
    monkeypatch.setattr(configs, "TABLE", {key: {64: ROW, 256: ROW}})
    better = ROW._replace(warps=4)
    text = tune.rows_text({key: {256: (better, "1.0 ms")}})
    code = text.splitlines()[-1]
    table: dict[tuple[str, str, str], dict[int, Shape]] = {}
    exec(code, {"TABLE": table, "Shape": Shape})
    assert table == {key: {64: ROW, 256: better}}
    assert text.startswith("# 256: 1.0 ms\n")


def test_rows_used_are_those_that_a_step_looks_up(monkeypatch: pytest.MonkeyPatch) -> None:
    key = ("lse", "sm_90", "float32")
    monkeypatch.setattr(configs, "TABLE", {key: {64: ROW, 256: ROW}})
    monkeypatch.setattr(configs, "device_of", lambda x: configs.Device("sm_90", 132, "sm_90"))

    def step() -> list[torch.Tensor]:
        assert configs.shape("lse", torch.ones(1), 65) == configs.shape("lse", torch.ones(1), 999) == ROW
        return []

    before = configs.shape
    assert tune.rows_used(step) == [(key, 256)]
    assert configs.shape is before


def test_decisions_are_those_that_a_step_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> None:
        dispatch.row_for(Case("contrastive", "self", "half", "sm_90", 128))
        dispatch.row_for(Case("contrastive", "frozen keys", "half", "sm_80", 64))

    before = dispatch.row_for
    assert [row[:6] for row in tune.decisions(step)] == [
        ("contrastive", "self", "half", "sm_90", 128, "triton"),
        ("contrastive", "frozen keys", "half", "sm_80", 64, "triton"),
    ]
    assert dispatch.row_for is before


def test_serving_rows_are_literals_that_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that `tune --serving` prints go into SERVING as they stand; then CUDA C++ serves under "auto"."""
    work, ours = tune.work_of("nt_xent", 64, 8, "bfloat16")
    decided = [Serving("contrastive", "self", "half", "sm_90", 8, "triton", "default")]
    monkeypatch.setattr(tune, "decisions", lambda step: decided)
    monkeypatch.setattr(tune, "by_backend", lambda backend, ours: ours)
    monkeypatch.setattr(type(work), "inputs", lambda work, device, seed=0: [])
    monkeypatch.setattr(tune, "differentiate", lambda *_: lambda: None)
    monkeypatch.setattr(tune.timing, "steps", lambda *_: None)

    def interleaved(
        steps: dict[str, object], device: str, rounds: int
    ) -> dict[str, list[tuple[float, float]]]:
        times = {"cuda": 1e-4, "triton": 2e-4}
        return {name: [(0.25 * times[name], 0.75 * times[name])] * rounds for name in steps}

    monkeypatch.setattr(tune.timing, "interleaved", interleaved)
    text = "\n".join(tune.serving_rows(work, ours))
    assert "cuda 0.1000 ms, triton 0.2000 ms" in text
    rows = eval(f"({text}\n)", {"Serving": Serving})
    assert rows == (Serving("contrastive", "self", "half", "sm_90", 8, "cuda", "measured"),)

    def cannot(backend: str, ours: object) -> object:
        if backend == "cuda":
            raise RuntimeError("it was not built")
        return ours

    with monkeypatch.context() as patch:
        patch.setattr(tune, "by_backend", cannot)
        assert tune.serving_rows(work, ours) == ["# cuda: it was not built"]

    monkeypatch.setattr(dispatch, "SERVING", (*rows, *dispatch.SERVING))
    dispatch.forget_decisions()
    monkeypatch.setattr(configs, "device_of", lambda x: configs.Device("sm_90", 132, "sm_90"))
    monkeypatch.setattr(dispatch, "obstacle", lambda *_: None)
    pairs = (0, None, None, "all", False, None, None, None, False)
    for width, backend in ((8, "cuda"), (9, "triton")):
        q = torch.ones(4, width).bfloat16()
        assert dispatch.serving("contrastive_forward", (q, None, torch.ones(()), *pairs, False)) == backend


@pytest.mark.parametrize("name", tune.WORKLOADS)
def test_every_workload_can_be_tuned(name: str) -> None:
    """Its step by the CPU's kernels, at a size that keeps the proportions."""
    work, ours = tune.work_of(name, 64, 8, "float32")
    loss, gradients = differentiate(ours, work.temperature, work.inputs())()
    assert loss.isfinite() and all(x is not None and x.isfinite().all() for x in gradients)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["tune", "supcon"]) == 2
    assert "no GPU" in capsys.readouterr().err
