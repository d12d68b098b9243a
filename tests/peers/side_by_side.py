"""A library's loss beside ours on the same inputs: values, gradients, and whether ours ran fused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cl_kernels import integrations


def ran(name: str) -> integrations.Calls:
    """How often a loss has run fused, and how often as the library has it."""
    return integrations.calls().get(name, integrations.Calls(0, 0))


@contextmanager
def runs(name: str, fused: int = 0, fallback: int = 0) -> Iterator[None]:
    """Assert that a loss runs so often inside, fused and as the library has it."""
    before = ran(name)
    yield
    after = ran(name)
    assert (after.fused - before.fused, after.fallback - before.fallback) == (fused, fallback), name


def gradients(loss: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Those of all inputs that require one, in one row; 0 where none arrives."""
    wanted = [x for x in inputs if x.requires_grad]
    found = torch.autograd.grad(loss.sum(), wanted, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]
    return torch.cat([g.flatten() for g in filled])


def pair(theirs: Any, ours: Any, name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A loss of both modules, of the same random state."""
    made = []
    for module in (theirs, ours):
        torch.manual_seed(0)
        made.append(getattr(module, name)(**options))
    return made[0], made[1]


def assert_same_class(theirs: Any, ours: Any, name: str, **options: Any) -> None:
    """Assert that a class differs from the one that it replaces in how it computes alone."""
    kinds = [getattr(module, name) for module in (theirs, ours)]
    assert issubclass(kinds[1], kinds[0]) and kinds[1].__name__ == name
    for function in ("__init__", "forward"):
        names = [list(inspect.signature(getattr(kind, function)).parameters) for kind in kinds]
        assert names[0] == names[1]
    made = pair(theirs, ours, name, **options)
    assert made[0].state_dict().keys() == made[1].state_dict().keys()
    assert dict(made[0].named_buffers()).keys() == dict(made[1].named_buffers()).keys()


def both(
    theirs: Callable[..., Tensor], ours: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> tuple[float, float]:
    """The relative differences of loss and gradient, the latter in norm over all inputs that require one."""
    (loss, wanted), (own, found) = (_outcome(function, inputs) for function in (theirs, ours))
    assert own.dtype == loss.dtype and own.shape == loss.shape, (own.dtype, own.shape, loss.dtype, loss.shape)
    return _distance(own, loss), _distance(found, wanted)


def assert_same(
    theirs: Callable[..., Tensor],
    ours: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    name: str,
    fused: bool,
    close: float,
) -> None:
    """Assert that both give the same, ours by the fused path of `name` (or, `fused` False, by the library's).

    `theirs` must be the library's own function: an instance that no `patch` is on.
    """
    before = ran(name)
    loss, gradient = both(theirs, ours, inputs)
    after = ran(name)
    calls = (after.fused - before.fused, after.fallback - before.fallback)
    assert calls[0 if fused else 1] > 0 and calls[1 if fused else 0] == 0, (name, calls)
    assert loss <= close and gradient <= close, (loss, gradient)


def _outcome(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    loss = function(*leaves)
    return loss.detach(), gradients(loss, leaves)


def _distance(found: Tensor, wanted: Tensor) -> float:
    scale = max(float(wanted.double().norm()), 1e-12)
    return float((found.double() - wanted.double()).norm()) / scale
