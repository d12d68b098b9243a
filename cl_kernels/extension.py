"""Loads the compiled kernels, `cl_kernels._C` for the CPU and `cl_kernels._cuda` for GPUs, if they were built
and fit the running PyTorch.

Importing an extension registers its kernels for the ops of `ops.py`. Without the CPU's everything works there
through the chunked reference, and one `ExtensionWarning` says so. The GPU's are looked for where PyTorch has
CUDA, and missed only where Triton is not there either. `CL_KERNELS_NO_EXTENSION=1` leaves both out on
purpose, silently.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch

from . import build_record, cuda_build, ops

_BUILD_HINT = (
    "install cl_kernels with `pip install --no-build-isolation` into the environment that has this PyTorch, "
    "with a C++ compiler at hand"
)
_ROOT = Path(__file__).resolve().parents[1]  # of a source checkout


class ExtensionWarning(RuntimeWarning):
    """A compiled extension is missing or does not fit, so losses run slower than they could."""


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


def _is_built(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _switched_off() -> bool:
    return os.environ.get("CL_KERNELS_NO_EXTENSION", "") not in ("", "0")


def _load(name: str) -> tuple[ModuleType | None, str]:
    """An extension, or None and the reason why there is none."""
    if _switched_off():
        return None, "the compiled extension is switched off by CL_KERNELS_NO_EXTENSION"
    if not _is_built(name):
        reason = build_record.reason(Path(__file__).parent, name)
        if reason is None and _is_source_checkout():
            reason = f"nothing was compiled in the checkout {_ROOT}"
        because = f", because {reason}" if reason else ""
        return None, f"the compiled extension {name} was not built{because}"
    try:
        extension = importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        reason = f"the compiled extension {name} does not load under torch {torch.__version__} ({error})"
        return None, reason
    built, running = extension.build_info()["torch"], torch.__version__
    if _release(built) != _release(running):
        _warn(f"the compiled extension {name} was built against torch {built} and runs under torch {running}")
    return extension, ""


def _is_source_checkout() -> bool:
    return (_ROOT / "setup.py").exists() and bool(cuda_build.sources(_ROOT, ".cu"))


def _warn(message: str) -> None:
    warnings.warn(f"{message}. To get kernels that fit, {_BUILD_HINT}.", ExtensionWarning, stacklevel=2)


class Extension:
    """A compiled extension: its module, or why there is none, and the ops that it has kernels for."""

    def __init__(self, name: str, namespace: str, key: str) -> None:
        self.name, self.namespace, self.key = f"{__package__}.{name}", namespace, key
        self.module, self.missing_because = self._loaded()
        self.ops = self._with_kernel(key)

    def _loaded(self) -> tuple[ModuleType | None, str]:
        module, reason = _load(self.name)
        if module is None and not _switched_off():
            _warn(f"{reason}: losses on the CPU run in plain PyTorch, with the same results but slower")
        return module, reason

    def _with_kernel(self, key: str) -> frozenset[str]:
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        return frozenset(name for name in ops.SCHEMAS if has(f"{self.namespace}::{name}", key))

    def build_info(self) -> dict[str, str]:
        """Compiler and torch of the build, and the instruction set in use; empty without a module."""
        if self.module is None:
            return {}
        in_use = getattr(self.module, "cpu_capability", None)
        return {**self.module.build_info(), **({"cpu_capability": in_use()} if in_use else {})}


class CudaExtension(Extension):
    """The GPU's, which a source checkout compiles when it is first required."""

    def __init__(self, name: str, namespace: str, key: str) -> None:
        super().__init__(name, namespace, key)
        self.emulated_ops = self._with_kernel("CPU")
        """The ops whose kernels run on CPU tensors, by the tests' emulator."""
        self._unsuited: dict[int, str | None] = {}
        self._required = False

    def _loaded(self) -> tuple[ModuleType | None, str]:
        if torch.version.cuda is None:
            return None, f"torch {torch.__version__} has no CUDA"
        module, reason = _load(self.name)
        if torch.cuda.is_available() and not _switched_off():
            if module is None and _is_built(self.name):
                _warn(f"{reason}: the backend 'cuda' is not there")
            if not ops.has_triton():
                slower = "losses on the GPU run in plain PyTorch, with the same results but slower"
                warnings.warn(f"triton is not installed: {slower}", ExtensionWarning, stacklevel=2)
        return module, reason

    def unsuited(self, index: int) -> str | None:
        """Why the kernels as compiled do not run on this GPU, or None."""
        if index not in self._unsuited:
            compiled = self.build_info()["architectures"].split(",")
            self._unsuited[index] = _unsuited(torch.cuda.get_device_capability(index), compiled)
        return self._unsuited[index]

    def require(self) -> None:
        """Make the kernels ready as far as they can be: compile those of a source checkout where they were
        not built, and look at the GPUs here, before a compiled graph asks about them."""
        if not self._required:
            self._required = True
            if _is_source_checkout() and torch.version.cuda is not None and self.module is None:
                self.module, self.missing_because = self._compiled_where_possible()
        self.ops, self.emulated_ops = self._with_kernel(self.key), self._with_kernel("CPU")
        if self.module is not None:
            for index in range(torch.cuda.device_count()):
                self.unsuited(index)

    def _compiled_where_possible(self) -> tuple[ModuleType | None, str]:
        reason = self.missing_because
        if _switched_off() or _is_built(self.name):
            return None, reason
        cuda_build.name_toolkit()
        obstacle = cuda_build.obstacle(_ROOT)
        if obstacle is None and not torch.cuda.is_available():
            obstacle = "there is no GPU"
        if obstacle is not None:
            return None, f"{reason}, and is not compiled now: {obstacle}"
        try:
            return _compile(), ""
        except (ImportError, OSError, RuntimeError) as error:
            return None, f"{reason}, and its compilation failed ({error})"


def _unsuited(capability: tuple[int, int], compiled: list[str]) -> str | None:
    """Why kernels compiled for these architectures do not run on a GPU of this capability, or None."""
    here = "sm_{}{}".format(*capability)
    if capability < cuda_build.LEAST:
        return "takes GPUs from sm_{}{} on, not {}".format(*cuda_build.LEAST, here)
    if not cuda_build.runs_on(compiled, capability):
        return f"compiled for {', '.join(compiled)}, not for this GPU, {here}"
    return None


def _compile() -> ModuleType:
    """The CUDA kernels of this source checkout, by ninja, which compiles what has changed since last time."""
    from torch.utils import cpp_extension

    compiled = cuda_build.wanted()
    flags = cuda_build.flags(compiled)
    print(
        f"cl_kernels: compiling the CUDA kernels of {_ROOT} for {', '.join(compiled)}, which takes minutes "
        "the first time (`python setup.py build_ext --inplace` does it once and for all)",
        file=sys.stderr,
        flush=True,
    )
    return cpp_extension.load(
        "cl_kernels_cuda",
        [str(path) for path in cuda_build.sources(_ROOT, ".cpp", ".cu")],
        extra_cflags=flags["cxx"],
        extra_cuda_cflags=flags["nvcc"],
        extra_include_paths=[str(folder) for folder in cuda_build.include_folders(_ROOT)],
    )


cpu = Extension("_C", ops.NAMESPACE, "CPU")
cuda = CudaExtension("_cuda", ops.CUDA_NAMESPACE, "CUDA")
