"""Which libraries there are, and what their adapters replace."""

from __future__ import annotations

import hashlib
import inspect
import textwrap
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Any, NamedTuple

# The packages, as they are imported, whose losses a module here replaces.
LIBRARIES = {
    "pytorch_metric_learning": "pytorch_metric_learning",
    "lightly": "lightly",
    "sentence_transformers": "sentence_transformers",
    "open_clip": "open_clip",
    "solo_learn": "solo",
    "supcontrast": "losses",
    "selfcon": "losses",
    "eztorch": "eztorch",
    "dimcl": "solo",
    "swift": "swift",
}


# Those that are cloned rather than installed, and copied: their losses are known by their source.
REPOSITORIES = ("solo_learn", "supcontrast", "selfcon", "eztorch", "dimcl")


class Library(NamedTuple):
    """An adapter module's knowledge of its library, as its `LIBRARY`.

    `versions` are those of `distribution` that it was compared with; one of REPOSITORIES has neither.
    """

    name: str
    distribution: str | None = None
    versions: tuple[str, ...] = ()

    def unknown(self) -> str | None:
        """The fault of the version that is installed; None for one that is known."""
        if self.distribution is None:
            return None
        package = import_module(LIBRARIES[self.name])
        version = getattr(package, "__version__", None) or metadata.version(self.distribution)
        if version in self.versions:
            return None
        return f"{self.distribution} {version} is not one that was compared: {', '.join(self.versions)}"


def library(name: str) -> Library:
    """That of an adapter module, which is imported."""
    if name not in LIBRARIES:
        raise ValueError(f"library must be one of {', '.join(LIBRARIES)}, got {name!r}")
    found: Library = import_module(f".{name}", __package__).LIBRARY
    return found


def digest(function: Callable[..., Any]) -> str:
    """A short name for the source of a function, whatever its indentation and its module."""
    source = textwrap.dedent(inspect.getsource(function))
    text = "\n".join(line.rstrip() for line in source.splitlines() if line.strip())
    return hashlib.sha256(text.encode()).hexdigest()[:16]
