"""The records of a benchmark and their file, which is JSON with a record a line.

Its keys are the fields of `Results`; `lines` and `accuracy` are tables whose first row names the columns.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

PHASES = ("forward", "backward", "both")
OURS = "cl_kernels"  # the name of our variants, alone or followed by a backend
FLOOR = "floor"  # that of the variant that is only as many plain products as the fewest operations are worth
FORMAT = 2


@dataclass(frozen=True)
class Line:
    """One variant of one workload. Times are seconds a step, a sample a round; rounds of the variants of a
    workload were taken in turn, so that the i-th samples of two of them belong together. None: not known."""

    loss: str  # as in workloads.LOSSES: "supcon"
    title: str  # of the loss: "SupCon"
    rows: int  # of the matrix of similarities
    columns: int
    width: int  # features that a similarity sums over
    dtype: str  # of the inputs: "float32"
    temperature: float
    variant: str  # "cl_kernels", "cl_kernels triton", "eager", "torch.compile", ..., "floor"
    headline: bool = True  # whether its workload stands for its loss; the others are points of curves
    status: str = "ok"  # or why there is no time: "wrong answer: ...", "out of memory", "not here: ..."
    flops: float | None = None  # the fewest that loss and gradients can be had with
    bytes: float | None = None  # of inputs and gradients, each moved once
    forward: tuple[float, ...] = ()
    backward: tuple[float, ...] = ()
    both: tuple[float, ...] = ()
    graph: tuple[float, ...] = ()  # forward and backward by replay of a CUDA graph
    memory: float | None = None  # bytes at the peak beyond inputs and gradients
    loss_error: float | None = None  # relative to float64
    gradient_error: float | None = None  # the largest over the inputs, in the Euclidean norm
    note: str = ""  # what is different about this variant: "no self mask"

    @property
    def work(self) -> str:
        return f"{self.title} {self.rows} × {self.columns} × {self.width}"

    @property
    def key(self) -> tuple[str, int, int, int, str, float]:
        """The same for all variants of a workload."""
        return self.loss, self.rows, self.columns, self.width, self.dtype, self.temperature

    @property
    def is_ours(self) -> bool:
        return self.variant.split(" ")[0] == OURS

    @property
    def timed(self) -> bool:
        return bool(self.both)

    @property
    def seconds(self) -> float:
        """The median of forward and backward."""
        return median(self.both)


@dataclass(frozen=True)
class Accuracy:
    """Errors of one variant against float64, on inputs of one kind. None: not finite."""

    loss: str
    title: str
    rows: int
    width: int
    variant: str
    dtype: str
    temperature: float
    inputs: str  # "random" or "converged": positives at a cosine of 0.99
    loss_error: float | None
    gradient_error: float | None


@dataclass
class Results:
    """`machine` has at least device, kind ("cpu" or "cuda"), cores, threads, memory_bytes, torch, python;
    `ceilings` are the rates that this machine reached: operations a second of `torch.mm` by dtype, and
    "copy", bytes a second read and written."""

    machine: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    date: str = ""  # ISO 8601, with the time
    seconds: float = 0.0  # that it all took
    ceilings: dict[str, float] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    accuracy: list[Accuracy] = field(default_factory=list)


def median(samples: Sequence[float]) -> float:
    return statistics.median(samples) if samples else math.nan


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the ratios round by round; what slows a whole round down does not count."""
    return median([a / b for a, b in zip(over, under, strict=False)])


def save(results: Results, path: Path) -> None:
    tables = {"lines": _table(Line, results.lines), "accuracy": _table(Accuracy, results.accuracy)}
    write({"format": FORMAT, **vars(results), **tables}, path)


def _table(kind: type, records: Iterable[Any]) -> list[Sequence[Any]]:
    def finite(value: Any) -> Any:  # JSON has no NaN and no infinity
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [[f.name for f in fields(kind)], *(list(map(finite, astuple(x))) for x in records)]


def write(values: Mapping[str, Any], path: Path) -> None:
    """JSON with a line for every key, and for every item of a list."""

    def text(value: object) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    def block(value: object) -> str:
        return "[\n" + ",\n".join(map(text, value)) + "\n]" if isinstance(value, list) else text(value)

    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + ".part")  # so that what is there is never half a file
    lines = ",\n".join(f"{text(key)}: {block(value)}" for key, value in values.items())
    whole.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    whole.replace(path)


def load(path: Path) -> Results:
    """Raises ValueError, with the path, where the file is not of this format."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"these are not results of `python -m cl_kernels bench` (no format {FORMAT})")
        tables = {"lines": _records(Line, data["lines"]), "accuracy": _records(Accuracy, data["accuracy"])}
        return Results(**({f.name: data[f.name] for f in fields(Results)} | tables))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _records(kind: Any, table: list[list[Any]]) -> list[Any]:
    header, *rows = table
    values = ([tuple(x) if isinstance(x, list) else x for x in row] for row in rows)
    return [kind(**dict(zip(header, row, strict=True))) for row in values]
