"""Writes the measured figures of the documents from the stored results: `python bench/docs.py [--check]`.

A block between `<!-- figures: NAME ARGUMENTS -->` and `<!-- end -->` is generated; the rest is left as it is.

    speed FILE          headlines of bench/results/FILE: times, speed-ups, share of the floor, memory, error
    accuracy FILE       the largest gradient errors over temperatures
    machine FILE        a sentence: on what, when, by which command
    acceptance FILE     the judged measures of bench/acceptance.py
    model               bench/model.py
    kernels triton      registers and memory of Triton's kernels, from gates; likewise kernels cuda
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import kernels
import model

from cl_kernels.bench import figures, tables
from cl_kernels.bench.results import FLOOR, Line, Results, load, named, ours, ratio

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md")
BLOCK = re.compile(r"(<!-- figures: (?P<name>\w+) ?(?P<argument>\S*) -->\n).*?(<!-- end -->)", re.DOTALL)


def stored(name: str) -> Path:
    return ROOT / "bench" / "results" / name


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def speed(file: str) -> str:
    """One row a headline; a dash for a peer that does not have the loss."""
    found = load(stored(file))
    peers = [name for name in tables.variants(found) if name != FLOOR and name.split(" ")[0] != "cl_kernels"]
    peers = [name for name in peers if any(x.variant == name and x.timed for x in found.lines)]
    header = ["work", "dtype", "`cl_kernels`", *peers, "floor", "peak memory", "eager's", "gradient error"]
    rows = []
    for lines in found.headlines():
        mine = ours(lines)
        if mine is None:
            continue
        rows.append(
            [
                mine.work,
                mine.dtype,
                figures.time(mine.seconds),
                *(times_slower(named(lines, name), mine) for name in (*peers, FLOOR)),
                figures.size(mine.memory),
                figures.size(getattr(named(lines, "eager"), "memory", None)),
                figures.error(mine.gradient_error),
            ]
        )
    return markdown_table(header, rows, left=2)


def times_slower(line: Line | None, mine: Line) -> str:
    """A variant's time over ours, round by round."""
    if line is None:
        return figures.MISSING
    if not line.timed:
        return line.status.split(":")[0]
    mark = "¹" if "another value" in line.note else ""
    return figures.ratio(ratio(line.both, mine.both)) + mark


def accuracy(file: str) -> str:
    found = load(stored(file))
    at = [f"τ = {figures.short(figures.number(t))}" for t in tables.temperatures(found)]
    rows = [
        [row.dtype, row.inputs, row.variant, *(cell.text for cell in row.cells)]
        for row in tables.accuracy(found)
    ]
    return markdown_table(["dtype", "inputs", "variant", *at], rows, left=3)


def machine(file: str) -> str:
    found = load(stored(file))
    here = found.machine
    return (
        f"Machine: {here['device']}, {here['threads']} threads of {here['cores']} cores, "
        f"{here['capability']}; load {here['load_before']} before and {here['load_after']} after; "
        f"torch {here['torch']}; {found.date[:10]}. `torch.mm` reached {rates(found)} here. "
        f"Command: `{found.command}`; all figures: `bench/results/{file}`."
    )


def rates(found: Results) -> str:
    return ", ".join(f"{figures.rate(x)} in {name}" for name, x in found.ceilings.items() if name != "copy")


def acceptance(file: str) -> str:
    lines = json.loads(stored(file).read_text())["lines"]
    rows = [
        [
            x["group"],
            x["measure"],
            f"{x['value']:.2f} {x['unit']}",
            f"{x['relation']} {x['target']:g}",
            x["verdict"],
        ]
        for x in lines
        if x["target"] is not None
    ]
    return markdown_table(["work", "measure", "value", "target", ""], rows, left=2)


BLOCKS: dict[str, Callable[..., str]] = {
    "speed": speed, "accuracy": accuracy, "machine": machine, "acceptance": acceptance,
    "model": lambda _: model.table(), "kernels": lambda which: kernels.TABLES[which](),
}  # fmt: skip


def generated(text: str) -> str:
    """The document with its blocks made anew. Raises KeyError for an unknown block, OSError for a missing
    file."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}{BLOCKS[match['name']](match['argument'])}\n{match[4]}"

    return BLOCK.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the documents' figures from the stored results.")
    parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    args = parser.parse_args()
    stale = []
    for path in DOCUMENTS:
        before = path.read_text(encoding="utf-8")
        after = generated(before)
        if after != before:
            stale.append(path.name)
            if not args.check:
                path.write_text(after, encoding="utf-8")
    print(f"{'stale' if args.check else 'rewritten'}: {', '.join(stale) or 'nothing'}")
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
