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
    build.compile_program(path, build.FOLDER / "self_test.cpp")
    return path


@pytest.mark.parametrize("case", ["mma", "wgmma"])
def test_products(program: Path, case: str) -> None:
    assert subprocess.run([program, case]).returncode == 0


@pytest.mark.parametrize("copies", ["late", "early"])
def test_blocks_of_a_cluster_copy_for_each_other(
    program: Path, copies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if copies == "early":
        monkeypatch.setenv("CL_KERNELS_EMULATED_COPIES", copies)
    assert subprocess.run([program, "cluster"]).returncode == 0
    assert subprocess.run([program, "cluster, not released by all"]).returncode == 1


@pytest.mark.parametrize(("case", "what"), [("ends early", "has ended"), ("no meeting", "is not there yet")])
def test_mistakes_of_a_cluster_end_the_program(program: Path, case: str, what: str) -> None:
    result = subprocess.run([program, f"cluster, {case}"], capture_output=True, text=True)
    assert result.returncode < 0
    assert what in result.stderr


@pytest.mark.parametrize("case", ["mma, no wait", "wgmma, no wait", "wgmma, refilled"])
def test_a_missing_wait_gives_wrong_numbers(program: Path, case: str) -> None:
    assert subprocess.run([program, case]).returncode == 1


def test_a_deadlock_ends_the_program(program: Path) -> None:
    result = subprocess.run([program, "wgmma, deadlock"], capture_output=True, text=True)
    assert result.returncode < 0
    assert "deadlock" in result.stderr


@pytest.fixture(scope="module")
def padding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := build.obstacle():
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("emulator") / "padding"
    kernels = [build.SOURCES / f"{name}.cu" for name in ("lse", "positive_rows", "similarity_rows")]
    # Of memory from malloc only: threads' stacks are the emulator's own.
    flags = ["-O1", "-fsanitize=address", "--param", "asan-stack=0"]
    try:
        build.compile_program(path, build.FOLDER / "padding.cpp", *kernels, flags=flags)
    except subprocess.CalledProcessError:
        pytest.skip("the compiler has no AddressSanitizer")
    return path


def test_nothing_past_the_end_of_a_row_is_read(padding: Path) -> None:
    result = subprocess.run([padding, "rows"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    result = subprocess.run([padding, "past the end"], capture_output=True, text=True)
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr
