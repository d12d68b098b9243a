"""Evidence that the accelerated losses train like the originals, and of the papers' claims at a small size.

python -m examples.evidence [--render] [--help]
python -m examples.evidence --systems supcon --store try.json --document try.md
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import tyro

from cl_kernels.bench import machine

from ..common.log import write
from .measure import again, everything
from .plan import PLANS
from .report import PICTURE, Report

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Options:
    systems: tuple[str, ...] = tuple(PLANS)
    seeds: int = 5
    workers: int = 2
    """Runs at once, of one thread each."""
    steps: int | None = None
    """Stop each run after so many steps: to try it."""
    output: Path = Path("example_output/evidence")
    """Folder of the runs."""
    go_on: bool = False
    """Go on with the runs in the folder, after a kill; else they begin anew."""
    store: Path = ROOT / "examples" / "evidence" / "results.json"
    """File of the measurements."""
    document: Path = ROOT / "docs" / "evidence.md"
    again: tuple[str, ...] = ()
    """Train ours and eager of these systems from as many further seeds, and add them to the measurements."""
    render: bool = False
    """Only write the document from the stored measurements."""


def lines(stored: dict[str, object]) -> str:
    """JSON with a record a line."""
    parts = []
    for key, value in stored.items():
        if isinstance(value, list):
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        else:
            text = json.dumps(value)
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def with_summary(text: str, report: Report) -> str:
    """Put the systems' table in its place in the README."""
    parts = re.fullmatch(r"(.*<!-- evidence -->\n).*?(<!-- end -->.*)", text, re.DOTALL)
    if parts is None:
        raise ValueError("README.md has no place for the evidence")
    return f"{parts[1]}{report.summary()}\n{parts[2]}"


def main(arguments: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=arguments, description=__doc__)
    if unknown := {*options.systems, *options.again} - set(PLANS):
        raise SystemExit(f"--systems must be of {', '.join(PLANS)}, got {', '.join(sorted(unknown))}")
    if options.seeds < 3:
        raise SystemExit(f"--seeds must be at least 3 for intervals, got {options.seeds}")
    partial = options.steps is not None or options.systems != Options.systems
    if (
        partial
        and not options.render
        and (options.store == Options.store or options.document == Options.document)
    ):
        raise SystemExit("--steps and --systems are for trying: give --store and --document of your own")
    if options.again:
        stored = json.loads(options.store.read_text())
        seeds = range(options.seeds + 1, 2 * options.seeds + 1)
        stored["again"] = again(options.again, seeds, options.workers, options.output)
        write(options.store, lines(stored))
    elif not options.render:
        started = time.perf_counter()
        here = machine.describe("cpu")
        how = options.workers, options.output, options.steps, not options.go_on
        found = everything(options.systems, options.seeds, *how)
        minutes = None if options.go_on else (time.perf_counter() - started) / 60
        facts = {
            "date": date.today().isoformat(),
            "minutes": minutes,
            "workers": options.workers,
            "machine": here,
        }
        write(options.store, lines(facts | found))
    report = Report(json.loads(options.store.read_text()))
    report.draw(options.document.with_name(PICTURE))
    write(options.document, report.markdown())
    if options.document == Options.document:
        readme = ROOT / "README.md"
        write(readme, with_summary(readme.read_text(), report))
    print(f"{options.document} is written from {options.store}")


if __name__ == "__main__":
    main()
