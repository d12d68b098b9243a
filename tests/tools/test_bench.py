"""The benchmark: its truths, its variants, its timing, its files and its commands."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

import cl_kernels
from cl_kernels.__main__ import main
from cl_kernels.bench import compare, exact, fresh, machine, results, run, timing, variants, workloads
from cl_kernels.bench.results import FLOOR, OURS, Line, Results
from cl_kernels.bench.variants import COMPILED, PEERS
from cl_kernels.bench.workloads import LOSSES, Workload, differentiate

ROOT = Path(__file__).resolve().parents[2]


def small(loss: str, dtype: str = "float32", rows: int = 24, width: int = 8) -> Workload:
    return Workload(loss, *LOSSES[loss].shape(rows, 40), width, dtype)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("converged", [False, True])
def test_truths_are_the_references(loss: str, converged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """exact.py against cl_kernels.reference in float64, in several chunks of rows."""
    monkeypatch.setitem(exact.ELEMENTS, "cpu", 7 * 24)
    work = small(loss, "float64")
    inputs = work.inputs(converged=converged)
    truth = exact.LOSSES[loss](work.temperature, *inputs.leaves, *inputs.rest)
    with cl_kernels.use_backend("reference"):
        result = differentiate(LOSSES[loss].ours, work.temperature, inputs)()
    allowed = 1e-7 if loss == "clip" else 1e-12  # the scale and its gradient are float32
    assert run.errors_of(result, truth) == pytest.approx((0.0, 0.0), abs=allowed)
    assert len(truth[1]) == len(inputs.leaves)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_variant_here_is_right(loss: str) -> None:
    work = small(loss)
    inputs = work.inputs()
    for name in (OURS, *(name for name, peer in PEERS.items() if loss in peer.losses)):
        if name == COMPILED or (name in PEERS and PEERS[name].missing("cpu")):
            continue
        step = differentiate(variants.implementation(name, loss), work.temperature, inputs)
        truth = variants.truth(name, loss)(work.temperature, *inputs.leaves, *inputs.rest)
        of_loss, of_gradients = run.errors_of(step(), truth)
        assert of_loss < 1e-5 and of_gradients < 1e-4, name


def test_the_eager_formulas_cover_every_loss() -> None:
    assert set(LOSSES) == set(PEERS["eager"].losses) == set(exact.LOSSES)
    for kind in workloads.SIZES:
        assert set(workloads.SIZES[kind]) == set(LOSSES)


def test_inputs_are_reproducible_and_converged_ones_are_near() -> None:
    work = small("nt_xent", rows=64, width=32)
    z0, z1 = work.inputs(seed=3, converged=True).leaves
    assert torch.equal(z0, work.inputs(seed=3, converged=True).leaves[0])
    assert not torch.equal(z0, work.inputs(seed=4, converged=True).leaves[0])
    torch.testing.assert_close((z0 * z1).sum(1), torch.full((32,), workloads.COSINE))


def test_flops_are_those_of_the_design() -> None:
    assert Workload("supcon", 8192, 8192, 128).flops == 4 * 8192**2 * 128
    assert Workload("sce", 512, 65537, 256).flops == 8 * 512 * 65537 * 256
    assert Workload("clip", 4096, 4096, 512).flops == 8 * 4096**2 * 512


@pytest.mark.parametrize(("rows", "message"), [([3], "even"), ([0], "at least 2")])
def test_sizes_that_make_no_sense(rows: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workloads.planned("cpu", rows=rows)


# Running


def a_plan(*works: Workload, names: tuple[str, ...] = ("eager",), **options: object) -> run.Plan:
    return run.Plan(works, peers=names, rounds=3, seconds=0.0, memory=False, study=False, **options)


@pytest.fixture
def wrong_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PEERS["eager"].losses["supcon"]
    wrong = replace(PEERS["eager"], losses={"supcon": lambda *inputs: 1.001 * right(*inputs)})
    monkeypatch.setitem(PEERS, "eager", wrong)


def test_a_workload_is_measured() -> None:
    lines = {line.variant: line for line in run.measure(a_plan(), small("supcon"), seconds=0.0)}
    assert set(lines) == {OURS, "eager", FLOOR}
    for name, line in lines.items():
        assert line.status == "ok" and len(line.both) == 3 and min(line.both) > 0
        assert (line.gradient_error is None) == (name == FLOOR)
    mine = lines[OURS]
    assert mine.both == pytest.approx([a + b for a, b in zip(mine.forward, mine.backward, strict=True)])
    assert mine.bytes == 2 * 4 * 24 * 8 + 8 * 12


def test_a_wrong_answer_gets_no_time(wrong_eager: None) -> None:
    lines = {line.variant: line for line in run.measure(a_plan(), small("supcon"), seconds=0.0)}
    assert lines["eager"].status.startswith("wrong answer: relative error of the loss is 1.0e-03")
    assert not lines["eager"].timed and lines[OURS].timed


def test_what_raises_gets_no_time_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*inputs: object) -> None:
        raise RuntimeError("of   no\nuse")

    monkeypatch.setitem(PEERS, "eager", replace(PEERS["eager"], losses={"supcon": broken}))
    lines = {line.variant: line for line in run.measure(a_plan(), small("supcon"), seconds=0.0)}
    assert lines["eager"].status == "RuntimeError: of no use"
    assert lines[OURS].timed


def test_what_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = variants.Peer({"supcon": variants.eager.supcon}, package="no_such_package")
    monkeypatch.setitem(PEERS, "absent", absent)
    lines = {line.variant: line for line in run.measure(a_plan(names=("absent",)), small("supcon"), 0.0)}
    assert lines["absent"].status == "not here: ModuleNotFoundError: No module named 'no_such_package'"
    assert "runs on NVIDIA GPUs only" in PEERS["inf-cl"].missing("cpu")


def test_variants_take_turns_and_turn_around(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def forward(self) -> None:
            calls.append(self.name)

        def backward(self, loss: object) -> None:
            pass

    steps = {name: Recorder(name) for name in "oab"}
    timing.interleaved(steps, "cpu", rounds=2, at_least=0.0, often="o")
    assert "".join(calls) == "oaobo" + "oboao"


def test_inputs_rotate_past_the_cache() -> None:
    work = small("supcon")
    one = 4 * 24 * 8 + 8 * 12
    assert len(timing.copies(work, "cpu", cache=one)) == 2
    assert len(timing.copies(work, "cpu", cache=100 * one)) == timing.COPIES


def test_errors_over_temperatures_and_dtypes() -> None:
    plan = a_plan(small("nt_xent"))
    found = run.errors(plan, "nt_xent", "bfloat16", 0.1, "converged")
    assert [x.variant for x in found] == [OURS, "eager"]
    assert all(x.gradient_error is not None and 1e-5 < x.gradient_error < 1 for x in found)


def test_peak_memory_is_that_of_the_matrices() -> None:
    """Eager holds several N x N matrices, ours none; both in processes of their own."""
    work = Workload("nt_xent", 2048, 2048, 16)
    matrix = 4 * work.rows**2
    eager, mine = (fresh.measure(fresh.Task(work, name, threads=1)) for name in ("eager", OURS))
    assert eager.status == mine.status == "ok"
    assert 2 * matrix < eager.peak < 12 * matrix
    if cl_kernels.extension.cpu.module:
        assert mine.peak < matrix


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's data")
def test_what_does_not_fit_is_out_of_memory() -> None:
    task = fresh.Task(Workload("nt_xent", 4096, 4096, 16), "eager", limit=64 << 20, threads=1)
    assert fresh.measure(task).status == fresh.MEMORY


def test_what_raises_in_its_process_says_so() -> None:
    task = fresh.Task(small("clip"), "lightly", threads=1)  # which does not have the loss
    assert fresh.measure(task).status == "KeyError: 'clip'"


# Files


def a_line(variant: str, *both: float, **fields: object) -> Line:
    return run.line_of(Workload("supcon", 64, 64, 8), variant, bytes=1.0, both=both, **fields)


def some(*lines: Line) -> Results:
    return Results(
        {"device": "a CPU"}, "python -m cl_kernels bench", "2026-01-01T00:00:00+00:00", lines=list(lines)
    )


def test_results_survive_a_file(tmp_path: Path) -> None:
    absent = run.line_of(Workload("clip", 64, 64, 8), "eager", status="out of memory")
    before = some(a_line(OURS, 1.0, 2.0, forward=(0.5, 1.0), backward=(0.5, 1.0)), a_line(FLOOR, 1.0), absent)
    before.accuracy = [results.Accuracy("clip", "CLIP", 64, 8, OURS, "float16", 0.01, "random", None, 1e-3)]
    path = tmp_path / "results.json"
    results.save(before, path)
    after = results.load(path)
    assert after.lines[:2] == before.lines[:2] and after.accuracy == before.accuracy
    assert after.lines[2].status == "out of memory" and after.lines[2].bytes is None
    assert (after.machine, after.command, after.date) == (before.machine, before.command, before.date)


def test_a_file_has_a_record_a_line(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    lines = [a_line(OURS, *range(1, 22), gradient_error=math.inf), a_line("eager", 3.0)]
    results.save(some(*lines), path)
    assert [x for x in path.read_text().splitlines() if x.startswith('["supcon"')]
    rows = json.loads(path.read_text())["lines"]
    assert [row[rows[0].index("variant")] for row in rows[1:]] == [OURS, "eager"]
    assert len(path.read_text().splitlines()) < 20
    assert results.load(path).lines[0].gradient_error is None  # JSON has no infinity


@pytest.mark.parametrize(
    "text", ["{}", "[", "[]", '{"cl_kernels": {"format": 1}}', '{"format": 2}', '{"format": 2, "lines": [1]}']
)
def test_a_file_of_another_format(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json"):
        results.load(path)


def test_ratios_are_taken_round_by_round() -> None:
    """A round in which everything is slow does not count."""
    assert results.ratio((2.0, 20.0, 2.2), (1.0, 10.0, 1.0)) == 2.0
    assert math.isnan(results.ratio((), (1.0,)))


# Comparing


def changed(after: Line, **options: object) -> pd.DataFrame:
    before = some(a_line(OURS, 1.0, 1.0), a_line(FLOOR, 0.5, 0.5), a_line("eager", 5.0, 5.0))
    floor = a_line(FLOOR, 1.0, 1.0)  # a machine of half the speed
    return compare.compare(before, some(after, floor, a_line("eager", 10.0, 10.0)), **options)


@pytest.mark.parametrize(
    ("seconds", "verdict"), [(2.0, "same"), (2.1, "same"), (2.3, "slower"), (1.5, "faster")]
)
def test_times_are_compared_as_multiples_of_the_floor(seconds: float, verdict: str) -> None:
    (change,) = changed(a_line(OURS, seconds, seconds)).itertuples()
    assert (change.verdict, change.regression) == (verdict, verdict == "slower")
    assert change.factor == pytest.approx(seconds / 2)


def test_seconds_and_peers_can_be_compared_too() -> None:
    (change,) = changed(a_line(OURS, 2.0), against=compare.SECONDS).itertuples()
    assert change.verdict == "slower" and change.factor == 2
    assert len(changed(a_line(OURS, 2.0), everything=True)) == 2


def test_a_lost_time_is_a_regression() -> None:
    (change,) = changed(a_line(OURS, status="wrong answer: 1")).itertuples()
    assert change.regression and change.verdict == "lost: wrong answer: 1"


def test_the_command_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    results.save(some(a_line(OURS, 1.0), a_line(FLOOR, 1.0)), a)
    results.save(some(a_line(OURS, 1.5), a_line(FLOOR, 1.0)), b)
    assert main(["compare", str(a), str(a)]) == 0
    assert main(["compare", str(a), str(b)]) == 1
    assert main(["bench", "compare", str(a), str(b), "--threshold", "1.6"]) == 0
    assert "1.5" in capsys.readouterr().out
    assert main(["compare", str(a), str(tmp_path / "none.json")]) == 2
    assert main(["compare", str(a), str(b), "--threshold", "0.5"]) == 2
    assert main(["compare", str(a), str(b), "--against", "nobody"]) == 2


# The command


WITHOUT = """
import sys
from cl_kernels.__main__ import main
for absent in sys.argv[1:]:
    sys.modules[absent] = None  # which makes its import fail
    assert main(["bench"]) == 2
    del sys.modules[absent]
    for name in [x for x in sys.modules if x.startswith("cl_kernels.bench")]:
        del sys.modules[name]
