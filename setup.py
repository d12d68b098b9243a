"""Builds the extensions `cl_kernels._C`, C++ for the CPU, and `cl_kernels._cuda`, CUDA C++ for GPUs, beside
the pure-Python package that pyproject.toml describes.

CL_KERNELS_SKIP_BUILD=1        do not compile: a pure-Python install, right on every input and slower
CL_KERNELS_FORCE_BUILD=1       an extension for the CPU that cannot be built is an error
CL_KERNELS_SKIP_CUDA_BUILD=1   leave the extension for GPUs out
CL_KERNELS_FORCE_CUDA_BUILD=1  an extension for GPUs that cannot be built is an error
TORCH_CUDA_ARCH_LIST           the GPU architectures to compile for; by default those of the GPUs here
MAX_JOBS                       compilers at once
none of these                  compile where that works; otherwise print why not, and do without

Why an extension was not built stays with the installation, for `python -m cl_kernels info`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import setuptools
from setuptools.command.build_ext import build_ext as SetuptoolsBuildExt
from setuptools.command.build_py import build_py as SetuptoolsBuildPy

if int(setuptools.__version__.partition(".")[0]) < 77:  # older ones misread pyproject.toml
    raise SystemExit(
        f"cl_kernels is built with setuptools 77.0.3 or later, and this is {setuptools.__version__}: "
        "run `pip install 'setuptools>=77.0.3,<82'` first"
    )

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"


def enabled(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


SKIP = enabled("CL_KERNELS_SKIP_BUILD")
FORCE = enabled("CL_KERNELS_FORCE_BUILD")
SKIP_CUDA = enabled("CL_KERNELS_SKIP_CUDA_BUILD")
FORCE_CUDA = enabled("CL_KERNELS_FORCE_CUDA_BUILD")
CPU, CUDA = "cl_kernels._C", "cl_kernels._cuda"
FORCED = {CPU: FORCE, CUDA: FORCE_CUDA}
FORCING = {CPU: "CL_KERNELS_FORCE_BUILD", CUDA: "CL_KERNELS_FORCE_CUDA_BUILD"}


def load(name: str) -> ModuleType:
    """A module of cl_kernels, without importing the package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "cl_kernels" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build_record, cuda_build = load("build_record"), load("cuda_build")
cuda_build.name_toolkit()  # before torch looks for it


def compiler() -> str:
    """The C++ compiler, as torch.utils.cpp_extension chooses it."""
    return os.environ.get("CXX", "cl" if os.name == "nt" else "c++")


def uses_clang() -> bool:
    try:
        version = subprocess.run([*compiler().split(), "--version"], capture_output=True, text=True)
    except OSError:
        return False
    return "clang" in version.stdout.lower()


def obstacle() -> str | None:
    """Why no extension can be built here, or None."""
    if not any(CSRC.rglob("*.cpp")):
        return f"there are no C++ sources in {CSRC.name}/"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return (
            f"torch cannot be imported by this build ({error}). The extension belongs to the torch that it "
            "is compiled against: install torch first, then run `pip install --no-build-isolation .`"
        )
    if not shutil.which(compiler().split()[0]):
        return f"there is no C++ compiler ({compiler()!r} is not on PATH; CXX names another)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's C headers are missing (Debian and Ubuntu: the package python3-dev)"
    return None


def notice(name: str, reason: str) -> None:
    """Say that an extension is left out, and why."""
    text = f"cl_kernels: installing without CUDA kernels: {reason}."
    if name == CPU:
        text = (
            f"\ncl_kernels: installing WITHOUT compiled kernels: {reason}.\n"
            "cl_kernels: every loss stays right and keeps its memory bounded, but is slower.\n"
        )
    print(text, file=sys.stderr, flush=True)


def relative(paths) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def sources(*patterns: str) -> list[str]:
    """The CPU extension's."""
    found = {path for pattern in patterns for path in (*CSRC.glob(pattern), *(CSRC / "cpu").rglob(pattern))}
    return relative(found)


