"""The recipe of DimCL: the sum of losses, hardness, and the published formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("tyro", reason="the examples' requirements are not installed")

from examples.common.augment import Draw
from examples.common.data import load
from examples.dimcl.__main__ import RECIPE, build, hardest
from examples.dimcl.presets import PRESETS

SMALL = replace(PRESETS["cpu"], data="digits", batch=64, width=4, hidden=16, projection=8, projection_wide=12)
BASES = ["byol", "simsiam", "simclr", "barlow"]


@pytest.fixture(scope="module")
def data():
    return load("digits")


@pytest.mark.parametrize("base", BASES)
def test_dimcl_is_weighed_beside_the_base(data, base):
    losses = {}
    for name in (base, f"{base}+dimcl"):
        torch.manual_seed(0)
        method = build(replace(SMALL, weight=0.25), name, data)
        losses[name] = method(data.train[torch.arange(64)], None, Draw(0, 0, 64))
    (alone, nothing), (total, parts) = losses.values()
    assert not nothing
    torch.testing.assert_close(parts["base"], alone)
    torch.testing.assert_close(total, 0.25 * parts["dimcl"] + 0.75 * alone)


def test_weight_outside_its_range_is_named(data):
    with pytest.raises(ValueError, match=r"weight must be from 0 to 1, got 1\.5"):
        build(replace(SMALL, weight=1.5), "byol+dimcl", data)


def test_barlow_is_the_published_sum(data):
    method = build(replace(SMALL, barlow_weight=0.3, barlow_scale=0.5), "barlow", data)
    z = [torch.randn(20, 3), torch.randn(20, 3)]
    loss = 0.0
    for i in range(3):
        for j in range(3):
            c = torch.corrcoef(torch.stack([z[0][:, i], z[1][:, j]]))[0, 1]
            loss += (1 - c) ** 2 if i == j else 0.3 * c**2
    torch.testing.assert_close(method.base([], z), 0.5 * loss, rtol=1e-3, atol=1e-4)


def test_hardest_tenth_between_its_limits():
    z = torch.randn(2, 100, 50, generator=torch.Generator().manual_seed(0))
    shares = [hardest(*z, temperature) for temperature in (1e4, 1.0, 0.1, 1e-4)]
    assert shares[0] == pytest.approx(10 / 98, rel=1e-3)  # of 98 negatives
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("base", BASES)
def test_the_published_formula_gives_the_same_losses_and_gradients(data, base):
    found = []
    for formula in ("cl_kernels", "eager"):
        settings = replace(SMALL, formula=formula)
        trainer = RECIPE.trainer(settings, f"{base}+dimcl", data, torch.device("cpu"))
        losses = [trainer.step()["loss"] for _ in range(2)]
        found.append((losses, [x.grad for x in trainer.method.parameters() if x.requires_grad]))
    (ours, gradients), (theirs, others) = found
    assert ours == pytest.approx(theirs, rel=1e-5)
    torch.testing.assert_close(gradients, others, rtol=1e-3, atol=1e-4)


def test_views_of_byol_differ_in_solarization(data):
    same, byol = (
        build(replace(SMALL, views=views), "byol", data).augmentations for views in ("same", "byol")
    )
    assert same[0] == same[1]
    assert [(view.solarize, view.blur, view.size) for view in byol] == [(0, 0, None), (0.2, 0, None)]
    assert replace(byol[1], solarize=0) == byol[0]


def test_each_view_has_its_augmentation(data):
    method = build(replace(SMALL, views="byol"), "byol", data)
    images, seen = data.train[torch.arange(64)], []
    method.base = lambda views, z: seen.extend(views) or z[0].sum()
    method(images, None, Draw(0, 0, 64))
    draw = Draw(0, 0, 64)
    for view, augment in zip(seen, method.augmentations, strict=True):
        assert torch.equal(view, augment(images, draw))
