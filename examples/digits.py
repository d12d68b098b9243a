"""SupCon on handwritten digits: the published eager formula against `cl_kernels`, one line apart.

Trains the same small encoder twice from one seed, compares the loss curves and the held-out accuracy, then
measures time and peak memory of the loss for a ladder of batch sizes, the two in turn several times, of which
the fastest counts. Run it with `make demo`, or `python examples/digits.py`. Exits with 1 if the two losses
disagree.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import torch
from eager_supcon import EagerSupConLoss
from plots import draw, predict
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.table import Table
from training import Digits, Encoder, Run, accuracy, disagreement, load_digits, train

import cl_kernels
from cl_kernels import extension
from cl_kernels.bench.fresh import MEMORY, Measurement, Task, measure
from cl_kernels.bench.workloads import Workload

GIB, MIB = 2**30, 2**20
VIEWS = 2
TEMPERATURE = 0.1
TURNS = (2, 5)  # at least and at most, at every size of the ladder
GRADIENT_TOLERANCE = 1e-5
CURVE_TOLERANCE = 5e-3
ONE_LINE = """\
- criterion = EagerSupConLoss(temperature=0.1)
+ criterion = cl_kernels.SupConLoss(temperature=0.1)"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50, help="training steps of each run")
    parser.add_argument("--batch", type=int, default=1024, help="images a step; every image gives two views")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-rows", type=int, default=32768, help="the ladder's last N = 2 x batch size")
    parser.add_argument("--turns-for", type=float, default=6.0, help="seconds of further turns at one size")
    parser.add_argument("--limit-gib", type=float, default=8.0, help="memory that a loss may take")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds that one measurement may take")
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    return parser.parse_args()


def kernels_in_use() -> str:
    if extension.cpu.module is None:
        return "no compiled kernels (plain PyTorch, in chunks)"
    capability = extension.cpu.build_info().get("cpu_capability", "unknown instruction set")
    return f"compiled CPU kernels, {capability}"


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def train_both(data: Digits, args: argparse.Namespace, progress: Progress) -> dict[str, Run]:
    runs = {}
    criteria = {"eager": EagerSupConLoss(TEMPERATURE), "cl_kernels": cl_kernels.SupConLoss(TEMPERATURE)}
    for name, criterion in criteria.items():
        bar = progress.add_task(f"train, {name}", total=args.steps, note="")
        runs[name] = train(
            criterion,
            data,
            steps=args.steps,
            batch=args.batch,
            seed=args.seed,
            on_step=lambda loss, bar=bar: progress.update(bar, advance=1, note=f"loss {loss:.4f}"),
        )
    return runs


def climb(args: argparse.Namespace, limit: int, progress: Progress) -> dict[str, list[list[Measurement]]]:
    """Measure both losses at every size, in turn, from TURNS[0] to TURNS[1] times: a disturbance of the
    machine falls on a few turns only. Eager is tried once past the limit; beyond that it cannot fit."""
    sizes = [1024 << i for i in range(30) if 1024 << i <= args.max_rows]
    results: dict[str, list[list[Measurement]]] = {"eager": [], "cl_kernels": []}
    bar = progress.add_task("ladder of batch sizes", total=len(sizes), note="")
    for rows in sizes:
        start = time.perf_counter()
        turns: dict[str, list[Measurement]] = {name: [] for name in results}
        for turn in range(TURNS[1]):
            if turn >= TURNS[0] and time.perf_counter() - start > args.turns_for:
                break
            for name, done in turns.items():
                if any(m.status != "ok" for m in done):
                    continue
                work = Workload("supcon", rows, rows, 128, temperature=TEMPERATURE)
                task = Task(work, name, limit, torch.get_num_threads(), seconds=0.5)
                progress.update(bar, note=f"{name}, batch {rows // 2:,}, turn {turn + 1}")
                before = [fastest(earlier) for earlier in results[name]]
                done.append(_measure_unless_hopeless(task, before, args.patience))
        for name, done in turns.items():
            results[name].append(done)
        progress.advance(bar)
    progress.update(bar, note="done")
    return results


def fastest(turns: list[Measurement]) -> Measurement:
    """The least time and the least memory of the turns; or what went wrong in one."""
    failed = [m for m in turns if m.status != "ok"]
    if failed:
        return failed[0]
    return replace(turns[0], ms=min(m.ms for m in turns), peak=min(m.peak for m in turns))


def turns_taken(results: dict[str, list[list[Measurement]]]) -> str:
    """From how many turns a time is the least: "2 to 5"."""
    counts = [len(turns) for ladder in results.values() for turns in ladder if fastest(turns).status == "ok"]
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _measure_unless_hopeless(task: Task, before: list[Measurement], patience: float) -> Measurement:
    done = [m for m in before if m.status == "ok"]
    if any(m.status == MEMORY for m in before):
        return Measurement(task, MEMORY)
    if not done:
        return measure(task)
    ms, peak = predict(done[-1], task.work.rows)
    too_large = task.variant == "eager" and task.limit is not None and peak > task.limit
    if too_large and sys.platform != "linux":  # only there is the limit enforced
        return Measurement(task, MEMORY)
    if ms > 1e3 * patience and not too_large:
        return Measurement(task, f"skipped: over {patience:.0f} s")
    return measure(task)


