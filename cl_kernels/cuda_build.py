"""Compilation of the CUDA kernels in csrc/cuda: for which architectures, with which flags, and what can
stand in the way.

Shared by setup.py, which loads this file by its path, and by `extension.py`, which compiles a source checkout
where the backend "cuda" is asked for by name. It imports nothing of the package, and torch only where used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

LEAST = (8, 0)  # the compute capability of the portable kernels; a later GPU's driver compiles their PTX
_NAMES = {"ampere": "8.0;8.6", "ada": "8.9", "hopper": "9.0", "blackwell": "10.0;10.3;12.0;12.1"}


def architectures(listed: str = "", visible: Sequence[tuple[int, int]] = ()) -> list[str]:
    """Targets of the compiler, sm_XX (machine code) and compute_XX (PTX): those that TORCH_CUDA_ARCH_LIST
    lists, else the visible GPUs' capabilities, else both generations of kernels and PTX for later GPUs.

    Hopper's own instructions exist only in sm_90a, so 9.0 means that, and its +PTX the portable kernels'.
    Entries below 8.0 are left out. Raises `ValueError` for one that cannot be read, or where none is left.
    """
    entries = re.split(r"[;,\s]+", listed.strip().lower())
    by_list = entries not in ([""], ["native"])
    if not by_list:
        entries = [f"{major}.{minor}" for major, minor in visible] or ["8.0+ptx", "9.0"]
    machine_code, ptx = set(), set()
    for entry in entries:
        name, *rest = entry.split("+")
        for number in _NAMES.get(name, name).split(";"):
            match = re.fullmatch(r"(\d+)\.(\d)([af]?)", number)
            if match is None or rest not in ([], ["ptx"]):
                raise ValueError(f"TORCH_CUDA_ARCH_LIST has {entry!r}, which is no architecture")
            version, suffix = (int(match[1]), int(match[2])), match[3]
            if version < LEAST:
                continue
            suffix = "a" if version == (9, 0) else suffix
            machine_code.add((version, suffix))
            if rest:
                ptx.add(LEAST if suffix else version)
    if not machine_code:
        where = f"TORCH_CUDA_ARCH_LIST={listed!r} has no" if by_list else "none of the GPUs here has an"
        raise ValueError(f"{where} architecture from 8.0 on")
    return [
        *("sm_{}{}{}".format(*version, suffix) for version, suffix in sorted(machine_code)),
        *("compute_{}{}".format(*version) for version in sorted(ptx)),
    ]


def runs_on(compiled: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether kernels compiled for these architectures run on a GPU of this capability: Hopper takes its own
    kernels only, other GPUs machine code of their generation or any earlier PTX."""
    if capability == (9, 0):
        return "sm_90a" in compiled
    for code in compiled:
        kind, _, number = code.partition("_")
        version = divmod(int(number.rstrip("af")), 10)
        same_generation = version[0] == capability[0] and not number.endswith("a")
        if version == capability or (version < capability and (same_generation or kind == "compute")):
            return True
    return False


def gencode(compiled: Sequence[str]) -> list[str]:
    """nvcc's options; with these torch adds none of its own."""
    return [f"-gencode=arch=compute_{code.partition('_')[2]},code={code}" for code in compiled]


def flags(compiled: Sequence[str]) -> dict[str, list[str]]:
    """Flags by compiler, beside what torch adds: its include paths, the C++ standard, -fPIC."""
    cxx = ["-O3", "-g0", "-DNDEBUG", "-fvisibility=hidden", "-Wno-psabi"]
    cxx.append(f"-DCL_KERNELS_CUDA_ARCHITECTURES={','.join(compiled)}")
    nvcc = ["-O3", "-DNDEBUG", "--compiler-options=-fvisibility=hidden", *gencode(compiled)]
    return {"cxx": cxx, "nvcc": nvcc}


def sources(root: Path, *suffixes: str) -> list[Path]:
    """The files of csrc/cuda with these suffixes."""
    return sorted(path for path in (root / "csrc" / "cuda").rglob("*") if path.suffix in suffixes)


def include_folders(root: Path) -> list[Path]:
    return [root / "csrc", root / "csrc" / "cuda"]


def wanted() -> list[str]:
    """The architectures to compile for here."""
    import torch

    visible = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return architectures(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), sorted(set(visible)))


def name_toolkit() -> None:
    """Set CUDA_HOME where torch, which goes by the place of nvcc, would take that of a wrapper."""
    home = Path("/usr/local/cuda")
    if "CUDA_HOME" not in os.environ and (home / "include" / "cuda_runtime.h").exists():
        os.environ["CUDA_HOME"] = str(home)


def obstacle(root: Path) -> str | None:
    """Why the CUDA kernels cannot be compiled here, or None."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if not sources(root, ".cu"):
        return "there are no sources in csrc/cuda"
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    if home is None or not (Path(home) / "bin" / "nvcc").exists():
        return "nvcc is not found (CUDA_HOME names the CUDA toolkit)"
    if not any((Path(path) / "cuda_runtime.h").exists() for path in cpp_extension.include_paths("cuda")):
        return f"the CUDA toolkit in {home} has no headers (CUDA_HOME names another)"
    if not cpp_extension.is_ninja_available():
        return "ninja is not installed"
    try:
        wanted()
    except ValueError as error:
        return str(error)
    return None
