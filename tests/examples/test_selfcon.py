"""SelfCon's own: its exits, its eager losses, the memory that is measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("tyro", reason="the examples' requirements are not installed")

from examples.common.data import load
from examples.common.encoders import Block
from examples.common.loop import Method
from examples.selfcon.__main__ import MEASURED, RECIPE, loss, saved_bytes
from examples.selfcon.formula import augmentations, eager_loss
from examples.selfcon.presets import SelfConSettings

CPU = torch.device("cpu")


def trainer(name: str, **changes: Any) -> Any:
    settings = replace(RECIPE.presets["cpu"], data="digits", batch=32, width=8, **changes)
    return RECIPE.trainer(settings, name, RECIPE.load("digits", None, None), CPU)


def written_out(name: str, features: Any, labels: list[int], temperature: float, alpha: float) -> Any:
    """The methods' definitions, an anchor at a time, with the base temperature 0.07."""
    count, exits = len(labels), features.shape[1] - 1
    rows = [(n % count, v) for n in range(len(features)) for v in range(exits + 1)]  # image, exit
    z = features.flatten(0, 1)

    def alike(i: int, j: int) -> bool:
        one, other = rows[i][0], rows[j][0]
        return one == other if name.endswith("u") else labels[one] == labels[other]

    def mean(anchors: list[int], keys: list[int]) -> Any:
        losses = []
        for i in anchors:
            others = [j for j in keys if j != i]
            logits = z[others] @ z[i] / temperature
            positives = [logits[n] for n, j in enumerate(others) if alike(i, j)]
            if positives:
                losses.append(logits.exp().sum().log() - torch.stack(positives).mean())
        return torch.stack(losses).mean() * temperature / 0.07

    everything = list(range(len(rows)))
    if not name.endswith("a"):
        return mean(everything, everything)
    backbone = [i for i, (_, v) in enumerate(rows) if v == exits]
    return mean(backbone, backbone) + alpha * mean([i for i in everything if i not in backbone], everything)


METHODS = ["selfcon-s", "selfcon-su", "selfcon-sa", "selfcon-m", "selfcon-mu", "selfcon-ma"]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("exits", [1, 2])
def test_losses_are_their_definitions(name: str, exits: int) -> None:
    """In float64, ours and the eager ones; one image is alone in its class."""
    settings, labels = SelfConSettings(temperature=0.2, alpha=0.3), [0, 1, 2, 0, 1]
    shape, generator = (augmentations(name) * len(labels), exits + 1, 6), torch.Generator().manual_seed(0)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    features = torch.nn.functional.normalize(drawn, dim=2).requires_grad_()
    found = [make(settings, name)(features, torch.tensor(labels)) for make in (loss, eager_loss)]
    expected = written_out(name, features, labels, 0.2, 0.3)
    gradient = torch.autograd.grad(expected, features)
    for value in found:
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(value, features), gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("exits", [(2,), (1, 3)])
def test_eager_formula_has_the_same_value_and_gradients(name: str, exits: tuple[int, ...]) -> None:
    ours, eager = (trainer(name, exits=exits, formula=x, alpha=0.3) for x in ("cl_kernels", "eager"))
    assert ours.step()["loss"] == pytest.approx(eager.step()["loss"], rel=1e-5)
    found, expected = (torch.cat([p.grad.flatten() for p in x.method.parameters()]) for x in (ours, eager))
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    assert ours.step()["loss"] == pytest.approx(eager.step()["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["selfcon-sa", "selfcon-ma"])
def test_alpha_weighs_the_exits(name: str) -> None:
    """Losses of the first step are backbone + alpha · exits."""
    zero, one, two = (trainer(name, alpha=alpha).step()["loss"] for alpha in (0.0, 1.0, 2.0))
    assert one - zero > 0.1
    assert two - one == pytest.approx(one - zero, rel=1e-4)


@pytest.mark.parametrize(("depth", "exit", "blocks"), [(10, "small", 2), (18, "small", 2), (34, "same", 9)])
@pytest.mark.parametrize("stage", [2])
def test_exit_has_the_later_stages(depth: int, exit: str, blocks: int, stage: int) -> None:
    method = trainer("selfcon-s", depth=depth, exit=exit, exits=(stage,)).method
    assert sum(isinstance(module, Block) for module in method.exits.modules()) == blocks
    outputs = method.outputs(torch.rand(4, 1, 8, 8))
    assert [list(x.shape) for x in outputs] == [[4, 64], [4, 64]]


@pytest.mark.parametrize("exits", [(), (4,), (0, 1), (2, 2)])
def test_exits_that_cannot_be(exits: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="exits must be different stages of 1, 2, 3, got"):
        trainer("selfcon-s", exits=exits)


def test_saved_bytes_are_those_of_a_known_network() -> None:
    """A linear layer keeps its input, ReLU its output; weights and what is kept twice count once."""

    class Known(Method):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Linear(64, 10), torch.nn.Linear(10, 1)

        def forward(self, images: Any, labels: Any, draw: Any) -> Any:
            return self.last(self.first(images.flatten(1)).relu()).sum(), {}

    assert saved_bytes(Known(), load("digits", None, None)) == 4 * MEASURED * (64 + 10)


def test_two_views_keep_about_twice_the_memory() -> None:
    data = load("digits", None, None)
    one, two = (saved_bytes(trainer(name).method, data) for name in ("selfcon-s", "supcon"))
    assert 0.45 < one / two < 0.75
