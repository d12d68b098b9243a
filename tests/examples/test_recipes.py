"""The recipes of examples/: they run, go on after a kill, and give over processes what they give in one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tyro", reason="the examples' requirements are not installed")

from examples.evidence.measure import recipe_of
from examples.evidence.plan import PLANS

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = list(PLANS)
CPU = torch.device("cpu")
SMALL = {"data": "digits", "batch": 32, "width": 8, "epochs": 30}


def small(system: str, output: Path, **changes: Any) -> Any:
    settings = recipe_of(system).presets["cpu"]
    options = {k: v for k, v in SMALL.items() if k != "data" or settings.data == "mnist"}
    return replace(settings, output=output, checkpoint_every=3, **options | changes)


def train(system: str, settings: Any, name: str) -> list[dict[str, Any]]:
    recipe = recipe_of(system)
    data = recipe.load(settings.data, settings.root, settings.size)
    folder = settings.output / name
    folder.mkdir(parents=True, exist_ok=True)
    return recipe.trainer(settings, name, data, CPU).fit(folder, name)


def command(system: str, settings: Any) -> list[str]:
    """The command line that says the same as the settings."""
    default = recipe_of(system).presets["cpu"]
    words = [f"examples.{system}"]
    for name in vars(settings):
        value = getattr(settings, name)
        if value == getattr(default, name):
            continue
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-"))
        else:
            words += [option, *map(str, value if isinstance(value, tuple) else [value])]
    return words


@contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A command on the CPU; it and what it started are killed in the end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def kill_after(log: Path, lines: int, *words: str) -> None:
    """Run a command until its log has so many lines, then kill all of its processes."""
    with started(*words) as process:
        deadline = time.monotonic() + 120
        while not log.exists() or len(log.read_bytes().splitlines()) < lines:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, f"{log} has too few lines"
            time.sleep(0.01)


def read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "ms"} for record in records]


@pytest.mark.parametrize("system", SYSTEMS)
def test_command_trains_evaluates_and_plots(system: str, tmp_path: Path) -> None:
    settings = small(system, tmp_path, steps=2)
    results = recipe_of(system).main(command(system, settings)[1:])
    assert list(results) == list(settings.methods)
    for name, result in results.items():
        assert json.loads((tmp_path / name / "result.json").read_text()) == result
        assert result["figures"] and all(isinstance(x, float) for x in result["figures"].values())
        assert len((tmp_path / name / "log.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def assert_goes_on(system: str, settings: Any, name: str, whole: Path) -> None:
    """Five more steps after the checkpoint, in this process, are those of a run that was not killed."""
    path = settings.output / name / "checkpoint.pt"
    done = torch.load(path, weights_only=True)["steps"]
    assert 3 <= done <= len((settings.output / name / "log.jsonl").read_bytes().splitlines())
    runs = []
    for output in (settings.output, whole):
        records = train(system, replace(settings, steps=done + 5, output=output), name)
        runs.append((records, torch.load(output / name / "checkpoint.pt", weights_only=True)["method"]))
    (resumed, weights), (expected, others) = runs
    assert [record["step"] for record in resumed] == list(range(done + 5))
    assert without_times(resumed) == without_times(expected)
    assert all(torch.equal(value, others[key]) for key, value in weights.items())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("system", SYSTEMS)
def test_killed_run_goes_on_bit_for_bit(system: str, tmp_path: Path) -> None:
    """SIGKILL in the middle of the first method; what goes on is the run that was not killed."""
    settings = small(system, tmp_path / "killed")
    name = settings.methods[0]
    kill_after(settings.output / name / "log.jsonl", 5, "-m", *command(system, settings))
    assert_goes_on(system, settings, name, tmp_path / "whole")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("system", "name", "changes"),
    [
        ("supcon", "supcon", {"memory": 50, "amp": "float16"}),
        ("dimcl", "byol+dimcl", {"optimizer": "lars"}),
        ("sce", "moco", {"symmetric": True, "crops": 1, "coeff_start": 0.9}),
    ],
)
def test_what_a_checkpoint_has(system: str, name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Queues with labels, the scaler, LARS' momentum, momentum encoders, schedules."""
    settings = small(system, tmp_path / "stopped", **changes)
    train(system, replace(settings, steps=4), name)
    assert_goes_on(system, settings, name, tmp_path / "whole")


def test_both_processes_are_killed_in_the_second_method(tmp_path: Path) -> None:
    settings = small("sce", tmp_path / "killed", methods=("sce", "moco"), epochs=1)
    settings = replace(settings, checkpoint_every=4)
    words = (*TORCHRUN, "-m", *command("sce", settings))
    kill_after(tmp_path / "killed" / "moco" / "log.jsonl", 6, *words)
    outputs = []
    for output in (settings.output, tmp_path / "whole"):
        with started(*TORCHRUN, "-m", *command("sce", replace(settings, output=output))) as process:
            process.wait(300)
            assert process.returncode == 0, process.communicate()
        outputs.append([without_times(read(output / name / "log.jsonl")) for name in settings.methods])
    assert outputs[0] == outputs[1]


