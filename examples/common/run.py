"""A recipe from its settings to its results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from rich.table import Table

import cl_kernels as clk

from . import processes
from .data import Data, load
from .evaluate import Evaluation
from .log import write
from .loop import Method, Trainer
from .settings import Settings, parse

S = TypeVar("S", bound=Settings)
FILES = "checkpoint.pt", "log.jsonl", "result.json"


@dataclass(frozen=True)
class Recipe(Generic[S]):
    """A system: its settings, data, methods by name, and what is evaluated."""

    name: str
    about: str
    presets: Mapping[str, S]
    build: Callable[[S, str, Data], Method]
    evaluate: Callable[[Method, Data], Evaluation]
    load: Callable[[str, Path | None, int | None], Data] = load
    labelled: bool = True
    """Whether it trains by labels; else on images without labels, where the data has them."""

    def main(self, arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
        """Run what the command line asks for; the results of each method by name, on the first process."""
        settings = parse(self.presets, self.about, arguments)
        if settings.output is None:
            settings = replace(settings, output=Path("example_output") / self.name)
        if not settings.methods:
            raise SystemExit(f"--methods must name some of those of {self.name}")
        with processes.joined() as device:
            try:
                return self.run(settings, device)
            except (ValueError, FileNotFoundError) as error:
                raise SystemExit(f"{self.name}: {error}") from error

    def trainer(self, settings: S, name: str, data: Data, device: torch.device) -> Trainer:
        """Trainer of one of the methods, its weights drawn from the seed."""
        torch.manual_seed(settings.seed)
        images = data.train if self.labelled or data.unlabelled is None else data.unlabelled
        return Trainer(settings, self.build(settings, name, data), images, device)

    def run(self, settings: S, device: torch.device) -> dict[str, dict[str, Any]]:
        """Train and evaluate each of the settings' methods.

        The output folder gets log.jsonl, checkpoint.pt and result.json for each method, and a plot.
        """
        data = self.load(settings.data, settings.root, settings.size)
        results, logs, found = {}, {}, {}
        for name in settings.methods:
            folder = settings.output / name
            prepare(folder, settings.restart)
            trainer = self.trainer(settings, name, data, device)
            logs[name] = trainer.fit(folder, name)
            if processes.rank() == 0:
                trainer.method.eval()
                found[name] = self.evaluate(trainer.method, data)
                results[name] = result(settings, name, logs[name], found[name])
                write(folder / "result.json", json.dumps(results[name], indent=1) + "\n")
        if results and not settings.quiet:
            show(settings, results, found, logs)
        return results


def prepare(folder: Path, restart: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if restart and processes.rank() == 0:
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
    processes.wait()


def result(settings: Settings, name: str, log: list[dict[str, Any]], found: Evaluation) -> dict[str, Any]:
    times = torch.tensor([record["ms"] for record in log])
    return {
        "method": name,
        "settings": settings.record(),
        "figures": found.figures,
        "more": found.more,
        "step_ms": float(times.median()) if len(times) else None,
        "steps": len(log),
        "processes": processes.count(),
        "threads": torch.get_num_threads(),
        "versions": {"cl_kernels": clk.__version__, "torch": torch.__version__},
    }


def show(settings: Settings, results: dict[str, Any], found: dict[str, Evaluation], logs: Any) -> None:
    from .plot import draw

    columns = list(dict.fromkeys(name for evaluation in found.values() for name in evaluation.figures))
    table = Table("", *results)
    for name in columns:
        table.add_row(name, *(shown(one["figures"].get(name), ".4g") for one in results.values()))
    table.add_row("ms a step", *(shown(one["step_ms"], ".1f") for one in results.values()))
    console = Console()
    console.print(table)
    picture = settings.output / "plot.png"
    draw(picture, f"{settings.data}, seed {settings.seed}", logs, found)
    console.print(f"Logs, checkpoints, results and plot are in {settings.output}")


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