"""


def test_without_its_extra() -> None:
    libraries = ("pandas", "rich", "jinja2", "matplotlib", "psutil", "cpuinfo")
    command = [sys.executable, "-c", WITHOUT, *libraries]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    for absent, line in zip(libraries, found.stderr.splitlines(), strict=True):
        assert line.startswith("bench: ") and absent in line
        assert line.endswith("pip install 'cl_kernels[bench]'")


def test_info_imports_no_benchmark() -> None:
    code = "import sys; from cl_kernels.__main__ import main; main(['info']); print(*sys.modules, sep='\\n')"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {x for x in shown.splitlines() if x.startswith("cl_kernels.bench") or x == "pandas"}


def test_the_command_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--losses", "supcon", "sce", "--rows", "16", "32", "--queue", "64", "--width", "8"]
    arguments += ["--peers", "eager", "--rounds", "3", "--seconds", "1", "--no-study"]
    assert main(["bench", *arguments, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "SupCon 32 × 32 × 8 float32" in shown and "eager" in shown
    found = results.load(tmp_path / "results.json")
    assert {(x.loss, x.rows) for x in found.lines} == {(x, n) for x in ("supcon", "sce") for n in (16, 32)}
    assert all(x.timed for x in found.lines)
    assert {"device", "threads", "governor", "load_before", "load_after", "torch"} <= set(found.machine)
    assert set(found.ceilings) == {"float32", "copy"}
    for name in ("report.md", "report.html"):
        report = (tmp_path / name).read_text()
        assert "NaN" not in report and "SCE" in report
        (tmp_path / name).unlink()
    assert main(["bench", "report", str(tmp_path / "results.json")]) == 0
    assert (tmp_path / "report.md").exists()


def test_the_command_fails_where_ours_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = LOSSES["nt_xent"].ours
    wrong = replace(LOSSES["nt_xent"], ours=lambda *inputs: 1.01 * right(*inputs))
    monkeypatch.setitem(workloads.LOSSES, "nt_xent", wrong)
    arguments = [
        "--losses",
        "nt_xent",
        "--rows",
        "16",
        "--peers",
        "--rounds",
        "1",
        "--no-study",
        "--no-memory",
    ]
    assert main(["bench", *arguments, "--output", str(tmp_path)]) == 1
    assert "wrong answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rows", "5"],
        ["--rounds", "0"],
        ["--temperature", "0"],
        ["--threads", "0"],
        ["--backends", "cuda", "--device", "cpu"],
        ["report", "none.json"],
    ],
)
def test_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err.startswith("bench: ")


# Stored results


def test_documents_have_the_stored_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import docs

    for path in docs.DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        assert docs.BLOCK.search(text), path.name
        assert docs.generated(text) == text, f"{path.name} is stale: python bench/docs.py writes it anew"


def test_regressions_are_looked_for_on_the_same_kind_of_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import regression

    here = machine.describe("cpu")
    (tmp_path / "other.json").write_text("{}")
    assert regression.baseline(here, tmp_path) is None
    for date in ("2026-01-01", "2026-01-02"):
        results.save(replace(some(a_line(OURS, 1.0)), machine=here, date=date), tmp_path / f"{date}.json")
    elsewhere = replace(some(), machine=here | {"capability": "another"}, date="2026-01-03")
    results.save(elsewhere, tmp_path / "elsewhere.json")
    assert regression.baseline(here, tmp_path)[0] == "2026-01-02.json"
