"""`python -m cl_kernels check`: is every loss, with every option, as exact here as it should be?

Each case of `check_cases.py` runs on every backend that serves on this machine. Its loss and its gradients
are compared with the reference in float64, by the judgement of `parity.py`: they may be off by twice what
plain torch in the same dtype is off by, plus a floor. What fails, and what raises, is a row of the table like
any other.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..dispatch import Backend
from . import parity
from .check_cases import CASES, INPUTS, LOSSES, Case, Data, short
from .parity import Problem
from .text import aligned

DESCRIPTION = (
    "Compares every loss and every option, on every backend that serves here, with the reference in float64: "
    "an error may be twice that of plain torch in the same dtype, plus the floor that rounding sets. "
    "Exits with 0 if all agree, 1 if something fails, 2 for bad usage."
)
DTYPES = ("float32", "bfloat16", "float16", "float64")
HEADER = ("loss", "options", "backend", "dtype", "tau", "inputs", "loss error", "gradient error", "of limit",
          "verdict")  # fmt: skip
ROWS_FOR_THREADS = 1000  # fewer are faster on one, above all on a busy machine
AGREES, FAILS, NOT_SERVED = "agrees", "FAILS", "not served"


class Place(NamedTuple):
    backend: Backend
    device: torch.device

    def __str__(self) -> str:
        natural = "cuda" if self.backend in ("triton", "cuda") else "cpu"
        return self.backend if self.device.type == natural else f"{self.backend} on {self.device}"


@dataclass(frozen=True)
class Row:
    """A case in one dtype at one temperature on one backend. Errors are relative to the largest element of
    the truth; None where nothing could be compared."""

    loss: str
    options: str
    backend: str
    dtype: str
    temperature: float
    inputs: str
    loss_error: float | None
    gradient_error: float | None
    share: float | None  # the largest error over its limit
    worst: str | None  # which result that is
    status: str
    detail: str = ""

    @property
    def verdict(self) -> str:
        return f"{self.status}: {self.detail}" if self.detail else self.status

    def __str__(self) -> str:
        where = f"{self.backend} in {self.dtype} at tau {self.temperature:g}, {self.inputs} inputs"
        return f"{self.loss} ({self.options}) on {where}"

    def cells(self) -> list[str]:
        share = "" if self.share is None else f"{self.share:.0%}"
        errors = ("" if x is None else f"{x:.1e}" for x in (self.loss_error, self.gradient_error))
        return [self.loss, self.options, self.backend, self.dtype, f"{self.temperature:g}", self.inputs,
                *errors, share, self.verdict]  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A case with its inputs, to be run at several places."""

    case: Case
    data: Data
    dtype: str

    def rows(self, places: Iterable[Place]) -> Iterator[Row]:
        for device, group in itertools.groupby(places, lambda place: place.device):
            yield from self._rows_on(device, list(group))

    def _rows_on(self, device: torch.device, places: Sequence[Place]) -> Iterator[Row]:
        wide = device if device.type == "cuda" else torch.device("cpu")  # not every device has float64
        try:
            problem = self.case.problem(self.data).to(getattr(torch, self.dtype))
            truth, theirs = parity.exact(problem, wide), parity.plain(problem, device)
        except Exception as error:
            yield from (self._row(place, FAILS, f"in the reference: {_message(error)}") for place in places)
            return
        for place in places:
            yield self._compared(place, problem, truth, theirs)

    def _compared(
        self, place: Place, problem: Problem, truth: dict[str, Tensor], theirs: dict[str, Tensor]
    ) -> Row:
        if place.backend == "triton" and place.device.type == "cpu" and self.dtype == "bfloat16":
            return self._row(place, NOT_SERVED, "Triton's interpreter does not round to bfloat16 as GPUs do")
        in_float64 = self.dtype == "float64"
        try:
            with dispatch.use_backend(place.backend):
                dtype = torch.float64 if in_float64 else None  # learnt scalars as well
                mine = parity.run(self.case.call, problem, dtype, place.device)
            if in_float64:
                results = parity.compared_in_float64(problem, truth, mine)
            else:
                results = parity.compared(problem, truth, mine, theirs)
        except dispatch.BackendError as error:
            return self._row(place, NOT_SERVED, str(error).partition(": ")[2] or str(error))
        except NotImplementedError as error:
            return self._row(place, NOT_SERVED, _message(error))
        except Exception as error:
            return self._row(place, FAILS, _message(error))
        loss, *gradients = results
        worst = max(results, key=lambda result: (result.fault is not None, result.share))
        return self._row(
            place,
            AGREES if worst.fault is None else FAILS,
            worst.fault or "",
            loss_error=loss.relative,
            gradient_error=max((result.relative for result in gradients), default=None),
            share=worst.share,
            worst=worst.name,
        )

    def _row(
        self,
        place: Place,
        status: str,
        detail: str,
        loss_error: float | None = None,
        gradient_error: float | None = None,
        share: float | None = None,
        worst: str | None = None,
    ) -> Row:
        return Row(
            self.case.loss, str(self.case), str(place), self.dtype, self.data.tau, self.data.inputs,
            loss_error, gradient_error, share, worst, status, detail,
        )  # fmt: skip


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def places(backends: Sequence[Backend] | None, device: torch.device | None) -> list[Place]:
    """Places for the cases: backends asked for by name, or all that serve, on one device or on their own.

    Raises `ValueError` for a backend or a device that is not there.
    """
    if device is not None:
        try:
            torch.empty(1, device=device).cpu()
        except Exception as error:
            raise ValueError(f"--device {device} is not there: {_message(error)}") from error
    found = []
    for backend in backends or [name for name in typing.get_args(Backend) if name != "auto"]:
        with dispatch.use_backend(backend):  # makes CUDA's kernels ready
            reasons = {where: dispatch.obstacle(backend, where) for where in _devices(backend, device)}
        able = [where for where, reason in reasons.items() if reason is None]
        if backends and not able:
            raise ValueError(f"backend {backend!r} cannot serve here: {next(iter(reasons.values()))}")
        found += [Place(backend, where) for where in able[:1]]
    return found


