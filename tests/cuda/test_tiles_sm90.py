"""Hopper's tile kernels (csrc/cuda/*_sm90.cu over tiles_sm90.h) in the emulator, against double precision."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from emulator import build
from torch.utils import cpp_extension


@pytest.mark.slow
def test_tiles(tmp_path: Path) -> None:
    if reason := build.obstacle():
        pytest.skip(reason)
    program = tmp_path / "tiles_sm90"
    folder = build.ROOT / "tests" / "emulator"
    includes = [f"-I{path}" for path in (folder, build.SOURCES, f"{build.toolkit()}/include")]
    subprocess.run(
        [cpp_extension.get_cxx_compiler(), *build.FLAGS, "-include", str(folder / "emulator.h"), *includes,
         str(folder / "tiles_sm90.cpp"), "-o", str(program)],
        check=True,
    )  # fmt: skip
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
