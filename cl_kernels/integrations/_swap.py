"""A function of a library and what replaces it: fused where it can be, else the library's own."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

import torch

R = TypeVar("R")
Function = TypeVar("Function", bound=Callable[..., Any])

logger = logging.getLogger("cl_kernels.integrations")


class Unfused(Exception):
    """A call that an adapter cannot fuse, raised before anything has changed; the text says why."""


class Calls(NamedTuple):
    """How often a replaced function ran fused, and how often as the library has it."""

    fused: int
    fallback: int


_fused: Counter[str] = Counter()
_fallback: Counter[str] = Counter()
_said: set[tuple[str, str]] = set()


def calls() -> dict[str, Calls]:
    """How often each replaced function ran in this process, by name; what compiled graphs run is not seen."""
    return {name: Calls(_fused[name], _fallback[name]) for name in sorted({*_fused, *_fallback})}


class Swap:
    """A target, "module:Class.method" or "module:function", and the function that replaces it.

    Attributes:
        library: the name of the adapter module.
        target: as above.
        ours: takes the target's arguments, and raises `Unfused` before it changes anything.
        relies_on: other methods whose work `ours` does: a subclass that overrides one is not fused.
        known: digests of the target's source, for libraries without versions.
    """

    def __init__(
        self, target: str, ours: Callable[..., Any], relies_on: Sequence[str], known: Sequence[str]
    ) -> None:
        self.library = ours.__module__.rpartition(".")[2]
        self.target, self.ours, self.relies_on, self.known = target, ours, relies_on, known
        self.module, _, self.qualname = target.partition(":")
        self.attribute = self.qualname.rpartition(".")[2]

    @property
    def name(self) -> str:
        """The library and the class or function, as `calls` and messages call it."""
        return f"{self.library}.{self.qualname.partition('.')[0]}"

    def owner(self) -> Any:
        """The class or the module that holds the target; the library is imported."""
        found: Any = sys.modules.get(self.module) or import_module(self.module)  # no graph has an import
        for part in self.qualname.split(".")[:-1]:
            found = getattr(found, part)
        return found

    def original(self) -> Callable[..., Any]:
        """The library's own function, also where it is patched."""
        found = getattr(self.owner(), self.attribute)
        return getattr(found, "unfused", found)

    def over(self, original: Callable[..., Any] | None = None, owner: type | None = None) -> Any:
        """A function that calls `ours`, and where that does not serve `original`; None: found when needed.

        `owner` is the class whose method is replaced.
        """

        @functools.wraps(original or self.ours)
        def call(*args: Any, **options: Any) -> Any:
            try:
                if self.relies_on:
                    self._refuse_overridden(type(args[0]), owner)
                result = self.ours(*args, **options)
            except (Unfused, TypeError, ValueError) as error:  # wrong arguments get the library's own error
                reason = error
            else:
                _count(_fused, self.name)
                return result
            own = original or self._instead_of(reason)
            _count(_fallback, self.name)
            self._say(str(reason))
            return own(*args, **options)

        call.replaces = self.target  # type: ignore[attr-defined]
        if original is not None:
            call.unfused = original  # type: ignore[attr-defined]
        return call

    def _instead_of(self, reason: Exception) -> Callable[..., Any]:
        """The original, to be called for `reason`, which is raised where the library is not importable."""
        try:
            return self.original()
        except (ImportError, AttributeError):
            if isinstance(reason, Unfused):
                missing = f"{self.name} runs only as {self.target} here, which is not importable: {reason}"
                raise NotImplementedError(missing) from None
            raise reason from None

    def _refuse_overridden(self, found: type, owner: type | None) -> None:
        owner = owner or self.owner()
        for name in self.relies_on:
            method = getattr(found, name)
            if method is not getattr(owner, name) and not hasattr(method, "replaces"):
                raise Unfused(f"{found.__qualname__} has a {name} of its own")

    def _say(self, reason: str) -> None:
        if torch.compiler.is_compiling() or (self.name, reason) in _said:
            return
        _said.add((self.name, reason))
        logger.warning("%s runs as the library has it: %s", self.name, reason)


SWAPS: dict[str, Swap] = {}


def fused(
    target: str, *, relies_on: Sequence[str] = (), known: Sequence[str] = ()
) -> Callable[[Function], Function]:
    """Make a function that replaces `target`; the arguments are those of `Swap`."""

    def decorate(ours: Function) -> Function:
        SWAPS[target] = swap = Swap(target, ours, relies_on, known)
        replaced: Function = swap.over()
        return replaced

    return decorate


def swaps(library: str) -> list[Swap]:
    """Those of a library whose adapter module is imported."""
    return [swap for swap in SWAPS.values() if swap.library == library]


def served(library: str, target: str) -> Callable[[Function], Function]:
    """A hook for libraries: decorate the function that `target` names, and it runs fused if CL_KERNELS_SERVE
    says so.

    Args:
        library: the name of its module here.
        target: "module:Class.method" or "module:function", one that the module replaces.

    CL_KERNELS_SERVE is read at the first call: "1" or "all" for every library, or names with commas between.
    The library keeps its signature, its subclasses and, where a call cannot be fused, its own code.
    docs/upstream.md has the patch for each.
    """

    def decorate(original: Function) -> Function:
        @functools.cache
        def chosen() -> Callable[..., Any]:
            asked = os.environ.get("CL_KERNELS_SERVE", "").replace(" ", "").split(",")
            if not {"1", "all", library} & set(asked):
                return original
            import_module(f".{library}", __package__)
            if target not in SWAPS:
                logger.warning("nothing here replaces %s", target)
                return original
            replaced: Callable[..., Any] = SWAPS[target].over(original)
            return replaced

        @functools.wraps(original)
        def call(*args: Any, **options: Any) -> Any:
            return chosen()(*args, **options)

        call.unfused = original  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def _count(counter: Counter[str], name: str) -> None:
    if not torch.compiler.is_compiling():
        counter[name] += 1
