"""Comparisons: a loss of a library with some of its options, theirs and ours.

`tests/peers/<library>_cases.py` each have a function `cases`; the tests compare all of them, and
bench/adapters.py takes time and memory of those with `measured`.
"""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import cl_kernels

Loss = Callable[..., Tensor]
Inputs = Callable[[int, torch.dtype, torch.Generator], list[Tensor]]
ACCELERATED = ", accelerated"


@dataclass(frozen=True, eq=False)
class PeerCase:
    """A comparison.

    Attributes:
        loss: the name that `cl_kernels.integrations.calls` counts it by, "lightly.NTXentLoss".
        options: what tells it from the loss's other cases.
        theirs, ours: make the loss as a function of the inputs; called once for each comparison, so that
            memory banks begin alike.
        inputs: of a number of rows, a dtype and a generator; those that get a gradient require one.
        fused: False where ours must fall back to the library's own.
        rows: how many, where values are compared.
        close: the largest relative difference in float64 and float32, of loss and of gradient.
        measured: the rows at which time and memory are taken, None: not.
    """

    loss: str
    options: str
    theirs: Callable[[], Loss]
    ours: Callable[[], Loss]
    inputs: Inputs
    fused: bool = True
    rows: int = 24
    close: tuple[float, float] = (1e-12, 5e-6)
    measured: int | None = None

    @property
    def id(self) -> str:
        return f"{self.loss}[{self.options}]"

    def example(self, rows: int, dtype: torch.dtype) -> list[Tensor]:
        """Inputs that depend on the case and the number of rows alone."""
        return self.inputs(rows, dtype, torch.Generator().manual_seed(zlib.crc32(self.id.encode())))


def features(
    rows: int, width: int, dtype: torch.dtype, generator: torch.Generator, requires_grad: bool = True
) -> Tensor:
    """[rows, width] standard normal, the same numbers in every dtype."""
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(requires_grad)


def unit_views(*sizes: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rows of unit length, the same numbers in every dtype."""
    x = torch.randn(*sizes, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1).to(dtype).requires_grad_()


def classes(rows: int, generator: torch.Generator, count: int = 5) -> Tensor:
    """Labels, those of the first `count` rows twice at least."""
    labels = torch.randint(0, count, (rows,), generator=generator)
    labels[: 2 * count] = torch.arange(2 * count)[: len(labels)] % count
    return labels


def weights(kind: str, rows: int, generator: torch.Generator) -> Tensor:
    """A mask: "bool" of some others, with rows that have none; "weights" between 0 and 1, not symmetric."""
    chance = torch.rand(rows, rows, generator=generator, dtype=torch.float64)
    if kind == "weights":
        return chance
    mask = chance < 0.3
    mask[1] = False
    return mask


def with_queue(
    length: int,
    transposed: bool,
    frozen: bool,
    rows: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> list[Tensor]:
    """q, k of unit rows and a queue of `length` (0: as many as rows), [D, K] or [K, D]."""
    make = partial(unit_views, dtype=dtype, generator=generator)
    q, k, queue = make(rows, 128), make(rows, 128), make(length or rows, 128)
    queue = queue.detach().T.contiguous() if transposed else queue.detach()
    return [q, k.requires_grad_(not frozen), queue.requires_grad_(not frozen)]


def ways(original: Any, adapter: Any) -> dict[str, Any]:
    """Ours, by what a case's options say of the way to it: the adapter's function or class, and the
    original's, accelerated."""

    def accelerated(**options: Any) -> Any:
        return cl_kernels.accelerate(original(**options))

    twin = accelerated if isinstance(original, type) else cl_kernels.accelerate(original)
    return {"": adapter, ACCELERATED: twin}


def cases() -> list[PeerCase]:
    """All of the libraries that are here."""
    found: list[PeerCase] = []
    for path in sorted(Path(__file__).parent.glob("*_cases.py")):
        module: ModuleType = import_module(f"peers.{path.stem}")
        if all(importlib.util.find_spec(root) for root in module.NEEDS):
            found += module.cases()
    return found
