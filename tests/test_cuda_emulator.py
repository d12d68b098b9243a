"""The emulator that runs CUDA kernels on the CPU: right products, and mistakes that do not go unnoticed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from emulator import build


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := build.obstacle():
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("emulator") / "self_test"
    build.compile_program(build.FOLDER / "self_test.cpp", path)
    return path


@pytest.mark.parametrize("case", ["mma", "wgmma"])
def test_products(program: Path, case: str) -> None:
    assert subprocess.run([program, case]).returncode == 0


@pytest.mark.parametrize("case", ["mma, no wait", "wgmma, no wait", "wgmma, refilled"])
def test_a_missing_wait_gives_wrong_numbers(program: Path, case: str) -> None:
    assert subprocess.run([program, case]).returncode == 1


def test_a_deadlock_ends_the_program(program: Path) -> None:
    result = subprocess.run([program, "wgmma, deadlock"], capture_output=True, text=True)
    assert result.returncode < 0
    assert "deadlock" in result.stderr
