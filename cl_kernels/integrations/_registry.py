"""The libraries whose losses are replaced, and how their functions are known."""

from __future__ import annotations

import hashlib
import inspect
import textwrap
from collections.abc import Callable
from importlib import import_module, metadata
from types import ModuleType
from typing import Any, NamedTuple


class Library(NamedTuple):
    """A library, and the versions of its distribution that its adapter was compared with.

    A paper's repository has no distribution: it is cloned, or copied, and its losses are known by their
    source.
    """

    package: str  # as it is imported
    distribution: str | None = None
    versions: tuple[str, ...] = ()

    def fault(self) -> str | None:
        """A sentence on the version that is installed; None for one that was compared."""
        if self.distribution is None:
            return None
        found = import_module(self.package)
        version = getattr(found, "__version__", None) or metadata.version(self.distribution)
        if version in self.versions:
            return None
        return f"{self.distribution} {version} is not one that was compared: {', '.join(self.versions)}"


LIBRARIES = {
    "pytorch_metric_learning": Library(
        "pytorch_metric_learning", "pytorch-metric-learning", ("2.8.1", "2.9.0")
    ),
    "lightly": Library("lightly", "lightly", ("1.5.26", "1.6.0")),
    "sentence_transformers": Library("sentence_transformers", "sentence-transformers", ("6.2.0",)),
    "open_clip": Library("open_clip", "open_clip_torch", ("3.3.0", "4.2.0.dev0")),
    "solo_learn": Library("solo"),
    "supcontrast": Library("losses"),
    "selfcon": Library("losses"),
    "eztorch": Library("eztorch"),
    "dimcl": Library("solo"),
    "swift": Library("swift", "ms-swift", ("4.6.0",)),
}


def known_name(name: str) -> str:
    """The name of a library here, from that or from the name of its distribution.

    Raises:
        ValueError: if there is none.
    """
    for key, known in LIBRARIES.items():
        if name in (key, known.distribution):
            return key
    raise ValueError(f"library must be one of {', '.join(LIBRARIES)}, got {name!r}")


def passed_on(library: ModuleType) -> Callable[[str], Any]:
    """A module's `__getattr__` that gives the library's own names, so that a line may import both kinds."""

    def look_up(name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(library, name)

    return look_up


def digest(function: Callable[..., Any]) -> str:
    """A short name for the source of a function, whatever its indentation and its module."""
    source = textwrap.dedent(inspect.getsource(function))
    text = "\n".join(line.rstrip() for line in source.splitlines() if line.strip())
    return hashlib.sha256(text.encode()).hexdigest()[:16]
