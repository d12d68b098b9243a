"""LARS: its step, written out, and that it goes on from a state_dict."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro", reason="the examples' requirements are not installed")

from examples.common.lars import LARS

SHAPES = (3, 4), (2, 3, 3, 3), (5,), ()


def parameters(seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES)
    return [torch.nn.Parameter(x) for x in drawn]


def set_gradients(weights: list[torch.nn.Parameter], seed: int) -> None:
    for w, g in zip(weights, parameters(seed), strict=True):
        w.grad = g.detach()


def test_steps_are_the_formula() -> None:
    """Momentum, learning rates that change, decay of weights and none of biases."""
    weights = parameters(0)
    expected = [w.detach().flatten().tolist() for w in weights]
    moving = [[0.0] * len(w) for w in expected]
    optimizer = LARS(weights, lr=1.0, momentum=0.8, weight_decay=0.3, trust=0.05)
    for step, rate in enumerate((0.5, 2.0, 0.1)):
        set_gradients(weights, 10 + step)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        for w, v, p in zip(expected, moving, weights, strict=True):
            g = p.grad.flatten().tolist()
            ratio, decay = 1.0, 0.0
            if p.ndim > 1:
                size, slope = (sum(x * x for x in y) ** 0.5 for y in (w, g))
                ratio, decay = 0.05 * size / (slope + 0.3 * size), 0.3
            for i in range(len(w)):
                v[i] = 0.8 * v[i] + rate * ratio * (g[i] + decay * w[i])
                w[i] -= v[i]
    for p, w in zip(weights, expected, strict=True):
        torch.testing.assert_close(
            p.detach().flatten(), torch.tensor(w, dtype=p.dtype), rtol=1e-13, atol=1e-13
        )


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_zeros_are_not_adapted(zero: str) -> None:
    w = torch.nn.Parameter(torch.full((2, 2), 0.0 if zero == "weight" else 3.0))
    w.grad = torch.full((2, 2), 0.0 if zero == "gradient" else 3.0)
    LARS([w], lr=0.5, weight_decay=0.1).step()
    expected = -0.5 * 3.0 if zero == "weight" else 3.0 - 0.5 * 0.1 * 3.0
    torch.testing.assert_close(w.detach(), torch.full((2, 2), expected))


def test_goes_on_from_a_state_dict_bit_for_bit() -> None:
    options = {"lr": 0.7, "weight_decay": 0.01, "trust": 0.1}
    whole = parameters(0)
    optimizer = LARS(whole, **options)
    for step in range(2):
        set_gradients(whole, step)
        optimizer.step()
    resumed = [torch.nn.Parameter(w.detach().clone()) for w in whole]
    again = LARS(resumed, lr=0.0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for weights, taken in ((whole, optimizer), (resumed, again)):
        for step in range(2, 4):
            set_gradients(weights, step)
            taken.step()
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one, other)


def test_values_below_zero_are_named() -> None:
    with pytest.raises(ValueError, match="trust must be at least 0, got -1"):
        LARS(parameters(0), lr=0.1, trust=-1)


def test_trainer_takes_it_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    from examples.supcon.__main__ import RECIPE

    few = {"data": "digits", "batch": 32, "width": 4, "quiet": True, "checkpoint_every": 3}
    settings = replace(RECIPE.presets["cpu"], optimizer="lars", lr=4.0, trust=0.01, weight_decay=0.1, **few)
    data = RECIPE.load("digits", None, None)
    losses = {}
    for folder, stops in (("whole", [4]), ("parts", [2, 4])):
        (tmp_path / folder).mkdir()
        for stop in stops:
            trainer = RECIPE.trainer(replace(settings, steps=stop), "supcon", data, torch.device("cpu"))
            records = trainer.fit(tmp_path / folder, "supcon")
        assert isinstance(trainer.optimizer, LARS)
        assert trainer.optimizer.param_groups[0]["trust"] == 0.01
        assert [g["weight_decay"] for g in trainer.optimizer.param_groups] == [0.1, 0.0]
        losses[folder] = [record["loss"] for record in records]
    assert losses["parts"] == losses["whole"] and len(losses["whole"]) == 4
