"""Builds the C++ extension `cl_kernels._C` beside the pure-Python package that pyproject.toml describes.

CL_KERNELS_SKIP_BUILD=1   do not compile: a pure-Python install, right on every input and slower
CL_KERNELS_FORCE_BUILD=1  a build that cannot be made is an error
neither                   compile where that works; otherwise print why not, and install pure Python
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext as SetuptoolsBuildExt

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"


def enabled(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


SKIP = enabled("CL_KERNELS_SKIP_BUILD")
FORCE = enabled("CL_KERNELS_FORCE_BUILD")


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
    """Why the extension cannot be built here, or None."""
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


def notice(reason: str) -> None:
    print(
        f"\ncl_kernels: installing WITHOUT compiled kernels: {reason}.\n"
        "cl_kernels: every loss stays right and keeps its memory bounded, but is slower.\n",
        file=sys.stderr,
        flush=True,
    )


def sources(*patterns: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in CSRC.rglob(pattern))


def extension():
    from torch.utils.cpp_extension import CppExtension

    # The instruction set is chosen at run time: csrc/cpu/isa_*.cpp raise their target, the rest is baseline.
    compile_args = ["-O3", "-g0", "-DNDEBUG", "-fvisibility=hidden"]
    link_args: list[str] = []
    if platform.system() == "Linux":
        compile_args.append("-fopenmp")
        # at::parallel_for must run on the OpenMP runtime that torch has loaded, or torch.set_num_threads does
        # not reach it. GCC's symbols resolve from libtorch_cpu's libgomp; clang needs a runtime of its own.
        if uses_clang():
            link_args.append("-fopenmp")
    return CppExtension(
        "cl_kernels._C",
        sources=sources("*.cpp"),
        include_dirs=[str(CSRC)],
        depends=sources("*.h", "*.inl"),
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


def build_command(base: type) -> type:
    """`base` (torch's BuildExtension) that falls back to pure Python where the compilation fails."""

    class BuildExt(base):
        def run(self) -> None:
            version = self.distribution.get_version()
            for ext in self.extensions:
                ext.define_macros.append(("CL_KERNELS_VERSION", f'"{version}"'))
            try:
                super().run()
            except Exception as error:
                if FORCE:
                    raise
                self.remove_stale()
                self.extensions = []
                self.distribution.ext_modules = []
                summary = str(error).strip().splitlines()[0]
                notice(f"the compilation failed ({summary}; the compiler's output is above)")

        def remove_stale(self) -> None:
            """An extension of an earlier build must not outlive a failed one."""
            for package in (ROOT / "cl_kernels", Path(self.build_lib) / "cl_kernels"):
                for path in (*package.glob("_C*.so"), *package.glob("_C*.pyd")):
                    path.unlink()

    return BuildExt


def build_arguments() -> dict[str, object]:
    if SKIP and FORCE:
        raise SystemExit("cl_kernels: CL_KERNELS_SKIP_BUILD and CL_KERNELS_FORCE_BUILD contradict each other")
    reason = "CL_KERNELS_SKIP_BUILD is set" if SKIP else obstacle()
    if reason is None:
        from torch.utils.cpp_extension import BuildExtension

        return {"ext_modules": [extension()], "cmdclass": {"build_ext": build_command(BuildExtension)}}
    if FORCE:
        raise SystemExit(f"cl_kernels: CL_KERNELS_FORCE_BUILD is set, but {reason}")
    if any(
        command in sys.argv
        for command in ("bdist_wheel", "editable_wheel", "build_ext", "install", "develop")
    ):
        notice(reason)
    return {"cmdclass": {"build_ext": SetuptoolsBuildExt}}


setup(**build_arguments())
