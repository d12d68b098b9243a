"""Comparisons: a loss of a library with some of its options, theirs and ours.

`tests/peers/<library>_cases.py` each have a function `cases`; the tests compare all of them, and
bench/adapters.py takes time and memory of those with `measured`.
"""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

Loss = Callable[..., Tensor]


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
    inputs: Callable[[int, torch.dtype, torch.Generator], list[Tensor]]
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


def cases() -> list[PeerCase]:
    """All of the libraries that are here."""
    found: list[PeerCase] = []
    for path in sorted(Path(__file__).parent.glob("*_cases.py")):
        module: ModuleType = import_module(f"peers.{path.stem}")
        if all(importlib.util.find_spec(root) for root in module.NEEDS):
            found += module.cases()
    return found
