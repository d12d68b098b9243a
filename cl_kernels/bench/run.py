"""Runs a benchmark: every variant of every workload, checked, measured for memory, then timed in turn."""

from __future__ import annotations

import datetime
import functools
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from . import exact, fresh, machine, timing, variants
from .results import FLOOR, Accuracy, Line, Results
from .variants import COMPILED, PEERS
from .workloads import LOSSES, Inputs, Workload, differentiate

# Pairs up to which a workload is held to float64; beyond, that would take longer than all the rest.
LARGEST_TRUTH = {"cpu": 1 << 28, "cuda": 1 << 35}
GRAPH_ROWS = 4096  # up to which a step is also replayed from a CUDA graph: larger ones hide their launches
STUDY_ROWS, STUDY_WIDTH = 512, 128
STUDY_DTYPES = ("float32", "bfloat16", "float16")
STUDY_TEMPERATURES = (0.5, 0.1, 0.07, 0.01)
STUDY_INPUTS = ("random", "converged")
VANISHED = 1e-6  # a loss below which nothing is left to learn


@dataclass(frozen=True)
class Plan:
    """`seconds` bound the timing of all workloads, beyond a few rounds of each."""

    workloads: Sequence[Workload]
    device: str = "cpu"
    backends: Sequence[str] = ("auto",)
    peers: Sequence[str] = tuple(PEERS)
    rounds: int = 21
    seconds: float = 120.0
    memory: bool = True
    study: bool = True  # errors over temperatures and dtypes
    compile_all: bool = False  # torch.compile also at the sizes that are not headlines


Progress = Callable[[str, int, int], None]  # takes what is being done, steps done and steps in all
Truths = Callable[[str], exact.Result]  # the loss and gradients that a variant is held to
Answer = tuple[Tensor, list[Tensor | None]]


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def run(plan: Plan, progress: Progress, keep: Callable[[Results], None]) -> Results:
    """`keep` gets the results after each workload, so that a run that is stopped loses nothing."""
    started = time.monotonic()
    here = machine.describe(plan.device) | {"load_before": machine.load()}
    found = Results(here, machine.command(), now())
    studied = dict.fromkeys(work.loss for work in plan.workloads) if plan.study else ()
    study = list(itertools.product(studied, STUDY_DTYPES, STUDY_TEMPERATURES, STUDY_INPUTS))
    total = len(plan.workloads) + len(study) + 1
    shares = [3 if work.headline else 1 for work in plan.workloads]  # of the time
    progress("what this machine reaches", 0, total)
    found.ceilings = timing.ceilings(plan.device, dict.fromkeys(work.dtype for work in plan.workloads))
    for i, (work, share) in enumerate(zip(plan.workloads, shares, strict=True), 1):
        progress(work.name, i, total)
        found.lines += measure(plan, work, plan.seconds * share / sum(shares))
        found.seconds = time.monotonic() - started
        keep(found)
    for i, (loss, dtype, temperature, inputs) in enumerate(study, 1 + len(plan.workloads)):
        progress(f"errors of {LOSSES[loss].title}, {dtype}", i, total)
        found.accuracy += errors(plan, loss, dtype, temperature, inputs)
    found.machine["load_after"] = machine.load()
    found.seconds = time.monotonic() - started
    progress("done", total, total)
    return found


def measure(plan: Plan, work: Workload, seconds: float) -> list[Line]:
    """The lines of all variants of a workload, those without a time among them."""
    try:
        return _measured(plan, work, seconds)
    except Exception as error:  # such as inputs or a truth that do not fit; the other workloads go on
        status = fresh.message(error)
        return [line_of(work, name, status=status, note=note) for name, note in variants_of(plan, work)]
    finally:
        _free(plan.device)


def _measured(plan: Plan, work: Workload, seconds: float) -> list[Line]:
    lines = {line.variant: line for line in checked(plan, work)}
    copies = timing.copies(work, plan.device, machine.cache(plan.device))
    steps = {name: steps_of(plan, work, name, copies) for name, line in lines.items() if line.status == "ok"}
    often = [name for name, line in lines.items() if line.is_ours or name == FLOOR]
    found = timing.interleaved(steps, plan.device, plan.rounds, seconds=seconds, often=often)
    return [timed(plan, work, line, found[name]) if name in found else line for name, line in lines.items()]


def checked(plan: Plan, work: Workload) -> list[Line]:
    """A line for each variant, with memory and errors, and the reason if it gets no time."""
    inputs = work.inputs(plan.device)
    moved = float(sum(x.nbytes for x in (*inputs.leaves, *inputs.leaves, *inputs.rest)))
    lines = [line_of(work, name, bytes=moved, note=note) for name, note in variants_of(plan, work)]
    truth_of = _truths(work, inputs)
    return [x if x.variant == FLOOR else _checked(plan, work, x, inputs, truth_of) for x in lines]


def _truths(work: Workload, inputs: Inputs) -> Truths:
    """Each computed once."""

    @functools.cache
    def computed(truth: exact.Truth) -> exact.Result:
        return truth(work.temperature, *inputs.leaves, *inputs.rest)

    return lambda variant: computed(variants.truth(variant, work.loss))


def steps_of(plan: Plan, work: Workload, name: str, copies: Sequence[Inputs]) -> timing.Step:
    if name == FLOOR:
        return timing.products(work, plan.device)
    return timing.steps(variants.implementation(name, work.loss), work.temperature, copies)


