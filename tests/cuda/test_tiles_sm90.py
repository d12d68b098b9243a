"""Hopper's tile kernels (csrc/cuda/*_sm90.cu over tiles_sm90.h) in the emulator, against double precision."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from emulator import build


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := build.obstacle():
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("tiles") / "tiles_sm90"
    build.compile_program(path, build.FOLDER / "tiles_sm90.cpp")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("copies", ["late", "early"])
def test_tiles(program: Path, copies: str) -> None:
    """Copies as late as their waits allow, and as early: over what other blocks of a cluster still read."""
    chosen = {"CL_KERNELS_EMULATED_COPIES": copies} if copies == "early" else {}
    done = subprocess.run([program], capture_output=True, text=True, env=os.environ | chosen)
    assert done.returncode == 0, done.stdout + done.stderr
