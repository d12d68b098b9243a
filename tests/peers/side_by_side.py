"""A library's loss beside ours on the same inputs: values, gradients, and whether ours ran fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cl_kernels import integrations


def both(
    theirs: Callable[..., Tensor], ours: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> tuple[float, float]:
    """The relative differences of loss and gradient, the latter in norm over all inputs that require one."""
    found = [_outcome(function, inputs) for function in (theirs, ours)]
    (loss, gradients), (own, own_gradients) = found
    assert own.dtype == loss.dtype and own.shape == loss.shape, (own.dtype, own.shape, loss.dtype, loss.shape)
    return _distance(own, loss), _distance(own_gradients, gradients)


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
    before = integrations.calls().get(name, integrations.Calls(0, 0))
    loss, gradient = both(theirs, ours, inputs)
    after = integrations.calls()[name]
    ran = (after.fused - before.fused, after.fallback - before.fallback)
    assert ran[0 if fused else 1] > 0 and ran[1 if fused else 0] == 0, (name, ran)
    assert loss <= close and gradient <= close, (loss, gradient)


def _outcome(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    loss = function(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    gradients = torch.autograd.grad(loss.sum(), wanted, allow_unused=True)
    flat = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients, strict=True)]
    return loss.detach(), torch.cat([g.flatten() for g in flat])


def _distance(found: Tensor, wanted: Tensor) -> float:
    scale = max(float(wanted.double().norm()), 1e-12)
    return float((found.double() - wanted.double()).norm()) / scale
