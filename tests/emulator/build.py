"""Compiles the CUDA backend for the emulator (emulator.h) and loads it: its ops then take CPU tensors.

`python -m emulator.build` compiles only; objects are kept in build/emulator.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
FOLDER = Path(__file__).parent
FLAGS = [
    *("-std=c++20", "-O2", "-g0", "-fno-strict-aliasing", "-fvisibility=hidden", "-w"),
    *("-include", str(FOLDER / "emulator.h")),
]


def toolkit() -> Path | None:
    """The CUDA toolkit, whose headers the kernels include."""
    nvcc = shutil.which("nvcc")
    beside = [Path(nvcc).resolve().parents[1]] if nvcc else []
    homes = [Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda"), *beside, Path("/usr/local/cuda")]
    return next((home for home in homes if (home / "include" / "cuda_runtime.h").exists()), None)


def obstacle() -> str | None:
    """Why the emulator cannot be compiled here, or None."""
    if toolkit() is None:
        return "the CUDA toolkit's headers are not installed"
    if not shutil.which(cpp_extension.get_cxx_compiler()):
        return "there is no C++ compiler"
    return None


def _includes() -> list[str]:
    home = toolkit()
    assert home is not None
    return [str(path) for path in (SOURCES.parent, SOURCES, FOLDER, home / "include")]


def compile_program(out: Path, *sources: Path, flags: Sequence[str] = ()) -> None:
    """A program of its own, of files with kernels among others."""
    includes = [f"-I{path}" for path in _includes()]
    command = [cpp_extension.get_cxx_compiler(), *FLAGS, *flags, *includes, "-x", "c++", *map(str, sources)]
    subprocess.run([*command, "-o", str(out)], check=True)


@functools.cache
def load() -> None:
    """Compile what changed, and register the ops of `cl_kernels_cuda` for CPU tensors, and row kernels that
    are no ops as `cl_kernels_cuda_rows` (rows.cpp)."""
    folder = ROOT / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    # One process at a time; torch's own lock is a file that outlives a process that is stopped.
    with (folder / "held").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        _load(folder)


def _load(folder: Path) -> None:
    sources = []
    for path in sorted((*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp"), FOLDER / "rows.cpp")):
        source = folder / f"{path.name.replace('.', '_')}.cpp"
        text = f'#include "{path}"\n'
        if not source.exists() or source.read_text() != text:
            source.write_text(text)
        sources.append(str(source))
    cpp_extension.load(
        "cl_kernels_emulated",
        sources,
        extra_cflags=FLAGS,
        extra_include_paths=_includes(),
        build_directory=str(folder),
        is_python_module=False,
        verbose=os.environ.get("CL_KERNELS_VERBOSE", "") not in ("", "0"),
    )


if __name__ == "__main__":
    import cl_kernels  # noqa: F401  defines the ops

    load()
    print(f"compiled for torch {torch.__version__}")
    sys.exit(0)
