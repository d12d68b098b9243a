"""Fused losses in code that is not to be changed."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from types import FunctionType, MethodType
from typing import Any, NamedTuple, TypeVar

from torch import nn

from ._registry import LIBRARIES, digest, known_name
from ._swap import Swap, Unfused, logger, swaps

T = TypeVar("T")

_PACKAGES = {known.package for known in LIBRARIES.values()}


class _Place(NamedTuple):
    """An attribute that was replaced."""

    holder: Any  # a class or a module
    attribute: str
    original: Any  # None: a class had inherited it
    replaced: Any


_patched: dict[str, list[_Place]] = {}


class Patch:
    """The swaps that `patch` made, a context manager that takes them back.

    Attributes:
        library: its name.
        swapped: the targets that this call swapped, empty where the library was patched before.
    """

    def __init__(self, library: str, swapped: list[str]) -> None:
        self.library, self.swapped = library, swapped

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.swapped:
            unpatch(self.library)

    def __repr__(self) -> str:
        return f"Patch({self.library!r}, swapped={self.swapped})"


def patch(name: str, *, verbose: bool = True) -> Patch:
    """Replace the losses of an imported or installed library, in place.

    Methods are replaced on the library's own classes: instances, subclasses and names that exist already run
    fused too, and signatures stay. Functions are replaced in every module of the library that holds them,
    not in modules that have imported them by name before.

    Args:
        name: one of `cl_kernels.integrations.LIBRARIES`, or the name of its distribution.
        verbose: whether to print what is swapped.

    Returns:
        A context manager that swaps back; as a call, until `unpatch`.

    Raises:
        ValueError: if there is no such library.
        ImportError: if it is not installed.
        RuntimeError: if its version, or the source of what would be replaced, is not one that was compared.

    Example:
        >>> import cl_kernels as clk
        >>> clk.patch("lightly")  # doctest: +SKIP
        cl_kernels serves lightly.loss.ntx_ent_loss:NTXentLoss.forward
    """
    name = known_name(name)
    known = LIBRARIES[name]
    fault = known.fault()
    if fault is not None:
        raise RuntimeError(f"{fault}; an adapter can be imported from cl_kernels.integrations.{name}")
    import_module(f".{name}", __package__)
    found = [swap for swap in swaps(name) if _there(swap)]
    if not found:
        raise ImportError(
            f"nothing of {name} is importable as {known.package}: its repository must be on sys.path; "
            "accelerate needs no import"
        )
    if name in _patched:
        if all(hasattr(getattr(swap.owner(), swap.attribute), "replaces") for swap in found):
            return Patch(name, [])
        unpatch(name)  # a module was loaded again
    for swap in found:
        original = swap.original()
        if not swap.is_theirs(original) or (swap.known and digest(original) not in swap.known):
            raise RuntimeError(f"{swap.target} has another source than the versions that were compared")
    _patched[name] = []
    try:
        for swap in found:
            _replace(swap, known.package, _patched[name])
    except BaseException:
        unpatch(name)
        raise
    targets = [swap.target for swap in found]
    if verbose:
        print(*(f"cl_kernels serves {target}" for target in targets), sep="\n")
    return Patch(name, targets)


def _replace(swap: Swap, package: str, undo: list[_Place]) -> None:
    owner, original = swap.owner(), swap.original()
    in_class = inspect.isclass(owner)
    replaced = swap.over(original, owner if in_class else None)
    places = [(owner, swap.attribute)] if in_class else _holders(package, original)
    for place, name in places:
        undo.append(_Place(place, name, vars(place).get(name), replaced))
        setattr(place, name, replaced)


def unpatch(name: str | None = None) -> None:
    """Swap back what `patch` swapped, in one library or (None) in all.

    Raises:
        ValueError: if there is no such library.

    Example:
        >>> import cl_kernels as clk
        >>> clk.unpatch()  # nothing is patched: nothing changes
    """
    for each in [known_name(name)] if name is not None else list(_patched):
        for place in reversed(_patched.pop(each, [])):
            if place.original is None:  # the class had inherited it
                delattr(place.holder, place.attribute)
                continue
            setattr(place.holder, place.attribute, place.original)
            for holder, attribute in _holders(LIBRARIES[each].package, place.replaced):  # imported since
                setattr(holder, attribute, place.original)


def accelerate(criterion: T) -> T:
    """The fused twin of a loss of a known library; the same object, and a logged reason, where there is none.

    Args:
        criterion: an instance of a loss class, or a loss function. A class is known by its name and library,
            or, if it belongs to a paper's repository, wherever it was copied to, by its source; a subclass of
            one's own is not. Losses inside of a library's wrappers are replaced too.

    Returns:
        A shallow copy, an instance of a subclass, to be used from now on: it shares parameters and buffers
        with the original.

    Example:
        >>> import torch, cl_kernels as clk
        >>> criterion = clk.accelerate(torch.nn.CrossEntropyLoss())  # not ours to replace: the same object
    """
    try:
        return _twin(criterion)
    except Unfused as reason:
        logger.warning("%s is left as it is: %s", _title(criterion), reason)
        return criterion


def _twin(criterion: Any) -> Any:
    kind: Any = criterion if isinstance(criterion, FunctionType) else type(criterion)
    if hasattr(kind, "replaces") or kind.__module__.startswith(f"{__package__}."):
        return criterion
    found = _swaps_of(kind)
    if found:
        if not isinstance(kind, type):
            return found[0].over(criterion)
        rebind = getattr(import_module(f".{found[0].library}", __package__), "rebind", None)
        for swap in found:
            if swap.attribute in vars(criterion) and rebind is None:
                raise Unfused(f"it has a {swap.attribute} of its own")
        twin = _copy(criterion)
        twin.__class__ = _fused_class(kind, tuple(found))
        if rebind is not None:
            rebind(twin)
        return twin if not isinstance(twin, nn.Module) else _with_children(twin) or twin
    if isinstance(criterion, nn.Module) and _root(kind) in _PACKAGES:
        twin = _with_children(_copy(criterion))
        if twin is not None:
            return twin
    if isinstance(criterion, type):
        raise Unfused("it is a class: an instance is wanted")
    raise Unfused(
        f"no adapter here knows {kind.__module__}.{kind.__qualname__}; of a model, give the criterion alone, "
        "of a compiled one what was compiled"
    )


def _copy(criterion: Any) -> Any:
    """A shallow copy with methods and dictionaries of its own: hooks, or a module put into it, stay there."""
    if getattr(criterion, "_compiled_call_impl", None) is not None:
        raise Unfused("it is compiled: accelerate it before")
    twin = copy.copy(criterion)
    for name, value in vars(criterion).items():
        if isinstance(value, MethodType) and value.__self__ is criterion:
            vars(twin)[name] = MethodType(value.__func__, twin)
        elif isinstance(value, dict):
            vars(twin)[name] = value.copy()
    return twin


def _with_children(module: nn.Module) -> nn.Module | None:
    """`module`, a copy, with fused losses for its own; None if it has no known ones."""
    fused: dict[str, nn.Module | None] = {}
    for name, child in module._modules.items():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            fused[name] = _with_children(_copy(child))
        elif child is not None and _root(type(child)) in _PACKAGES:
            with contextlib.suppress(Unfused):
                fused[name] = _twin(child)
    fused = {name: twin for name, twin in fused.items() if twin is not None}
    if not fused:
        return None
    module._modules = {**module._modules, **fused}
    return module


def _swaps_of(kind: Any) -> list[Swap]:
    """Those that replace a function, or methods of a class."""
    changed = False
    for name, known in LIBRARIES.items():
        copied = known.distribution is None
        if not copied and _root(kind) != known.package:
            continue
        try:
            fault = known.fault()
            import_module(f".{name}", __package__)
        except (ImportError, AttributeError) as error:  # what the adapter replaces is not there
            fault = str(error)
        if fault is not None:
            raise Unfused(fault)
        if copied:
            named = [swap for swap in swaps(name) if swap.subject == kind.__qualname__]
            mine = [swap for swap in named if _has_source(kind, swap)]
            changed = changed or bool(named)
        else:
            mine = [swap for swap in swaps(name) if _has(kind, swap)]
        if mine:
            return mine
    if changed:
        raise Unfused(f"its source is none of those of {kind.__qualname__} that were compared")
    return []


def _has(kind: Any, swap: Swap) -> bool:
    """Whether a function is what `swap` replaces, or a class has it, be it inherited."""
    if not isinstance(kind, type):
        return (kind.__module__, kind.__qualname__) == (swap.module, swap.qualname)
    owner, name = swap.owner(), swap.attribute
    return inspect.isclass(owner) and issubclass(kind, owner) and getattr(kind, name) is getattr(owner, name)


def _has_source(kind: Any, swap: Swap) -> bool:
    """Whether a function, or a class's method, has a known source, wherever it was copied to."""
    function: Any = kind if isinstance(kind, FunctionType) else getattr(kind, swap.attribute, None)
    try:
        return digest(function) in swap.known
    except (OSError, TypeError):  # defined where no source can be read
        return False


