"""The recipe of SCE: schedules, its queue, pairs of views, and the published formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("tyro", reason="the examples' requirements are not installed")

from examples.common.augment import WEAK, Draw
from examples.common.data import load
from examples.common.momentum import cosine, follow, follower
from examples.sce.__main__ import RECIPE, SCE, full_queue, scheduled, small_views
from examples.sce.presets import PRESETS, SCESettings

SMALL = replace(PRESETS["cpu"], data="digits", batch=64, width=4, hidden=16, projection=8, queue=128)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data():
    return load("digits")


def test_a_value_without_a_start_is_constant():
    assert {scheduled(SCESettings(coeff=0.3), "coeff", x) for x in (0, 0.4, 1)} == {0.3}


@pytest.mark.parametrize(
    ("schedule", "epochs", "progress", "value"),
    [
        ("cosine", None, 0, 1.0),
        ("cosine", None, 0.5, 0.75),
        ("cosine", None, 1, 0.5),
        ("linear", None, 0.25, 0.875),
        ("linear", 2, 0.1, 0.75),  # half of the warm-up
        ("linear", 2, 0.2, 0.5),
        ("cosine", 2, 0.9, 0.5),
    ],
)
def test_schedule(schedule, epochs, progress, value):
    settings = SCESettings(epochs=10, coeff=0.5, coeff_start=1.0, schedule=schedule, schedule_epochs=epochs)
    assert scheduled(settings, "coeff", progress) == pytest.approx(value)


def test_wrong_settings_are_named(data):
    with pytest.raises(ValueError, match="crops must be at least 0, got -1"):
        SCE(replace(SMALL, crops=-1), "sce", data)
    with pytest.raises(ValueError, match="schedule_epochs must be positive, got 0"):
        SCE(replace(SMALL, coeff_start=1.0, schedule_epochs=0), "sce", data)


def test_what_a_method_fixes_no_schedule_moves(data):
    method = SCE(replace(SMALL, coeff_start=0.9, temperature=0.2), "ressl", data)
    method.before_step(0.5)
    assert method.now == {"temperature": 0.1, "target_temperature": 0.04, "coeff": 0.0}


def test_cosine_ends_where_it_should():
    assert [cosine(0.9, 1.0, x) for x in (0, 0.5, 1, 2)] == pytest.approx([0.9, 0.95, 1, 1])


def test_the_teacher_follows():
    online = torch.nn.Linear(2, 2)
    target = follower(online)
    old = target.weight.clone()
    with torch.no_grad():
        online.weight += 1
    follow(target, online, 0.75)
    torch.testing.assert_close(target.weight, old + 0.25)
    assert not any(x.requires_grad for x in target.parameters())


def test_the_queue_begins_full_of_unit_rows():
    queue = full_queue(16, 4)
    torch.testing.assert_close(queue.filled.norm(dim=1), torch.ones(16))


def test_small_views_have_the_authors_sizes():
    views = small_views(WEAK, 4, 224)
    assert [view.size for view in views] == [192, 160, 128, 96]
    assert views[-1].crop == pytest.approx((0.0857, 0.4286), abs=1e-4)


@pytest.mark.parametrize(("symmetric", "crops", "count"), [(False, 0, 1), (True, 0, 2), (True, 4, 10)])
def test_losses_of_a_step(data, monkeypatch, symmetric, crops, count):
    method = SCE(replace(SMALL, symmetric=symmetric, crops=crops), "sce", data)
    made = []
    losses = method.losses
    monkeypatch.setattr(method, "losses", lambda *x: made.extend(losses(*x)) or made[-len(x[0]) :])
    loss, _ = method(data.train[torch.arange(64)], None, Draw(0, 0, 64))
    assert len(made) == count
    torch.testing.assert_close(loss, torch.stack(made).mean())


@pytest.mark.parametrize("name", ["sce", "ressl", "moco"])
@pytest.mark.parametrize("views", [{}, {"symmetric": True, "crops": 2, "predictor": True}])
def test_the_published_formula_gives_the_same_losses_and_gradients(data, name, views):
    found = []
    for formula in ("cl_kernels", "eager"):
        trainer = RECIPE.trainer(replace(SMALL, formula=formula, **views), name, data, CPU)
        losses = [trainer.step()["loss"] for _ in range(2)]
        found.append((losses, [x.grad for x in trainer.method.parameters() if x.requires_grad]))
    (ours, gradients), (theirs, others) = found
    assert ours == pytest.approx(theirs, rel=1e-5)
    torch.testing.assert_close(gradients, others, rtol=1e-3, atol=1e-5)
