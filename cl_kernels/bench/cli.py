"""`python -m cl_kernels bench`: from one command to a report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from ..dispatch import BACKENDS, obstacle
from . import compare, report, results, run, terminal, variants, workloads
from .variants import COMPILED, PEERS
from .workloads import LOSSES, STANDARD

DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    losses = f"of {', '.join(LOSSES)}, or all (default: {', '.join(STANDARD)})"
    add("--losses", nargs="+", choices=(*LOSSES, "all"), metavar="LOSS", default=list(STANDARD), help=losses)
    add("--rows", nargs="+", type=int, help="sizes of the curves; the last is the headline")
    add("--width", type=int, help="features (DimCL: the batch)")
    add("--queue", type=int, help="keys in the queue of SCE and InfoNCE")
    add("--dtypes", nargs="+", choices=DTYPES, help="default: float32; bfloat16 on a GPU")
    add("--temperature", type=float, default=0.1)
    add("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    backends = "of cl_kernels; default: auto on the CPU, triton and cuda on a GPU"
    add("--backends", nargs="+", choices=BACKENDS, help=backends)
    peers = f"default: all that are installed, of {', '.join(PEERS)}; none: --peers alone"
    add("--peers", nargs="*", choices=PEERS, metavar="PEER", default=list(PEERS), help=peers)
    add("--rounds", type=int, default=21, help="samples of a variant, at most (default 21)")
    seconds = "for the times of all workloads, beyond three rounds of each (default 120)"
    add("--seconds", type=float, default=120.0, help=seconds)
    add("--threads", type=int, help="of torch; default: as many as it takes by itself")
    add("--no-memory", action="store_true", help="no peak memory, which costs a process each")
    add("--no-study", action="store_true", help="no errors over temperatures and dtypes")
    compiled = f"{COMPILED} at every size, not only at the headlines: minutes more"
    add("--compile-all", action="store_true", help=compiled)
    folder = "folder for results.json, report.md and report.html (default bench_output)"
    add("--output", type=Path, default=Path("bench_output"), metavar="DIR", help=folder)
    commands = parser.add_subparsers(dest="bench_command", title="with stored results")
    report = commands.add_parser("report", help="results.json to report.md and report.html again")
    report.add_argument("file", type=Path, metavar="RESULTS.json")
    report.add_argument("--output", type=Path, metavar="DIR", help="default: the file's folder")
    compare.add_arguments(commands.add_parser("compare", help="what became slower between two runs"))


def main(options: argparse.Namespace) -> int:
    """0: every variant of ours that was asked for has a time; 1: one has none; 2: bad usage."""
    if options.bench_command == "compare":
        return compare.main(options)
    try:
        if options.bench_command == "report":
            write_reports(results.load(options.file), options.output or options.file.parent)
            return 0
        plan = _plan(options)
        options.output.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    stored = options.output / "results.json"
    with terminal.progress() as progress:
        found = run.run(plan, progress, keep=lambda found: results.save(found, stored))
    results.save(found, stored)
    terminal.show(found)
    print(stored)
    write_reports(found, options.output)
    lost = [line for line in found.lines if line.is_ours and not line.timed]
    for line in lost:
        print(f"bench: no time for {line.variant}, {line.work} {line.dtype}: {line.status}", file=sys.stderr)
    return 1 if lost else 0


def _plan(options: argparse.Namespace) -> run.Plan:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    if options.rounds < 1 or options.temperature <= 0:
        raise ValueError("--rounds must be at least 1 and --temperature above 0")
    if options.threads is not None:
        torch.set_num_threads(options.threads)  # raises RuntimeError below 1
    backends = options.backends or variants.serving_backends(device)
    for backend in backends:
        if reason := obstacle(backend, device):
            raise ValueError(f"--backends {backend}: {reason}")
    losses = list(LOSSES) if "all" in options.losses else options.losses
    dtypes = options.dtypes or (("bfloat16",) if device == "cuda" else ("float32",))
    sizes = options.rows, options.width, options.queue
    works = workloads.planned(device, losses, dtypes, *sizes, options.temperature)
    return run.Plan(
        works, device, backends, options.peers, options.rounds, options.seconds, not options.no_memory,
        not options.no_study, options.compile_all,
    )  # fmt: skip


def write_reports(found: results.Results, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, written in (("report.md", report.markdown), ("report.html", report.html)):
        (folder / name).write_text(written(found), encoding="utf-8")
        print(folder / name)