def test_a_process_that_fails_ends_all(tmp_path: Path) -> None:
    """The first process's log is shorter than its checkpoint; the other one waits for its rows."""
    settings = small("supcon", tmp_path, steps=3)
    train("supcon", settings, "supcon")
    (tmp_path / "supcon" / "log.jsonl").write_text("")
    words = command("supcon", replace(settings, steps=6))
    with started(*TORCHRUN, "-m", *words) as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "must have the 3 steps of its checkpoint, got 0" in errors


@pytest.mark.parametrize("system", SYSTEMS)
def test_two_processes_are_one(system: str, tmp_path: Path) -> None:
    """Losses and figures of the first steps under torchrun are those of one process with the union."""
    changes = {"memory": 50} if system == "supcon" else {}
    settings = small(system, tmp_path / "two", steps=3, **changes)
    with started(*TORCHRUN, "-m", *command(system, settings)) as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    for name in settings.methods:
        one = train(system, replace(settings, output=tmp_path / "one"), name)
        two = read(settings.output / name / "log.jsonl")
        assert len(two) == 3
        for ours, theirs in zip(without_times(two), without_times(one), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("system", SYSTEMS)
def test_mixed_precision_changes_little(system: str, tmp_path: Path) -> None:
    settings = small(system, tmp_path / "plain", steps=2)
    name = settings.methods[0]
    plain = train(system, settings, name)
    changed = train(system, replace(settings, output=tmp_path / "changed", amp="bfloat16"), name)
    assert [x["loss"] for x in changed] == pytest.approx([x["loss"] for x in plain], rel=0.05)
    assert changed[0]["loss"] != plain[0]["loss"]


@pytest.mark.parametrize("system", ["supcon", "towers"])  # an image and a text encoder: half a minute each
def test_compiled_encoders_give_the_same(system: str, tmp_path: Path) -> None:
    settings = small(system, tmp_path / "plain", steps=2)
    name = settings.methods[0]
    plain = train(system, settings, name)
    torch._dynamo.utils.counters.clear()
    changed = train(system, replace(settings, output=tmp_path / "changed", compile=True), name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert [x["loss"] for x in changed] == pytest.approx([x["loss"] for x in plain], rel=1e-4)


@pytest.mark.parametrize(("warmup", "factors"), [(0.0, [1.0]), (0.05, [0.5, 1.0]), (0.0125, [1.0, 1.0])])
def test_warm_up_rises_to_the_learning_rate(warmup: float, factors: list[float], tmp_path: Path) -> None:
    settings = small("supcon", tmp_path, warmup=warmup, lr=0.2)  # 40 steps an epoch
    recipe = recipe_of("supcon")
    trainer = recipe.trainer(settings, "supcon", recipe.load("digits", None, None), CPU)
    rates = [trainer.learning_rate(step) for step in range(trainer.total)]
    assert rates[: len(factors)] == pytest.approx([0.2 * x for x in factors], rel=1e-4)
    assert max(rates) <= 0.2 and rates[-1] < 1e-5


def test_colour_images(tmp_path: Path) -> None:
    settings = small("sce", tmp_path, data="photographs", symmetric=True, crops=1, steps=2)
    assert [record["step"] for record in train("sce", settings, "sce")] == [0, 1]


def test_another_run_is_not_overwritten(tmp_path: Path) -> None:
    settings = small("supcon", tmp_path, steps=1)
    train("supcon", settings, "supcon")
    before = (tmp_path / "supcon" / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=r"another run \(lr=.*there.*here\).*--restart"):
        train("supcon", replace(settings, lr=7.0), "supcon")
    assert (tmp_path / "supcon" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("batch", [0, 1298])
def test_batch_that_cannot_be_had(batch: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"batch must be .*, got {batch}"):
        train("supcon", small("supcon", tmp_path, batch=batch), "supcon")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "mnisst"], "mnist"),
        (["--data", "cifar10", "--root", "/nowhere"], "cifar-10-batches-py"),
        (["--epochs", "-1"], "epochs and steps must not be negative, got -1"),
        (["--checkpoint-every", "0"], "checkpoint_every must be at least 1, got 0"),
        (["--methods"], "--methods must name some"),
    ],
)
def test_wrong_options_end_in_a_line(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        recipe_of("supcon").main(["--data", "digits", "--output", str(tmp_path), *words])


def test_unknown_option_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipe_of("supcon").main(["--temprature", "1"])
    assert "--temprature" in capsys.readouterr().err
