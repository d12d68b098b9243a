"""The losses of other libraries, fused: `cl_kernels.integrations.<library>` has classes and functions under
the library's own names, `accelerate` and `patch` put them into code that is not to be changed.

A library's module is imported when it is used, and with it the library. docs/integrations has a page for
each.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from ._patch import Patch, accelerate, patch, unpatch
from ._registry import LIBRARIES
from ._swap import Calls, calls, served

__all__ = ["LIBRARIES", "Calls", "Patch", "accelerate", "calls", "patch", "served", "unpatch"]


def __getattr__(name: str) -> ModuleType:
    if name in LIBRARIES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *LIBRARIES])
