"""The recipes of examples/: they run, go on after a kill, and give over processes what they give in one."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = sorted(path.parent.name for path in ROOT.glob("examples/*/presets.py"))
CPU = torch.device("cpu")
SMALL = {"data": "digits", "batch": 32, "width": 8, "epochs": 30}

pytestmark = pytest.mark.skipif(not SYSTEMS, reason="not a source checkout")
pytest.importorskip("tyro", reason="the examples' requirements are not installed")


def recipe_of(system: str) -> Any:
    return importlib.import_module(f"examples.{system}.__main__").RECIPE


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


def start(words: Sequence[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
    )


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


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("system", SYSTEMS)
def test_killed_run_goes_on_bit_for_bit(system: str, tmp_path: Path) -> None:
    """SIGKILL in the middle of the first method; what goes on is the run that was not killed."""
    settings = small(system, tmp_path / "killed")
    name = settings.methods[0]
    log = settings.output / name / "log.jsonl"
    process = start(["-m", *command(system, settings)])
    deadline = time.monotonic() + 120
    while not log.exists() or len(log.read_bytes().splitlines()) < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()

    checkpoint = torch.load(settings.output / name / "checkpoint.pt", weights_only=True)
    done = checkpoint["steps"]
    assert 3 <= done <= len(log.read_bytes().splitlines())
    resumed = train(system, replace(settings, steps=done + 5), name)
    whole = train(system, replace(settings, steps=done + 5, output=tmp_path / "whole"), name)
    assert [record["step"] for record in resumed] == list(range(done + 5))
    assert without_times(resumed) == without_times(whole)
    last = [
        torch.load(folder / name / "checkpoint.pt", weights_only=True)["method"]
        for folder in (settings.output, tmp_path / "whole")
    ]
    for key, value in last[0].items():
        assert torch.equal(value, last[1][key]), key


@pytest.mark.parametrize("system", SYSTEMS)
def test_two_processes_are_one(system: str, tmp_path: Path) -> None:
    """Losses and figures of the first steps under torchrun are those of one process with the union."""
    settings = small(system, tmp_path / "two", steps=3)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    process = start([*torchrun, *command(system, settings)])
    output = process.communicate(timeout=300)
    assert process.returncode == 0, output
    for name in settings.methods:
        one = train(system, replace(settings, output=tmp_path / "one"), name)
        two = [json.loads(line) for line in (settings.output / name / "log.jsonl").read_text().splitlines()]
        assert len(two) == 3
        for ours, theirs in zip(without_times(two), without_times(one), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7), name


COMPILED = "supcon", "towers"  # an image and a text encoder: half a minute each


@pytest.mark.parametrize(
    ("system", "options"),
    [(system, {"amp": "bfloat16"}) for system in SYSTEMS]
    + [(system, {"compile": True}) for system in COMPILED],
)
def test_options_change_rounding_only(system: str, options: dict[str, Any], tmp_path: Path) -> None:
    settings = small(system, tmp_path / "plain", steps=2)
    name = settings.methods[0]
    plain = train(system, settings, name)
    changed = train(system, replace(settings, output=tmp_path / "changed", **options), name)
    tolerance = 0.1 if "amp" in options else 1e-4
    assert [x["loss"] for x in changed] == pytest.approx([x["loss"] for x in plain], rel=tolerance)


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


def test_unknown_option_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipe_of("supcon").main(["--temprature", "1"])
    assert "--temprature" in capsys.readouterr().err
