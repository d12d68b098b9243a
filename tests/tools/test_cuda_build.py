"""How the CUDA extension is built: architectures, flags, its host files as a compiler for a GPU sees them,
and errors that say why it is not built."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from emulator import build as emulator

from cl_kernels import cuda_build

ROOT = Path(__file__).resolve().parents[2]
needs_setup = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source checkout")


@pytest.mark.parametrize(
    ("listed", "visible", "expected"),
    [
        ("", [], ["sm_80", "sm_90a", "compute_80"]),
        ("", [(9, 0)], ["sm_90a"]),
        ("native", [(8, 6), (9, 0)], ["sm_86", "sm_90a"]),
        ("8.0", [(9, 0)], ["sm_80"]),
        ("9.0", [], ["sm_90a"]),
        ("9.0a", [], ["sm_90a"]),
        ("9.0+PTX", [], ["sm_90a", "compute_80"]),
        ("8.6+PTX", [], ["sm_86", "compute_86"]),
        ("7.5 8.0;9.0", [], ["sm_80", "sm_90a"]),
        ("8.0;8.0;9.0;9.0a", [], ["sm_80", "sm_90a"]),
        ("10.0;12.0+PTX", [], ["sm_100", "sm_120", "compute_120"]),
        ("Ampere;Hopper", [], ["sm_80", "sm_86", "sm_90a"]),
    ],
)
def test_architectures(listed: str, visible: list[tuple[int, int]], expected: list[str]) -> None:
    assert cuda_build.architectures(listed, visible) == expected


@pytest.mark.parametrize(
    ("listed", "visible", "match"),
    [
        ("9.0;fast", [], "'fast', which is no architecture"),
        ("90", [], "'90', which is no"),
        ("8.0+SASS", [], "no architecture"),
        ("6.1;7.5", [], "has no architecture from 8.0 on"),
        ("", [(7, 5)], "none of the GPUs here"),
    ],
)
def test_architectures_that_cannot_be(listed: str, visible: list[tuple[int, int]], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        cuda_build.architectures(listed, visible)


def test_gencode() -> None:
    assert cuda_build.gencode(["sm_80", "sm_90a", "compute_80"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]


def test_torch_adds_no_architectures_to_ours() -> None:
    from torch.utils import cpp_extension

    assert cpp_extension._get_cuda_arch_flags(cuda_build.flags(["sm_90a"])["nvcc"]) == []


def test_the_extension_is_told_what_it_was_compiled_for() -> None:
    flags = cuda_build.flags(["sm_80", "sm_90a"])
    assert "-DCL_KERNELS_CUDA_ARCHITECTURES=sm_80,sm_90a" in flags["cxx"]


@pytest.mark.parametrize(
    ("compiled", "runs", "does_not_run"),
    [
        (["sm_80"], [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        (["sm_90a"], [(9, 0)], [(8, 0), (10, 0), (12, 0)]),
        (["compute_80"], [(8, 0), (8, 9), (10, 0), (12, 1)], [(7, 5), (9, 0)]),
        (["sm_86"], [(8, 6), (8, 9)], [(8, 0)]),
        (["sm_100", "sm_80"], [(8, 0), (10, 0), (10, 3)], [(9, 0), (12, 0)]),
    ],
)
def test_what_runs_where(
    compiled: list[str], runs: list[tuple[int, int]], does_not_run: list[tuple[int, int]]
) -> None:
    assert all(cuda_build.runs_on(compiled, capability) for capability in runs)
    assert not any(cuda_build.runs_on(compiled, capability) for capability in does_not_run)


def setup(**environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CL_KERNELS_")}
    return subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, env={**inherited, **environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@needs_setup
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_forcing_a_cuda_build_without_cuda_names_the_reason() -> None:
    done = setup(CL_KERNELS_FORCE_CUDA_BUILD="1")
    assert done.returncode != 0
    assert "CL_KERNELS_FORCE_CUDA_BUILD is set, but" in done.stderr
    assert f"torch {torch.__version__} has no CUDA" in done.stderr


@needs_setup
def test_forcing_and_skipping_contradict() -> None:
    done = setup(CL_KERNELS_FORCE_CUDA_BUILD="1", CL_KERNELS_SKIP_BUILD="1")
    assert done.returncode != 0
    assert "CL_KERNELS_FORCE_CUDA_BUILD is set, but CL_KERNELS_SKIP_BUILD is set" in done.stderr


def test_obstacles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils import cpp_extension

    checkout, toolkit = tmp_path / "checkout", tmp_path / "toolkit"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda_build.obstacle(checkout) == f"torch {torch.__version__} has no CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert cuda_build.obstacle(checkout) == "there are no sources in csrc/cuda"
    (checkout / "csrc" / "cuda").mkdir(parents=True)
    (checkout / "csrc" / "cuda" / "kernel.cu").touch()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    assert "nvcc is not found" in str(cuda_build.obstacle(checkout))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(toolkit))
    assert "nvcc is not found" in str(cuda_build.obstacle(checkout))
    for file in (toolkit / "bin" / "nvcc", toolkit / "include" / "cuda_runtime.h"):
        missing = cuda_build.obstacle(checkout)
        assert "nvcc" in str(missing) or "has no headers" in str(missing)
        file.parent.mkdir(parents=True)
        file.touch()
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    assert cuda_build.obstacle(checkout) == "ninja is not installed"
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0")
    assert "from 8.0 on" in str(cuda_build.obstacle(checkout))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert cuda_build.obstacle(checkout) is None


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The compiler and its options for host files, without the emulator's: torch's headers, also those of a
    build for the CPU, which lacks one that CUDA's builds generate, and the toolkit's."""
    if reason := emulator.obstacle():
        pytest.skip(reason)
    from torch.utils import cpp_extension

    stub = tmp_path_factory.mktemp("stub")
    (stub / "c10" / "cuda" / "impl").mkdir(parents=True)
    (stub / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h").touch()
    theirs = [*cpp_extension.include_paths(), sysconfig.get_path("include"), emulator.toolkit() / "include"]
    return [
        *(cpp_extension.get_cxx_compiler(), "-std=c++20", "-fsyntax-only", "-DTORCH_EXTENSION_NAME=_cuda"),
        *cuda_build.flags(["sm_80"])["cxx"],
        *(f"-I{folder}" for folder in cuda_build.include_folders(ROOT)),
        *(f"-isystem{folder}" for folder in theirs),
        f"-idirafter{stub}",
    ]


@pytest.mark.parametrize("file", cuda_build.sources(ROOT, ".cpp"), ids=lambda path: path.name)
def test_host_files_compile_for_a_gpu(file: Path, compiler: list[str]) -> None:
    """A GPU's build alone would see what the emulator replaces."""
    done = subprocess.run([*compiler, str(file)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
