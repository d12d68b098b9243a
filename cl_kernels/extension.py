"""Loads the compiled CPU kernels, `cl_kernels._C`, if they were built and fit the running PyTorch.

Importing the extension registers its kernels for the ops of `ops.py`. Without it everything works through the
chunked reference, and one `ExtensionWarning` says so. `CL_KERNELS_NO_EXTENSION=1` leaves the extension out on
purpose, silently.
"""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType

import torch

from cl_kernels import ops

_BUILD_HINT = (
    "install cl_kernels with `pip install --no-build-isolation` into the environment that has this PyTorch, "
    "with a C++ compiler at hand"
)


class ExtensionWarning(RuntimeWarning):
    """The compiled extension is missing or does not fit, so losses on the CPU run slower than they could."""


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


def _load() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason why there is none."""
    if os.environ.get("CL_KERNELS_NO_EXTENSION", "") not in ("", "0"):
        return None, "the compiled extension is switched off by CL_KERNELS_NO_EXTENSION"
    name, running = f"{__package__}._C", torch.__version__
    try:
        extension = importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            reason = f"the compiled extension {name} was not built"
        else:
            reason = f"the compiled extension {name} does not load under torch {running} ({error})"
        _warn(f"{reason}: losses on the CPU run in plain PyTorch, with the same results but slower")
        return None, reason
    built = extension.build_info()["torch"]
    if _release(built) != _release(running):
        _warn(f"the compiled extension {name} was built against torch {built} and runs under torch {running}")
    return extension, ""


def _warn(message: str) -> None:
    warnings.warn(f"{message}. To get kernels that fit, {_BUILD_HINT}.", ExtensionWarning, stacklevel=2)


module, missing_because = _load()


def _has_cpu_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{ops.NAMESPACE}::{name}", "CPU")


compiled_ops: frozenset[str] = frozenset(filter(_has_cpu_kernel, ops.SCHEMAS))
"""The ops that the extension has a CPU kernel for."""


def is_loaded() -> bool:
    return module is not None


def build_info() -> dict[str, str]:
    """What the extension was built with and the instruction set in use; empty without an extension."""
    if module is None:
        return {}
    return {**module.build_info(), "cpu_capability": module.cpu_capability()}
