"""The measurements: whole runs, the first steps side by side, and the losses alone."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from cl_kernels.bench import fresh

from ..common.loop import Trainer
from ..common.run import Recipe
from .plan import EAGER, OURS, PLANS, Variant

CPU = torch.device("cpu")
FORMULAS = OURS, EAGER
FIRST_STEPS = 3
ROUNDS = 15  # of steps that are timed


def recipe_of(system: str) -> Recipe[Any]:
    return importlib.import_module(f"examples.{system}.__main__").RECIPE


def settings_of(system: str, variant: Variant, formula: str, seed: int, steps: int | None) -> Any:
    preset = recipe_of(system).presets["cpu"]
    return replace(
        preset,
        methods=(variant.method,),
        formula=formula,
        seed=seed,
        steps=steps,
        quiet=True,
        **variant.changes,
    )


def in_turn(system: str, seed: int, others: bool) -> Iterator[tuple[Variant, str]]:
    """Give what a seed trains: ours and eager in turn, which of them first by turns too, then the others."""
    plan = PLANS[system]
    for formula in FORMULAS if seed % 2 else FORMULAS[::-1]:
        yield plan.main, formula
    for variant in plan.others if others else ():
        yield variant, FORMULAS[0]


def train(
    system: str, seed: int, output: Path, steps: int | None, restart: bool, others: bool = True
) -> list[dict[str, Any]]:
    """Run all variants of a seed, or without `restart` go on with those in the folder; a record of each."""
    torch.set_num_threads(1)
    records = []
    for variant, formula in in_turn(system, seed, others):
        folder = output / system / f"{variant.name}, {formula}, {seed}".replace(", ", "-").replace(" ", "")
        path = folder / variant.method / "result.json"
        settings = settings_of(system, variant, formula, seed, steps)
        recipe_of(system).run(replace(settings, output=folder, restart=restart), CPU)
        result = json.loads(path.read_text())
        record = {"system": system, "variant": variant.name, "formula": formula, "seed": seed}
        record["figures"] = result["figures"]
        if variant == PLANS[system].main:
            lines = path.with_name("log.jsonl").read_text().splitlines()
            record["losses"] = [float(f"{json.loads(line)['loss']:.7g}") for line in lines]
        records.append(record)
    return records


def first_steps(system: str, seed: int) -> list[dict[str, Any]]:
    """Relative differences from eager, the loss's and in norm that of the gradient of all weights, along
    eager's first steps and from its weights: of ours, and for comparison of eager with its weights rounded
    anew."""
    torch.set_num_threads(1)
    variant = PLANS[system].main
    eager = start(system, variant, "eager", seed)
    trainers = {
        "ours": start(system, variant, "cl_kernels", seed),
        "rounded": start(system, variant, "eager", seed),
    }
    records = []
    for step in range(FIRST_STEPS):
        for trainer in trainers.values():
            trainer.method.load_state_dict(eager.method.state_dict())
        with torch.no_grad():
            for weight in trainers["rounded"].method.parameters():
                up = torch.rand_like(weight) < 0.5
                weight.copy_(torch.nextafter(weight, torch.where(up, torch.inf, -torch.inf)))
        loss, gradient = measured(eager)
        for name, trainer in trainers.items():
            other, others = measured(trainer)
            difference = {"loss": abs(other - loss) / abs(loss)}
            difference["gradient"] = float((others - gradient).norm() / gradient.norm())
            records.append({"system": system, "seed": seed, "step": step, "run": name} | difference)
    return records


def start(system: str, variant: Variant, formula: str, seed: int) -> Trainer:
    settings = settings_of(system, variant, formula, seed, None)
    recipe = recipe_of(system)
    data = recipe.load(settings.data, settings.root, settings.size)
    return recipe.trainer(settings, variant.method, data, CPU)


def steps_in_turn(system: str, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Milliseconds of a step of ours, of eager, and of the variants that the plan times, in turn."""
    plan = PLANS[system]
    kinds = [(plan.main, formula) for formula in FORMULAS] + [(x, FORMULAS[0]) for x in plan.timed]
    trainers = [start(system, variant, formula, 0) for variant, formula in kinds]
    for trainer in trainers:
        trainer.step()  # sets up
    times = [[trainer.step()["ms"] for trainer in trainers] for _ in range(rounds)]
    return [
        {"system": system, "variant": variant.name, "formula": formula, "ms": [row[i] for row in times]}
        for i, (variant, formula) in enumerate(kinds)
    ]


def measured(trainer: Trainer) -> tuple[float, torch.Tensor]:
    """Loss and gradient, float64, of a step."""
    loss = trainer.step()["loss"]
    gradients = [p.grad for p in trainer.method.parameters() if p.grad is not None]
    return loss, torch.cat([x.double().flatten() for x in gradients])


def losses_alone(system: str) -> list[dict[str, Any]]:
    """Time and peak memory of forward and backward of the loss, each in a process of its own."""
    records = []
    for size in ("recipe", "large"):
        work = getattr(PLANS[system], size)
        for formula in FORMULAS:
            found = fresh.measure(fresh.Task(work, formula, seconds=2, repeats=200))
            record = {"system": system, "size": size, "work": asdict(work), "formula": formula}
            records.append(record | {"status": found.status, "ms": found.ms, "peak": found.peak})
    return records


def everything(
    systems: tuple[str, ...], seeds: int, workers: int, output: Path, steps: int | None, restart: bool
) -> dict[str, list[dict[str, Any]]]:
    """All measurements; times come first, while nothing else runs. Seed 0, by which settings were chosen, is
    left out."""
    found: dict[str, list[dict[str, Any]]] = {"losses": [], "steps": [], "first_steps": [], "runs": []}
    with Progress() as bar:
        alone = bar.add_task("losses and steps alone", total=len(systems))
        for system in systems:
            found["losses"] += losses_alone(system)
            found["steps"] += steps_in_turn(system)
            bar.advance(alone)
        pairs = [(system, seed) for seed in range(1, seeds + 1) for system in systems]
        task = bar.add_task("runs", total=len(pairs))
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            started = [pool.submit(first_steps, *pair) for pair in pairs]
            running = [pool.submit(train, *pair, output, steps, restart) for pair in pairs]
            for done in as_completed(running):
                done.result()
                bar.advance(task)
            found["first_steps"] = [record for one in started for record in one.result()]
            found["runs"] = [record for one in running for record in one.result()]
    return found


def again(systems: tuple[str, ...], seeds: range, workers: int, output: Path) -> list[dict[str, Any]]:
    """Runs of ours and eager alone from further seeds."""
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        pairs = [(system, seed) for system in systems for seed in seeds]
        running = [pool.submit(train, *pair, output, None, True, False) for pair in pairs]
        return [record for one in running for record in one.result()]
