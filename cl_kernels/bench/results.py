"""What a benchmark found: the records, their JSON, and the ratios that are made of them.

The file is pytest-benchmark's format, so that its own tools read it: an entry of `benchmarks` is one phase
(forward, backward, both) of one variant of one workload, and carries the rest of its `Line` in `extra_info`.
What that format has no place for stands under `cl_kernels`: the machine, the command, the measured ceilings,
the variants without a time and why, and the errors over temperatures and dtypes.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PHASES = ("forward", "backward", "both")
OURS = "cl_kernels"
"""The name of our variants, alone or followed by a backend."""
FLOOR = "floor"
"""The name of the variant that is only as many plain products as the fewest operations are worth."""


@dataclass(frozen=True)
class Line:
    """One variant of one workload. Times are seconds a step, a sample a round; rounds of the variants of a
    workload were taken in turn, so that the i-th samples of two of them belong together."""

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
    flops: float = math.nan  # the fewest that loss and gradients can be had with
    bytes: float = math.nan  # of inputs and gradients, each moved once
    forward: tuple[float, ...] = ()
    backward: tuple[float, ...] = ()
    both: tuple[float, ...] = ()
    graph: tuple[float, ...] = ()  # forward and backward by replay of a CUDA graph
    memory: float | None = None  # bytes at the peak beyond inputs and gradients
    loss_error: float | None = None  # relative to float64; None where it is not known
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

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.seconds

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes


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

    def workloads(self) -> dict[tuple[str, int, int, int, str, float], list[Line]]:
        """The lines by workload, in the order in which they came."""
        groups: dict[tuple[str, int, int, int, str, float], list[Line]] = {}
        for line in self.lines:
            groups.setdefault(line.key, []).append(line)
        return groups

    def headlines(self) -> list[list[Line]]:
        return [lines for lines in self.workloads().values() if lines[0].headline]


def median(samples: Sequence[float]) -> float:
    return statistics.median(samples) if samples else math.nan


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the ratios round by round; what slows a whole round down does not count."""
    pairs = list(zip(over, under, strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else math.nan


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    if len(samples) < 2:
        return (samples[0], samples[0]) if samples else (math.nan, math.nan)
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return first, third


def ours(lines: Iterable[Line]) -> Line | None:
    """Our fastest variant of a workload that has a time."""
    return min((x for x in lines if x.is_ours and x.timed), key=lambda x: x.seconds, default=None)


def named(lines: Iterable[Line], variant: str) -> Line | None:
    return next((line for line in lines if line.variant == variant), None)


# JSON


_TIMES = (*PHASES, "graph")
_VERSION = 1


def _entries(line: Line) -> list[dict[str, Any]]:
    found = []
    for phase in _TIMES:
        samples = getattr(line, phase)
        if not samples:
            continue
        name = f"{line.work} {line.dtype}, {line.variant}, {phase}"
        extra = {key: value for key, value in asdict(line).items() if key not in _TIMES}
        found.append(
            {
                "group": f"{line.work} {line.dtype}, {phase}",
                "name": name,
                "fullname": name,
                "params": None,
                "param": None,
                "extra_info": {**extra, "phase": phase},
                "options": {},
                "stats": {**_stats(samples), "data": list(samples), "iterations": 1},
            }
        )
    return found


def _stats(samples: Sequence[float]) -> dict[str, Any]:
    """pytest-benchmark's, where it is installed."""
    try:
        from pytest_benchmark.stats import Stats
    except ImportError:
        return {"rounds": len(samples), "median": median(samples), "min": min(samples), "max": max(samples)}
    stats = Stats()
    for sample in samples:
        stats.update(sample)
    return stats.as_dict()


@functools.cache
def _surroundings() -> dict[str, Any]:
    """What pytest-benchmark says of the machine and the commit, but for the machine's name."""
    try:
        import pytest_benchmark
        from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info
        from pytest_benchmark.utils import get_commit_info
    except ImportError:
        return {"machine_info": {}, "commit_info": {}, "version": ""}
    machine = pytest_benchmark_generate_machine_info()
    del machine["node"]
    return {
        "machine_info": machine,
        "commit_info": get_commit_info(),
        "version": pytest_benchmark.__version__,
    }


def to_json(results: Results) -> dict[str, Any]:
    absent = [line for line in results.lines if not any(getattr(line, phase) for phase in _TIMES)]
    return {
        **_surroundings(),
        "benchmarks": [entry for line in results.lines for entry in _entries(line)],
        "datetime": results.date,
        "cl_kernels": {
            "format": _VERSION,
            "machine": results.machine,
            "command": results.command,
            "seconds": results.seconds,
            "ceilings": results.ceilings,
            "absent": [asdict(line) for line in absent],
            "accuracy": [asdict(line) for line in results.accuracy],
        },
    }


def _line(values: dict[str, Any]) -> Line:
    counts = {key: math.nan for key in ("flops", "bytes") if values[key] is None}
    return Line(**{**values, **counts})


def from_json(data: dict[str, Any]) -> Results:
    """Raises ValueError where the data are not of this format."""
    own = data.get("cl_kernels")
    if not isinstance(own, dict) or own.get("format") != _VERSION:
        raise ValueError("these are not results of `python -m cl_kernels bench` (no cl_kernels, format 1)")
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in data["benchmarks"]:
        extra = dict(entry["extra_info"])
        phase = extra.pop("phase")
        line = lines.setdefault(tuple(sorted((k, str(v)) for k, v in extra.items())), extra)
        line[phase] = tuple(entry["stats"]["data"])
    timed = [_line(line) for line in lines.values()]
    absent = [_line({**line, **dict.fromkeys(_TIMES, ())}) for line in own["absent"]]
    return Results(
        machine=own["machine"],
        command=own["command"],
        date=data["datetime"],
        seconds=own["seconds"],
        ceilings=own["ceilings"],
        lines=timed + absent,
        accuracy=[Accuracy(**line) for line in own["accuracy"]],
    )


def save(results: Results, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(to_json(results)), indent=1, ensure_ascii=False, allow_nan=False)
    whole = path.with_name(path.name + ".part")  # so that what is there is never half a file
    whole.write_text(text + "\n", encoding="utf-8")
    whole.replace(path)


def load(path: Path) -> Results:
    """Raises ValueError, with the path, where the file is not of this format."""
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: None instead."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