def training_table(runs: dict[str, Run], scores: dict[str, tuple[float, float]]) -> Table:
    table = Table(title="Training", title_justify="left")
    table.add_column("loss")
    for column in ("first", "last", "k-NN", "linear probe", "step", "of it the loss"):
        table.add_column(column, justify="right")
    for name, run in runs.items():
        nearest, probe = scores[name]
        table.add_row(
            name,
            f"{run.losses[0]:.4f}",
            f"{run.losses[-1]:.4f}",
            f"{nearest:.1%}",
            f"{probe:.1%}",
            f"{run.step_ms:.0f} ms",
            f"{run.loss_ms:.1f} ms, {run.loss_share:.0%}",
        )
    nearest, probe = scores["untrained"]
    table.add_row("[dim]untrained", "", "", f"[dim]{nearest:.1%}", f"[dim]{probe:.1%}", "", "")
    return table


def ladder_table(results: dict[str, list[Measurement]], turns: list[int], limit: int) -> Table:
    title = "Loss alone, forward + backward, D = 128: the fastest of the turns that the two took"
    table = Table(title=title, title_justify="left")
    columns = (
        "batch",
        "rows N",
        "turns",
        "eager",
        "cl_kernels",
        "faster",
        "eager memory",
        "cl_kernels memory",
    )
    for column in columns:
        table.add_column(column, justify="right")
    fitted = [m for m in results["eager"] if m.status == "ok"]
    for eager, ours, count in zip(*results.values(), turns, strict=True):
        rows = ours.task.work.rows
        needed = f"; needs ~{show_bytes(predict(fitted[-1], rows)[1])}" if fitted else ""
        both = eager.status == ours.status == "ok"
        table.add_row(
            f"{rows // VIEWS:,}",
            f"{rows:,}",
            str(count),
            show_time(eager),
            show_time(ours),
            f"{eager.ms / ours.ms:.1f}x" if both else "",
            f"[red]over {limit / GIB:.0f} GiB{needed}" if eager.status == MEMORY else show_peak(eager),
            show_peak(ours),
        )
    return table


def show_time(m: Measurement) -> str:
    if m.status == MEMORY:
        return "[red]does not fit"
    if m.status != "ok":
        return f"[yellow]{m.status}"
    return f"{m.ms / 1e3:.2f} s" if m.ms >= 1e3 else f"{m.ms:.1f} ms"


def show_peak(m: Measurement) -> str:
    return show_bytes(m.peak) if m.status == "ok" else ""


def show_bytes(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"


def main() -> int:
    args = arguments()
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    start = time.perf_counter()
    limit = min(int(args.limit_gib * GIB), int(0.8 * psutil.virtual_memory().available))
    threads = torch.get_num_threads()
    console.print(
        Panel(
            f"SupCon on handwritten digits, {args.batch:,} images x 2 views: eager against cl_kernels\n"
            f"[dim]torch {torch.__version__}, {threads} threads; {kernels_in_use()}",
            title="cl_kernels demo",
            title_align="left",
        )
    )
    console.print(Syntax(ONE_LINE, "diff", background_color="default"))

    data = load_digits()
    if args.batch > len(data.train_images):
        console.print(f"[red]--batch is at most {len(data.train_images)}, the number of training images")
        return 2
    with progress_bar(console) as progress:
        runs = train_both(data, args, progress)
    torch.manual_seed(args.seed)
    scores = {name: accuracy(run.encoder, data) for name, run in runs.items()}
    scores["untrained"] = accuracy(Encoder(), data)
    curves = {name: run.losses for name, run in runs.items()}
    gradient, difference = disagreement(runs["eager"], runs["cl_kernels"])
    agree = gradient <= GRADIENT_TOLERANCE and difference <= CURVE_TOLERANCE
    console.print(training_table(runs, scores))
    verdict = "[green]agree" if agree else "[bold red]DISAGREE"
    console.print(
        f"The runs {verdict}[/]. Largest relative difference of the loss curves {difference:.1e} "
        f"(allowed {CURVE_TOLERANCE:g}),\n"
        f"of the first step's gradients {gradient:.1e} (allowed {GRADIENT_TOLERANCE:g})\n"
    )

    with progress_bar(console) as progress:
        ladder = climb(args, limit, progress)
    results = {name: [fastest(turns) for turns in sizes] for name, sizes in ladder.items()}
    console.print(ladder_table(results, [len(turns) for turns in ladder["cl_kernels"]], limit))

    plot, figures = args.output / "digits.png", args.output / "digits.json"
    subtitle = (
        f"SupCon on handwritten digits, {threads} CPU threads, torch {torch.__version__}; {kernels_in_use()}"
        f"; times: the fastest of {turns_taken(ladder)} turns"
    )
    draw(plot, curves, results, limit, subtitle)
    record = {
        "torch": torch.__version__,
        "threads": threads,
        "kernels": kernels_in_use(),
        "curve_difference": difference,
        "first_gradient_difference": gradient,
        "curves": curves,
        "accuracy": {
            name: dict(zip(("knn", "linear_probe"), score, strict=True)) for name, score in scores.items()
        },
        "step_ms": {name: run.step_ms for name, run in runs.items()},
        "loss_ms": {name: run.loss_ms for name, run in runs.items()},
        "ladder": [asdict(m) for sizes in ladder.values() for turns in sizes for m in turns],
    }
    figures.write_text(json.dumps(record, indent=1))
    console.print(
        f"Plot: [bold]{plot}[/]   figures: {figures}   ({time.perf_counter() - start:.0f} s in all)"
    )

    if not agree:
        console.print("[bold red]FAILED: the two losses train differently.")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
