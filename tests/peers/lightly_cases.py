"""lightly's losses over two views."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peers.cases import Loss, PeerCase, features
from torch import Tensor, nn

NEEDS = ("lightly",)

WIDTH, WIDE = 16, 128
BANK = (40, WIDTH)
TEMPERATURES = {"0.5": 0.5, "0.07": 0.07, "-1": -1.0, "7": 7.0}


def cases() -> list[PeerCase]:
    return _nt_xent() + _bank() + _dcl() + _macl()


def _nt_xent() -> list[PeerCase]:
    found = [
        _case("NTXentLoss", f"temperature={name}", {"temperature": temperature})
        for name, temperature in TEMPERATURES.items()
    ]
    found += [
        _case("NTXentLoss", options, arguments, **how)
        for options, arguments, how in (
            ("defaults", {}, {"width": WIDE, "measured": 4096}),
            ("one pair", {}, {"rows": 1}),
            ("gather_distributed in one process", {"gather_distributed": True}, {}),
            ("rows of many lengths", {}, {"views": _uneven_views}),
            ("a row of zeros", {}, {"views": _views_with_zeros}),
            ("gradient to the first view", {}, {"views": partial(_views, needs=(True, False))}),
            ("gradient to the second view", {}, {"views": partial(_views, needs=(False, True))}),
            ("converged", {"temperature": 0.1}, {"views": _close_views}),
            ("transposed inputs", {}, {"views": _transposed_views}),
        )
    ]
    found += [
        _case("NTXentLoss", "learnt temperature", {}, views=_learnt, learnt=True),
        _case("DirectCLRLoss", "defaults", {}, width=WIDE, measured=4096),
        _case("DirectCLRLoss", "loss_dim=5", {"loss_dim": 5, "temperature": 0.2}),
        _case("DirectCLRLoss", "maps", {"loss_dim": 6}, views=_maps),
    ]
    return found


def _bank() -> list[PeerCase]:
    memory: dict[str, Any] = {"memory_bank_size": BANK}
    first, second = (partial(_views, needs=needs) for needs in ((True, False), (False, True)))
    found = [
        _case("NTXentLoss", f"memory bank, temperature={name}", {**memory, "temperature": temperature})
        for name, temperature in TEMPERATURES.items()
    ]
    return [
        *found,
        _case("NTXentLoss", "memory bank, second step", memory, steps=2),
        _case("NTXentLoss", "memory bank, wraps around", memory, steps=4),
        _case("NTXentLoss", "memory bank smaller than the batch", {"memory_bank_size": (5, WIDTH)}, steps=2),
        _case("NTXentLoss", "memory bank as a list", {"memory_bank_size": [7, WIDTH]}),
        _case("NTXentLoss", "memory bank, one row", memory, rows=1, steps=2),
        _case("NTXentLoss", "memory bank, learnt temperature", memory, views=_learnt, learnt=True),
        _case("NTXentLoss", "memory bank, frozen keys", memory, views=first),
        _case("NTXentLoss", "memory bank, not updated", memory, views=second, steps=2),
        _case("NTXentLoss", "memory bank of 65536", {"memory_bank_size": (65536, WIDE)}, width=WIDE,
              views=first, rows=4, measured=4096),
        _case("DirectCLRLoss", "memory bank", {"memory_bank_size": (9, 5), "loss_dim": 5}, steps=2),
    ]  # fmt: skip


def _dcl() -> list[PeerCase]:
    found = []
    for loss in ("DCLLoss", "DCLWLoss"):
        found += [
            _case(loss, "defaults", {}, width=WIDE, measured=4096),
            *(
                _case(loss, f"temperature={name}", {"temperature": value})
                for name, value in TEMPERATURES.items()
            ),
            _case(loss, "gather_distributed in one process", {"gather_distributed": True}),
            _case(loss, "two pairs", {}, rows=2),
            _case(loss, "rows of many lengths", {}, views=_uneven_views),
            _case(loss, "a row of zeros", {}, views=_views_with_zeros),
            _case(loss, "gradient to the second view", {}, views=partial(_views, needs=(False, True))),
            _case(loss, "learnt temperature", {}, views=_learnt, learnt=True),
        ]
    return [
        *found,
        *(_case("DCLWLoss", f"sigma={sigma}", {"sigma": sigma}) for sigma in (0.1, 1.0, 3)),
        _case("DCLLoss", "differentiated weights", {"weight_fn": _squared_distance}),
        _case("DCLLoss", "weights as a column", {"weight_fn": _column}),
        _case("DCLLoss", "one weight", {"weight_fn": lambda out0, out1: 0.7}),
        _case("DCLLoss", "weights that know the way", {"weight_fn": lambda out0, out1: 1 + out0[:, 0] ** 2}),
    ]


def _macl() -> list[PeerCase]:
    return [
        _case("MACLLoss", "defaults", {}, width=WIDE, measured=4096),
        _case("MACLLoss", "alpha=0", {"alpha": 0.0}),
        _case("MACLLoss", "all options", {"alpha": 1.0, "A_0": 0.3, "temperature": 0.4}),
        _case("MACLLoss", "one pair", {}, rows=1),
        _case("MACLLoss", "rows of many lengths", {}, views=_uneven_views),
        _case("MACLLoss", "a row of zeros", {}, views=_views_with_zeros),
        _case("MACLLoss", "gradient to the first view", {}, views=partial(_views, needs=(True, False))),
        _case("MACLLoss", "learnt temperature", {}, views=_learnt, learnt=True),
    ]  # fmt: skip


def _case(
    loss: str,
    options: str,
    arguments: dict[str, Any],
    *,
    views: Callable[..., list[Tensor]] | None = None,
    width: int = WIDTH,
    steps: int = 1,
    learnt: bool = False,
    **how: Any,
) -> PeerCase:
    from lightly import loss as theirs

    from cl_kernels.integrations import lightly as ours

    made = [
        partial(_loss, getattr(place, loss), arguments, steps, learnt, place is ours)
        for place in (theirs, ours)
    ]
    return PeerCase(f"lightly.{loss}", options, *made, inputs=partial(views or _views, width), **how)


def _loss(kind: type[nn.Module], arguments: dict[str, Any], steps: int, learnt: bool, ours: bool) -> Loss:
    """The loss of the last step; memory banks begin with the same rows, in the dtype of the views."""
    torch.manual_seed(0)
    criterion = kind(**copy.deepcopy(arguments))

    def loss(x: Tensor, y: Tensor, *temperature: Tensor) -> Tensor:
        if learnt:
            (criterion.temperature,) = temperature
        criterion.to(x.dtype)
        for _ in range(steps - 1):
            criterion(x, y)
            x, y = y * 0.5 + x, y
        return criterion(x, y)

    return loss


def _views(
    width: int,
    rows: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    needs: tuple[bool, ...] = (True, True),
) -> list[Tensor]:
    return [features(rows, width, dtype, generator, needed) for needed in needs]


def _learnt(width: int, rows: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    temperature = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    return [*_views(width, rows, dtype, generator), temperature]


def _uneven_views(width: int, rows: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Rows of lengths from 0.1 to 10."""
    lengths = torch.logspace(-1, 1, rows, dtype=torch.float64).to(dtype)[:, None]
    views = _views(width, rows, dtype, generator)
    return [(x.detach() * lengths).requires_grad_() for x in views]


def _views_with_zeros(width: int, rows: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """One row of zeros, whose gradient is what torch.nn.functional.normalize makes of it."""
    first, second = (x.detach() for x in _views(width, rows, dtype, generator))
    first[-1] = 0
    return [first.requires_grad_(), second.requires_grad_()]


def _close_views(width: int, rows: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Positives at a cosine of about 0.99."""
    first, noise = (x.detach() for x in _views(width, rows, dtype, generator))
    return [first.requires_grad_(), (first + 0.1 * noise).detach().requires_grad_()]


def _transposed_views(width: int, rows: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    return [features(width, rows, dtype, generator, False).T.requires_grad_() for _ in range(2)]


def _maps(width: int, rows: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    return [
        x.detach().view(rows, width // 4, 2, 2).requires_grad_()
        for x in _views(width, rows, dtype, generator)
    ]


def _squared_distance(out0: Tensor, out1: Tensor) -> Tensor:
    return torch.sum((out0 - out1) ** 2, dim=1)


def _column(out0: Tensor, out1: Tensor) -> Tensor:
    return torch.sum(out0 * out1, dim=1, keepdim=True)