def _devices(backend: str, device: torch.device | None) -> list[torch.device]:
    """Devices to try, the best first."""
    if device is not None:
        return [device]
    on_gpu = backend in ("auto", "triton", "cuda") and torch.cuda.is_available()
    return [torch.device("cuda"), torch.device("cpu")] if on_gpu else [torch.device("cpu")]


def _number(
    accepts: Callable[[float], bool], kind: Callable[[str], float], wanted: str
) -> Callable[[str], float]:
    """A parser of numbers for argparse."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return parse


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"must name a device, got {text!r}") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "--losses", nargs="+", type=short, choices=LOSSES, default=list(LOSSES), metavar="LOSS",
        help=f"which to check, by default all: {', '.join(LOSSES)}",
    )  # fmt: skip
    parser.add_argument(
        "--rows", type=_number(lambda n: n >= 2, int, "an integer of at least 2"), default=101,
        help="samples in the batch, of which a loss over two views has twice as many rows (default 101); the "
        "reference holds several matrices of all pairs in float64, 2 GiB each for 8192 samples in two views",
    )  # fmt: skip
    parser.add_argument(
        "--width", type=_number(lambda n: n >= 1, int, "a positive integer"), default=64,
        help="features of a row (default 64)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=list(DTYPES[:3]), help="by default %(default)s"
    )
    parser.add_argument(
        "--temperature", nargs="+", default=[0.1], metavar="TAU",
        type=_number(lambda tau: 0 < tau < math.inf, float, "a positive number"),
        help="scales are its inverse (default 0.1)",
    )  # fmt: skip
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=list(INPUTS), help="by default both")
    parser.add_argument(
        "--backends", nargs="+", choices=dispatch.BACKENDS, default=None,
        help="by default all that serve here; Triton's kernels on the CPU with TRITON_INTERPRET=1",
    )  # fmt: skip
    parser.add_argument("--device", type=_device, help="run everything on this device")
    parser.add_argument(
        "--threads", type=_number(lambda n: n >= 1, int, "a positive integer"),
        help=f"of the CPU; by default 1 below {ROWS_FOR_THREADS} rows, else all",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file as well")
    parser.add_argument("--failed-only", action="store_true", help="print only the rows that fail")


def main(options: argparse.Namespace) -> int:
    try:
        where = places(options.backends, options.device)
        if options.json is not None:
            options.json.touch()
    except (ValueError, OSError) as error:
        print(f"check: {error}", file=sys.stderr)
        return 2
    print(f"{options.rows} samples of {options.width} features on {', '.join(map(str, where))}\n")
    count = sum(case.loss in options.losses for case in CASES)
    count *= len(options.inputs) * len(options.temperature) * len(options.dtype)
    with _threads(options.threads or (1 if options.rows < ROWS_FOR_THREADS else torch.get_num_threads())):
        rows = [row for trial in _with_progress(trials(options), count) for row in trial.rows(where)]
    _print_table([row for row in rows if row.status == FAILS or not options.failed_only])
    print(summary(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(options, rows), indent=2) + "\n")
    if all(row.status == NOT_SERVED for row in rows):
        print("check: nothing was compared", file=sys.stderr)
        return 2
    return 1 if any(row.status == FAILS for row in rows) else 0


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def trials(options: argparse.Namespace) -> Iterator[Trial]:
    for inputs, tau in itertools.product(options.inputs, options.temperature):
        data = Data(options.rows, options.width, inputs, tau, options.seed)
        for case in CASES:
            if case.loss in options.losses:
                yield from (Trial(case, data, dtype) for dtype in options.dtype)


def summary(rows: Sequence[Row]) -> str:
    judged = [row for row in rows if row.status != NOT_SERVED]
    failed = [row for row in judged if row.status == FAILS]
    words = f"{len(judged) - len(failed)} of {len(judged)} agree with float64"
    if len(judged) < len(rows):
        words += f" ({len(rows) - len(judged)} not served)"
    if not judged:
        return words
    worst = max(failed or judged, key=lambda row: -1.0 if row.share is None else row.share)
    if worst.share is None:
        return f"{words}; {worst} {worst.verdict}"
    return f"{words}; worst: {worst.worst} of {worst}, {worst.share:.0%} of the limit"


def as_json(options: argparse.Namespace, rows: Sequence[Row]) -> dict[str, Any]:
    """Everything, with None for what is not finite."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {
        "torch": torch.__version__,
        "rows": options.rows,
        "width": options.width,
        "seed": options.seed,
        "summary": summary(rows),
        "results": [{name: plain(value) for name, value in asdict(row).items()} for row in rows],
    }


def _rich(stream: Any) -> bool:
    """Whether to print with rich: it is installed and somebody looks at the stream."""
    return bool(stream.isatty()) and importlib.util.find_spec("rich") is not None


def _with_progress(trials: Iterable[Trial], count: int) -> Iterable[Trial]:
    if not _rich(sys.stderr):
        return trials
    from rich.console import Console
    from rich.progress import track

    return track(trials, "comparing with float64", count, console=Console(stderr=True), transient=True)


def _print_table(rows: Sequence[Row]) -> None:
    if not rows:
        return
    if not _rich(sys.stdout):
        print("\n".join(aligned(HEADER, [row.cells() for row in rows])))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*HEADER)
    styles = {FAILS: "bold red", NOT_SERVED: "dim"}
    for row in rows:
        table.add_row(*map(Text, row.cells()), style=styles.get(row.status))
    Console().print(table)
