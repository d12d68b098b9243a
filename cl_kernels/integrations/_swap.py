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
from torch.autograd import forward_ad

from .. import validation
from ._registry import LIBRARIES

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
        self.subject = self.qualname.partition(".")[0]  # the class or the function
        self.attribute = self.qualname.rpartition(".")[2]

    @property
    def name(self) -> str:
        """The library and the class or function, as `calls` and messages call it."""
        return f"{self.library}.{self.subject}"

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

        `owner` is the class whose method is replaced; where it has inherited it, a class that comes between
        the two in a subclass keeps its say.
        """
        inherited = owner is not None and self.attribute not in vars(owner)

        @functools.wraps(original or self.ours)
        def call(*args: Any, **options: Any) -> Any:
            if inherited and args:
                following = getattr(super(owner, args[0]), self.attribute)
                if getattr(following, "unfused", following.__func__) is not original:
                    return following(*args[1:], **options)
            error: Exception | None = None
            try:
                self._refuse(args, owner)
                result = self.ours(*args, **options)
            except Unfused as refusal:
                reason = str(refusal)
            except (TypeError, ValueError) as refusal:
                if not _of_arguments(refusal):
                    raise
                reason, error = str(refusal), refusal.with_traceback(None)  # which would hold the arguments
            else:
                _count(_fused, self.name)
                return result
            result = (original or self._instead_of(reason, error))(*args, **options)
            _count(_fallback, self.name)  # not for arguments that the library does not take either
            self._say(reason)
            return result

        call.replaces = self.target  # type: ignore[attr-defined]
        if original is not None:
            call.unfused = original  # type: ignore[attr-defined]
        return call

    def _instead_of(self, reason: str, error: Exception | None) -> Callable[..., Any]:
        """The original; where the library is not importable, what went wrong is raised."""
        try:
            return self.original()
        except (ImportError, AttributeError):
            missing = f"{self.name} runs only as {self.target} here, which is not importable: {reason}"
            raise error or NotImplementedError(missing) from None

    def _refuse(self, args: Sequence[Any], owner: type | None) -> None:
        """Refuse what no adapter does, and methods that are not the library's."""
        if forward_ad._current_level >= 0:
            raise Unfused("derivatives in forward mode are not fused")
        if not self.relies_on or not args:
            return
        owner, kind = owner or self.owner(), type(args[0])
        for name in self.relies_on:
            method, theirs = getattr(kind, name), getattr(owner, name)
            replaced = method is not theirs and not hasattr(method, "replaces")
            if replaced or name in vars(args[0]) or not self.is_theirs(theirs):
                raise Unfused(f"{kind.__qualname__} has a {name} of its own")

    def is_theirs(self, function: Any) -> bool:
        """Whether a function is the library's, and not somebody's in its place."""
        if torch.compiler.is_compiling() or hasattr(function, "replaces"):
            return True
        package = sys.modules.get(self.module.partition(".")[0])
        file = getattr(package, "__file__", None)
        code = getattr(function, "__code__", None)
        return file is None or code is None or code.co_filename.startswith(os.path.dirname(file))

    def _say(self, reason: str) -> None:
        kind = (self.name, "".join(c for c in reason if not c.isdigit()))  # not once for each shape
        if torch.compiler.is_compiling() or kind in _said:
            return
        _said.add(kind)
        logger.warning("%s runs as the library has it: %s", self.name, reason)


def _of_arguments(error: Exception) -> bool:
    """Whether an error is of the check of an argument, or of the call itself, when nothing has run yet.

    Others are raised by the library's code, by the user's or by a fault of ours, and are not hidden.
    """
    trace = error.__traceback__
    if trace is None or trace.tb_next is None:
        return True
    while trace.tb_next is not None:
        trace = trace.tb_next
    where = trace.tb_frame.f_globals.get("__name__", "")
    return bool(where == validation.__name__ or where.startswith(f"{__package__}."))


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
        chosen: list[Callable[..., Any]] = []

        @functools.wraps(original)
        def call(*args: Any, **options: Any) -> Any:
            if not chosen:
                chosen.append(_served(library, target, original))
            return chosen[0](*args, **options)

        call.unfused = original  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def _served(library: str, target: str, original: Callable[..., Any]) -> Callable[..., Any]:
    asked = os.environ.get("CL_KERNELS_SERVE", "").replace(" ", "").split(",")
    unknown = set(asked) - {"", "0", "1", "all", *LIBRARIES}
    if unknown:
        logger.warning(
            "CL_KERNELS_SERVE takes 1, all or %s, got %s", ", ".join(LIBRARIES), ", ".join(unknown)
        )
    if not {"1", "all", library} & set(asked):
        return original
    try:
        import_module(f".{library}", __package__)
        replaced: Callable[..., Any] = SWAPS[target].over(original)
    except (ImportError, AttributeError, KeyError) as error:  # another version than the adapter knows
        logger.warning("%s runs as the library has it: nothing here replaces it: %r", target, error)
        return original
    return replaced


def _count(counter: Counter[str], name: str) -> None:
    if not torch.compiler.is_compiling():
        counter[name] += 1
