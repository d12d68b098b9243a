"""The launches of a step of a loss on a GPU, listed without one: `python bench/launches.py [LOSS ...]`.

Triton's kernels run under its interpreter, and every other operation is one of PyTorch's, recorded as the
dispatcher sees it. Views, memory and numbers on the host launch nothing. Sizes are small: what a loss
launches depends on them only where a document says so.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import interpreter
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

import cl_kernels as clk
from cl_kernels.bench.workloads import Workload

ON_THE_HOST = {"scalar_tensor", "_local_scalar_dense", "detach", "promote_types", "_unsafe_view"}
LOSSES = ("supcon", "nt_xent", "clip", "info_nce", "sce", "dimcl")


class Recorder(TorchDispatchMode):
    """The launches since it was entered, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not (func.is_view or name in ON_THE_HOST or name.startswith(("empty", "new_empty"))):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The launches inside, PyTorch's and Triton's, in order."""
    run = GridExecutor.__call__
    with Recorder() as recorder:

        def launch(self: Any, *args: Any, **options: Any) -> Any:
            recorder.names.append(f"{self.fn.__name__.strip('_')} (Triton)")
            with torch.utils._python_dispatch._disable_current_modes():
                return run(self, *args, **options)

        GridExecutor.__call__ = launch
        try:
            yield recorder.names
        finally:
            GridExecutor.__call__ = run


def launches(step: Callable[[], torch.Tensor]) -> tuple[list[str], list[str]]:
    """Those of the forward and of the backward of a loss by Triton's kernels, without the backward's seed of
    1, which is PyTorch's."""
    with clk.use_backend("triton"):
        with recorded() as forward:
            loss = step()
        seed = torch.ones_like(loss)
        with recorded() as backward:
            loss.backward(seed)
    return list(forward), list(backward)


def of_loss(name: str, rows: int = 64, width: int = 32) -> tuple[list[str], list[str]]:
    """The launches of a workload of the benchmark, bfloat16."""
    columns = 129 if name in ("info_nce", "sce") else rows
    work = Workload(name, rows, columns, width, "bfloat16")
    inputs = work.inputs().requiring_gradients()
    return launches(lambda: inputs.forward(work.spec.ours, work.temperature))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("losses", nargs="*", default=LOSSES, metavar="LOSS", help=", ".join(LOSSES))
    interpreter.repair()
    for name in parser.parse_args(argv).losses:
        phases = of_loss(name)
        print(f"{name}: {sum(map(len, phases))}")
        for phase, names in zip(("forward", "backward"), phases, strict=True):
            listed = ", ".join(f"{n} × {k}" if n > 1 else k for k, n in Counter(names).items())
            print(f"  {phase} {len(names)}: {listed}")


if __name__ == "__main__":
    main()