def timed(plan: Plan, work: Workload, line: Line, samples: Sequence[timing.Sample]) -> Line:
    line = replace(line, both=tuple(map(sum, samples)))
    if line.variant == FLOOR:
        return line
    forward, backward = zip(*samples, strict=True)
    graph: Sequence[float] = ()
    if plan.device == "cuda" and work.rows <= GRAPH_ROWS and line.is_ours:
        implementation = variants.implementation(line.variant, work.loss)
        graph = timing.graph_samples(implementation, work, plan.device, plan.rounds)
    return replace(line, forward=forward, backward=backward, graph=tuple(graph))


def line_of(work: Workload, variant: str, **fields: Any) -> Line:
    return Line(**vars(work), title=work.spec.title, flops=work.flops, variant=variant, **fields)


def variants_of(plan: Plan, work: Workload) -> Iterator[tuple[str, str]]:
    """Their names and notes."""
    for name in variants.our_names(plan.backends):
        yield name, ""
    for name in plan.peers:
        chosen = work.headline or plan.compile_all or name != COMPILED
        if chosen and work.loss in PEERS[name].losses:
            yield name, PEERS[name].notes.get(work.loss, "")
    yield FLOOR, f"{work.spec.products} plain products"


def _checked(plan: Plan, work: Workload, line: Line, inputs: Inputs, truth_of: Truths) -> Line:
    missing = PEERS[line.variant].missing(plan.device) if line.variant in PEERS else None
    if missing:
        return replace(line, status=missing)
    if plan.memory and plan.device == "cpu":
        limit = int(0.9 * psutil.virtual_memory().available)
        found = fresh.measure(fresh.Task(work, line.variant, limit, torch.get_num_threads()))
        if found.status != "ok":
            return replace(line, status=found.status)
        gradients = sum(x.nbytes for x in inputs.leaves)
        line = replace(line, memory=float(max(0, found.peak - gradients)))
    try:
        result, peak = _first(plan, work, line.variant, inputs)
    except Exception as error:
        _free(plan.device)
        return replace(line, status=fresh.message(error))
    if peak is not None:
        line = replace(line, memory=peak)
    if work.rows * work.columns > LARGEST_TRUTH[plan.device]:
        return replace(line, note="; ".join(filter(None, (line.note, "too large to be held to float64"))))
    return _judged(line, result, truth_of(line.variant))


def _first(plan: Plan, work: Workload, variant: str, inputs: Inputs) -> tuple[Answer, float | None]:
    """The answer of a variant, and on a GPU the peak of its second step beyond inputs and gradients."""
    step = differentiate(variants.implementation(variant, work.loss), work.temperature, inputs)
    result = step()
    if plan.device != "cuda":
        return result, None
    del result
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()  # with the gradients of the step before, which are freed first
    result = step()
    torch.cuda.synchronize()
    return result, float(torch.cuda.max_memory_allocated() - before)


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def errors_of(result: Answer, truth: exact.Result) -> tuple[float, float]:
    """The errors of the loss and, the largest, of the gradients that an implementation has, relative in the
    Euclidean norm; NaN and infinity where a value is not finite."""

    def error(value: Tensor, exactly: Tensor) -> float:
        return float((value.double() - exactly).norm() / exactly.norm().clamp(min=1e-300))

    gradients = [error(x, y) for x, y in zip(result[1], truth[1], strict=True) if x is not None]
    return error(result[0], truth[0]), float(np.max(gradients))


def _judged(line: Line, result: Answer, truth: exact.Result) -> Line:
    """The line with its errors, and with the reason if one is too large.

    A logit of up to 1 / temperature that is rounded to eps moves a probability by eps / temperature; four
    times that is granted, since the published formulas round logits to the dtype of their inputs.
    """
    loss, gradients = errors_of(result, truth)
    line = replace(line, loss_error=loss, gradient_error=gradients)
    rounding = 4 * torch.finfo(getattr(torch, line.dtype)).eps / line.temperature
    limits = max(1e-5, rounding), max(1e-4, 2 * rounding)
    for what, error, limit in zip(("loss", "gradient"), (loss, gradients), limits, strict=True):
        if not error <= limit:
            return replace(line, status=f"wrong answer: relative error of the {what} is {error:.1e}")
    return line


def errors(plan: Plan, loss: str, dtype: str, temperature: float, kind: str) -> list[Accuracy]:
    """The errors of every variant that runs, on small inputs; none where the loss has vanished: relative
    errors of nothing mean nothing."""
    columns = LOSSES[loss].shape(STUDY_ROWS, STUDY_ROWS)[1]
    work = Workload(loss, STUDY_ROWS, columns, STUDY_WIDTH, dtype, temperature, headline=False)
    inputs = work.inputs(plan.device, converged=kind == "converged")
    truth_of = _truths(work, inputs)
    found = []
    for name, _ in variants_of(replace(plan, compile_all=False), work):
        if name == FLOOR or (name in PEERS and PEERS[name].missing(plan.device)):
            continue
        truth = truth_of(name)
        if float(truth[0].abs()) < VANISHED:
            continue
        try:
            step = differentiate(variants.implementation(name, loss), temperature, inputs)
            both = errors_of(step(), truth)
        except Exception:  # such as a peer that does not take the dtype
            continue
        known = [x if math.isfinite(x) else None for x in both]
        shape = work.rows, work.width
        found.append(Accuracy(loss, work.spec.title, *shape, name, dtype, temperature, kind, *known))
    return found