def cpu_extension():
    from torch.utils.cpp_extension import CppExtension

    # The instruction set is chosen at run time: csrc/cpu/isa_*.cpp raise their target, the rest is baseline.
    compile_args = ["-O3", "-g0", "-DNDEBUG", "-fvisibility=hidden", "-Wno-psabi"]
    link_args: list[str] = []
    if platform.system() == "Linux":
        compile_args.append("-fopenmp")
        # at::parallel_for must run on the OpenMP runtime that torch has loaded, or torch.set_num_threads does
        # not reach it. GCC's symbols resolve from libtorch_cpu's libgomp; clang needs a runtime of its own.
        if uses_clang():
            link_args.append("-fopenmp")
    return CppExtension(
        CPU,
        sources=sources("*.cpp"),
        include_dirs=[str(CSRC)],
        depends=sources("*.h", "*.inl"),
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


def cuda_extension():
    from torch.utils.cpp_extension import CUDAExtension

    return CUDAExtension(
        CUDA,
        sources=relative(cuda_build.sources(ROOT, ".cpp", ".cu")),
        include_dirs=[str(folder) for folder in cuda_build.include_folders(ROOT)],
        depends=relative((*CSRC.glob("*.h"), *cuda_build.sources(ROOT, ".h", ".cuh", ".inl"))),
        extra_compile_args=cuda_build.flags(cuda_build.wanted()),
    )


def recording(base: type, reasons: dict[str, str | None]) -> type:
    """`base`, a command, that leaves beside the extensions why one was not built."""

    class Recording(base):
        def run(self) -> None:
            super().run()
            inplace = getattr(self, "inplace", False) or getattr(self, "editable_mode", False)
            folders = [Path(self.build_lib), *([ROOT] if inplace else [])]
            for package in (folder / "cl_kernels" for folder in folders):
                self.remove_stale(package)
                if package.exists():
                    build_record.write(package, reasons)

        def remove_stale(self, package: Path) -> None:
            """An extension of an earlier build must not outlive one that left it out."""
            for name in (name for name, reason in reasons.items() if reason is not None):
                suffix = sysconfig.get_config_var("EXT_SUFFIX")
                (package / f"{name.rpartition('.')[2]}{suffix}").unlink(missing_ok=True)

    return Recording


def build_command(base: type, reasons: dict[str, str | None]) -> type:
    """`base` (torch's BuildExtension) that does without an extension where its compilation fails."""

    class BuildExt(recording(base, reasons)):
        def run(self) -> None:
            version = self.distribution.get_version()
            for ext in self.extensions:
                ext.define_macros.append(("CL_KERNELS_VERSION", f'"{version}"'))
            super().run()

        def build_extensions(self) -> None:
            """One at a time: where one fails, the other stays."""
            self.compiler.object_filenames = with_objects_of_their_own(self.compiler.object_filenames)
            built = []
            for ext in self.extensions:
                self.extensions = [ext]
                log = Path(self.build_temp) / f"{ext.name}.log"
                log.parent.mkdir(parents=True, exist_ok=True)
                print(f"cl_kernels: compiling {ext.name}", file=sys.stderr, flush=True)
                try:
                    with printed_to(log):
                        super().build_extensions()
                except Exception as error:
                    print(log.read_text(errors="replace"), flush=True)
                    if FORCED[ext.name]:
                        raise
                    reasons[ext.name] = f"the compilation failed: {first_error(log, error)}"
                    notice(ext.name, reasons[ext.name])
                else:
                    built.append(ext)
                    if self.verbose:
                        print(log.read_text(errors="replace"), flush=True)
            self.extensions = self.distribution.ext_modules = built

    return BuildExt


@contextlib.contextmanager
def printed_to(log: Path) -> Iterator[None]:
    """Send what this process and the compilers that it starts print meanwhile to a file."""
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    sys.stdout.flush(), sys.stderr.flush()
    with log.open("wb") as file:
        for descriptor in kept:
            os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        for descriptor, original in kept.items():
            os.dup2(original, descriptor)
            os.close(original)


def first_error(log: Path, error: Exception) -> str:
    """The compiler's first error, in a line, or that of the build."""
    lines = [*log.read_text(errors="replace").splitlines(), str(error).strip() or repr(error)]
    found = (line for line in lines if re.search(r"\berror\b.*: |undefined reference", line))
    return next(found, lines[-1].splitlines()[0]).strip().replace(f"{ROOT}/", "")[:300]


def with_objects_of_their_own(object_filenames):
    """similarity.cu and similarity.cpp compile to different files."""

    def names(sources, *args, **kwargs) -> list[str]:
        objects = object_filenames(sources, *args, **kwargs)
        return [
            str(Path(name).with_suffix(".cuda.o")) if str(source).endswith(".cu") else name
            for source, name in zip(sources, objects, strict=True)
        ]

    return names


def obstacles() -> dict[str, str | None]:
    """Why each extension is not built, or None."""
    if SKIP:
        return dict.fromkeys((CPU, CUDA), "CL_KERNELS_SKIP_BUILD is set")
    common = obstacle()
    if common is not None or SKIP_CUDA:
        return {CPU: common, CUDA: common or "CL_KERNELS_SKIP_CUDA_BUILD is set"}
    return {CPU: None, CUDA: cuda_build.obstacle(ROOT)}


def build_arguments() -> dict[str, object]:
    reasons = obstacles()
    for name, reason in reasons.items():
        if reason is None:
            continue
        if FORCED[name]:
            raise SystemExit(f"cl_kernels: {FORCING[name]} is set, but {reason}")
        if any(
            command in sys.argv
            for command in ("bdist_wheel", "editable_wheel", "build_ext", "install", "develop")
        ):
            notice(name, reason)
    commands = {"build_py": recording(SetuptoolsBuildPy, reasons)}
    if reasons[CPU] is not None:
        return {"cmdclass": {**commands, "build_ext": recording(SetuptoolsBuildExt, reasons)}}
    from torch.utils.cpp_extension import BuildExtension

    extensions = [cpu_extension()] + ([cuda_extension()] if reasons[CUDA] is None else [])
    return {
        "ext_modules": extensions,
        "cmdclass": {**commands, "build_ext": build_command(BuildExtension, reasons)},
    }


setuptools.setup(**build_arguments())
