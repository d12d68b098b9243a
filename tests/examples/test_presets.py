"""The papers' presets, made small: they train, by the optimiser that they name."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("tyro", reason="the examples' requirements are not installed")

SYSTEMS = "dimcl", "multilevel", "sce", "selfcon", "supcon"
SMALL = {
    "data": "digits",
    "batch": 32,
    "width": 4,
    "stem": "small",
    "projection": 16,
    "projection_wide": 12,
    "hidden": 24,
    "hidden_predictor": 8,
    "queue": 64,
    "ways": 4,
}
PRESETS = [
    (system, preset)
    for system in SYSTEMS
    for preset in importlib.import_module(f"examples.{system}.presets").PRESETS
    if preset != "cpu"
]


@pytest.mark.parametrize(("system", "preset"), PRESETS)
def test_preset_trains(system: str, preset: str) -> None:
    recipe = importlib.import_module(f"examples.{system}.__main__").RECIPE
    default = recipe.presets[preset]
    settings = replace(default, **{k: v for k, v in SMALL.items() if hasattr(default, k)})
    data = recipe.load("digits", None, None)
    for name in settings.methods:
        trainer = recipe.trainer(settings, name, data, torch.device("cpu"))
        before = [p.detach().clone() for p in trainer.method.parameters() if p.requires_grad]
        assert math.isfinite(trainer.step()["loss"])
        after = [p for p in trainer.method.parameters() if p.requires_grad]
        assert any(not torch.equal(x, y) for x, y in zip(before, after, strict=True))
        assert type(trainer.optimizer).__name__.lower() == settings.optimizer
        assert trainer.optimizer.param_groups[0]["weight_decay"] == settings.weight_decay
