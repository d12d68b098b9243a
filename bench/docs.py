"""Writes the measured figures of the documents from the stored results: `python bench/docs.py [--check]`.

A block between `<!-- figures: NAME ARGUMENTS -->` and `<!-- end -->` is generated; the rest is left as it is.

    speed FILE          headlines of bench/results/FILE: times, speed-ups, share of the floor, memory, error
    accuracy FILE       the largest gradient errors over temperatures
    machine FILE        a sentence: on what, when, by which command
    acceptance FILE     the judged measures of bench/acceptance.py
    model               bench/model.py
    estimate LOSS       `python -m cl_kernels estimate LOSS` for many processes and batches
    hidden LOSS         the fewest rows of a process from which on the ring hides its traffic
    gloo FILE           bytes, memory and times of bench/gloo.py
    adapters FILE       how far other libraries' losses and ours are apart, from bench/adapters.py
    gain FILE:LIBRARY   times and memory of one library's losses
    run FILE            on what bench/gloo.py or bench/adapters.py ran, when, by which command
    kernels triton      registers and memory of Triton's kernels, from gates; likewise kernels cuda
    kernels slots       clocks of their tiles by what is used up
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
from cl_kernels.bench.results import Results, load
from cl_kernels.tools import cost
from cl_kernels.tools import estimate as paper

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "docs" / "performance.md",
    ROOT / "docs" / "scaling.md",
    *sorted((ROOT / "docs" / "integrations").glob("*.md")),
)
BLOCK = re.compile(r"(<!-- figures: (?P<name>\w+) ?(?P<argument>\S*) -->\n).*?(<!-- end -->)", re.DOTALL)


def stored(name: str) -> Path:
    return ROOT / "bench" / "results" / name


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def speed(file: str) -> str:
    """One row a headline: our time, the others' over it round by round, and a dash for a peer that does not
    have the loss."""
    results = load(stored(file))
    found = tables.lines(results)
    timed = set(found[found.seconds.notna() & ~found.ours].variant)
    others = [name for name in tables.variants(results) if name in timed]
    found["cell"] = found.ratio.map(figures.ratio) + found.note.str.contains("another value").map(
        {True: "¹", False: ""}
    )
    found.loc[found.why != "", "cell"] = found.why.str.partition(":")[0]
    rows = []
    for _, work in found[found.headline].groupby("key", sort=False):
        cells = work.set_index("variant").cell
        eager = work[work.variant == "eager"].memory
        rows += [
            [
                mine.work,
                mine.dtype,
                figures.time(mine.seconds),
                *(cells.get(name, figures.MISSING) for name in others),
                figures.size(mine.memory),
                figures.size(next(iter(eager), None)),
                figures.error(mine.gradient_error),
            ]
            for mine in work[work.mine].itertuples()
        ]
    header = ["work", "dtype", "`cl_kernels`", *others, "peak memory", "eager's", "gradient error"]
    return markdown_table(header, rows, left=2)


def accuracy(file: str) -> str:
    found = tables.errors(tables.accuracy(load(stored(file))))
    header = ["dtype", "inputs", "variant", *(f"τ = {figures.plain(t)}" for t in found.columns)]
    rows = found.map(lambda cell: cell.partition("\n")[0]).reset_index().to_numpy()
    return markdown_table(header, rows, left=3)


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


ESTIMATED = ["--batch", "64k", "1M", "16M", "--processes", "8", "64", "256", "1024"]


def estimates(*arguments: str) -> list[paper.Estimate]:
    """As the command makes them."""
    parser = argparse.ArgumentParser()
    paper.add_arguments(parser)
    return paper.estimates(parser.parse_args(arguments))


def estimate(loss: str) -> str:
    return markdown_table(paper.HEADER, paper.table(estimates(loss, *ESTIMATED)), left=3)


def hidden(loss: str) -> str:
    rows = []
    for name, device in paper.DEVICES.items():
        inside, across = estimates(loss, "--device", name, "--exchange", "ring", "--processes", "8", "64")
        fewest = [str(cost.smallest_hidden(x.setup, x.rates)) for x in (inside, across)]
        links = [paper.quantity(x.rates.ring, "B/s") for x in (inside, across)]
        speed = paper.quantity(inside.rates.flops, "FLOP/s")
        rows.append([f"`{name}`: {device.name}", speed, links[0], fewest[0], links[1], fewest[1]])
    header = ["device", "products", "link in a node", "samples", "across nodes", "samples"]
    return markdown_table(header, rows, left=1)


def gloo(file: str) -> str:
    rows = [
        [
            f"{x['loss']} {x['rows']}² × {x['width']}",
            str(x["processes"]),
            x["exchange"] or "–",
            str(x["sent"]),
            str(x["estimated_sent"]),
            figures.ratio(x["wire"] / x["estimated_all"]) if x["estimated_all"] else figures.MISSING,
            figures.size(x["held"]),
            figures.size(x["estimated_held"]),
            figures.time(x["seconds"]),
        ]
        for x in json.loads(stored(file).read_text())["lines"]
    ]
    header = [
        "work", "processes", "exchange", "bytes sent", "estimated", "wire", "tensors", "estimated", "step"
    ]  # fmt: skip
    return markdown_table(header, rows, left=3)


def run(file: str) -> str:
    """On what, when and by which command a script of bench/ ran."""
    found = json.loads(stored(file).read_text())
    here = found["machine"]
    return (
        f"Machine: {here['device']}, {here['cores']} cores, threads of a process: {here['threads']}, "
        f"{here['capability']}; load {here['load_before']} before and {here['load_after']} after; "
        f"torch {here['torch']}; {found['date']}. "
        f"Command: `{found['command']}`; all figures: `bench/results/{file}`."
    )


def adapters(file: str) -> str:
    """One row a loss; the differences are those of the options that run fused."""
    rows = [
        [
            f"`{line['loss']}`",
            str(line["options"]),
            str(line["fused"]),
            *(figures.error(x) for dtype in ("float64", "float32") for x in line[dtype]),
        ]
        for line in json.loads(stored(file).read_text())["lines"]
    ]
    header = [
        "loss", "options compared", "fused", "loss, float64", "gradient", "loss, float32", "gradient"
    ]  # fmt: skip
    return markdown_table(header, rows, left=1)


def gain(argument: str) -> str:
    """One row a measured case of a library, "FILE:LIBRARY"."""
    file, _, library = argument.partition(":")
    rows = [
        [
            f"`{line['loss'].partition('.')[2]}`, {case['options']}",
            str(case["rows"]),
            figures.time(case["theirs"]),
            figures.time(case["ours"]),
            figures.ratio(case["ratio"]),
            figures.size(case["theirs_bytes"]),
            figures.size(case["ours_bytes"]),
            figures.ratio(case["theirs_bytes"] / case["ours_bytes"]),
        ]
        for line in json.loads(stored(file).read_text())["lines"]
        if line["loss"].partition(".")[0] == library
        for case in line["measured"]
    ]
    header = ["loss", "rows", "theirs", "ours", "faster", "their memory", "ours", "less"]
    return markdown_table(header, rows, left=1)


BLOCKS: dict[str, Callable[..., str]] = {
    "speed": speed, "accuracy": accuracy, "machine": machine, "acceptance": acceptance,
    "estimate": estimate, "hidden": hidden, "gloo": gloo, "run": run,
    "adapters": adapters, "gain": gain,
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