@functools.cache
def _fused_class(kind: type, found: tuple[Swap, ...]) -> type:
    """A subclass of `kind`: the adapter's own, if it is one."""
    adapter = getattr(import_module(f".{found[0].library}", __package__), kind.__name__, None)
    if inspect.isclass(adapter) and issubclass(adapter, kind) and adapter is not kind:
        return adapter
    methods = {swap.attribute: swap for swap in found}
    originals = {name: getattr(kind, name) for name in methods}
    body: dict[str, Any] = {
        name: swap.over(getattr(originals[name], "unfused", originals[name]), kind)
        for name, swap in methods.items()
    }
    body |= {"__module__": kind.__module__, "__doc__": kind.__doc__, "__reduce_ex__": _reduced}
    return type(kind.__name__, (kind,), body)


def _reduced(twin: Any, protocol: int) -> tuple[Any, ...]:
    """Pickle a twin of a class without an adapter, whose class has no name to be found by."""
    return _restored, (type(twin).__mro__[1], vars(twin))


def _restored(kind: Any, state: dict[str, Any]) -> Any:
    criterion = kind.__new__(kind)
    vars(criterion).update(state)
    return accelerate(criterion)


def _holders(package: str, function: Callable[..., Any]) -> list[tuple[Any, str]]:
    """The loaded modules of a library that have a function, and the name it has there."""
    return [
        (module, name)
        for path, module in list(sys.modules.items())
        if path.partition(".")[0] == package and module is not None
        for name, value in list(vars(module).items())
        if value is function
    ]


def _there(swap: Swap) -> bool:
    try:
        swap.original()
    except (ImportError, AttributeError):
        return False
    return True


def _root(kind: Any) -> str:
    return str(kind.__module__).partition(".")[0]


def _title(criterion: Any) -> str:
    return getattr(criterion, "__qualname__", type(criterion).__qualname__)
