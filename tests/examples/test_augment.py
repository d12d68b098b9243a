"""Augmentations and corruptions: the same however the batch is split, and each as it says."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from examples.common import augment
from examples.common.augment import CORRUPTIONS, Augmentation, Draw

NAMED = [
    "DIGITS_STRONG",
    "DIGITS_WEAK",
    "SIMCLR_CIFAR",
    "SUPCON_CIFAR",
    "MOCO_V2",
    "BYOL_1",
    "BYOL_2",
    "WEAK",
]
ALL = Augmentation(
    crop=(0.3, 1),
    flip=0.5,
    rotate=20,
    zoom=(0.8, 1.2),
    shift=0.1,
    jitter=(0.4, 0.4, 0.4, 0.2),
    greyscale=0.2,
    blur=0.5,
    solarize=0.3,
    erase=0.5,
    noise=0.05,
)


def pictures(channels: int = 3, height: int = 20, width: int = 20, count: int = 13) -> Tensor:
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0))


def ramp(count: int, height: int = 32, width: int = 32) -> Tensor:
    """The first channel rises with x, the second with y, both by 1 over a side, as pixels' centres."""
    x, y = (torch.arange(n).add(0.5).div(n) for n in (width, height))
    planes = x.expand(height, -1), y[:, None].expand(-1, width), torch.zeros(height, width)
    return torch.stack(planes).expand(count, -1, -1, -1).contiguous()


def test_a_draw_is_set_by_seed_and_step() -> None:
    pairs = [(seed, step) for seed in (0, 1, 2, 2**32, 2**40) for step in (0, 1, 2, 1000)]
    streams = torch.stack([Draw(*pair, 4).uniform(0, 1, 16).flatten() for pair in pairs])
    assert len(streams.unique(dim=0)) == len(pairs)
    assert (
        torch.corrcoef(streams) - torch.eye(len(pairs))
    ).abs().max() < 0.6  # of 64 numbers: 0.125 typically
    draws = [Draw(5, 7, 4) for _ in range(2)]
    for name, arguments in (
        ("uniform", (2, 3, 5)),
        ("normal", (5,)),
        ("chance", (0.5,)),
        ("uniform", (0, 1)),
    ):
        first, again = (getattr(draw, name)(*arguments) for draw in draws)
        assert torch.equal(first, again) and first.shape[0] == 4
    assert not torch.equal(draws[0].normal(3), draws[0].normal(3))  # the second view's


def test_draws_have_their_ranges() -> None:
    draw = Draw(0, 0, 4000)
    uniform = draw.uniform(-2, 3)
    assert uniform.min() >= -2 and uniform.max() < 3 and abs(uniform.mean() - 0.5) < 0.1
    assert abs(draw.chance(0.2).float().mean() - 0.2) < 0.03
    assert abs(draw.normal().std() - 1) < 0.05
    assert not draw.chance(0).any() and draw.chance(1).all()


@pytest.mark.parametrize("cut", [6, 8])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["ALL", *NAMED, *CORRUPTIONS])
def test_rows_are_those_of_the_whole_batch(name: str, channels: int, cut: int) -> None:
    images = pictures(channels)

    def views(rows: slice) -> Tensor:
        draw = Draw(3, 4, len(images), rows)
        if name in CORRUPTIONS:
            return CORRUPTIONS[name](images[rows], draw, 3)
        view = ALL if name == "ALL" else getattr(augment, name)
        view = replace(view, size=view.size and 24)
        return torch.cat((view(images[rows], draw), view(images[rows], draw)), 1)

    halves = views(slice(cut)), views(slice(cut, None))
    assert torch.equal(views(slice(None)), torch.cat(halves))


def test_neutral_fields_draw_nothing_and_give_the_images() -> None:
    images, draw = pictures(), Draw(0, 0, 13)
    assert Augmentation()(images, draw) is images
    assert Augmentation(size=20)(images, draw) is images
    assert torch.equal(draw.uniform(0, 1), Draw(0, 0, 13).uniform(0, 1))
    identity = Augmentation(
        crop=(1, 1), rotate=1e-9, zoom=(1, 1), jitter=(0, 0, 0, 0), blur=1, sigma=(0.01, 0.02), erase=1e-9
    )
    torch.testing.assert_close(identity(images, draw), images, rtol=0, atol=2e-5)


@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (1.0, 1.0)])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 64)])
def test_crops_lie_inside_and_have_the_area(ratio: tuple[float, float], height: int, width: int) -> None:
    crop = Augmentation(size=16, crop=(0.2, 0.9), ratio=ratio)
    views = crop(ramp(2000, height, width), Draw(0, 0, 2000))
    centre = views[:, :2, 8, 8] - views[:, :2, 7, 7]  # of a step; away from the mirrored edge
    across, down = 16 * centre[:, 0], 16 * centre[:, 1]
    area = across * down
    assert 0.195 < area.min() < 0.23 and 0.86 < area.max() < 0.905
    assert abs(area.mean() - 0.55) < 0.02
    middle = views[:, :2, 7:9, 7:9].mean((2, 3))
    half = torch.stack((across, down), 1) / 2
    assert (middle - half).min() > -1e-3 and (middle + half).max() < 1 + 1e-3
    assert (middle - half).min() < 0.01 and (middle + half).max() > 0.99  # and reach the edges
    wide = across / down * width / height
    fits = (across < 0.995) & (down < 0.995)
    assert wide[fits].min() > ratio[0] - 0.01 and wide[fits].max() < ratio[1] + 0.01


def test_flip_flips() -> None:
    images = pictures()
    torch.testing.assert_close(
        Augmentation(flip=1)(images, Draw(0, 0, 13)), images.flip(3), rtol=0, atol=1e-5
    )
    some = Augmentation(flip=0.5)(images, Draw(0, 0, 13))
    flipped = [
        torch.allclose(view, image.flip(2), atol=1e-5) for view, image in zip(some, images, strict=True)
    ]
    kept = [torch.allclose(view, image, atol=1e-5) for view, image in zip(some, images, strict=True)]
    assert any(flipped) and any(kept) and sum(flipped) + sum(kept) == 13


def test_rotation_is_rigid_on_an_oblong_image() -> None:
    """Where both ramps rise by 1 a pixel, steps along both axes keep their length and their right angle."""
    images = ramp(64, 24, 60) * torch.tensor([60.0, 24, 0])[:, None, None]
    views = Augmentation(rotate=30)(images, Draw(0, 0, 64))
    right, down = (views[:, :2, end[0], end[1]] - views[:, :2, 11, 29] for end in ((11, 30), (12, 29)))
    torch.testing.assert_close(right.norm(dim=1), torch.ones(64), rtol=0, atol=1e-3)
    torch.testing.assert_close(down, torch.stack((-right[:, 1], right[:, 0]), 1), rtol=0, atol=1e-3)
    angle = torch.rad2deg(torch.atan2(right[:, 1], right[:, 0]))
    assert angle.abs().max() <= 30.1 and angle.min() < -20 and angle.max() > 20


def test_shift_and_zoom_have_their_ranges() -> None:
    def middle(views: Tensor) -> Tensor:
        return views[:, 0, 15:17, 15:17].mean((1, 2)) - 0.5

    images = ramp(500)
    moved = middle(Augmentation(shift=0.1)(images, Draw(0, 0, 500)))
    assert -0.101 < moved.min() < -0.09 and 0.09 < moved.max() < 0.101
    zoomed = Augmentation(zoom=(0.8, 1.25))(images, Draw(0, 0, 500))
    scale = 32 * (zoomed[:, 0, 16, 16] - zoomed[:, 0, 16, 15])
    assert middle(zoomed).abs().max() < 1e-5
    assert 0.79 < scale.min() < 0.82 and 1.2 < scale.max() < 1.26


@pytest.mark.parametrize("channels", [1, 3])
def test_hue_and_saturation_leave_grey_as_it_is(channels: int) -> None:
    grey = pictures(1).expand(-1, channels, -1, -1).contiguous()
    views = Augmentation(jitter=(0, 0, 0.9, 0.5))(grey, Draw(0, 0, 13))
    torch.testing.assert_close(views, grey, rtol=0, atol=2e-6)


def test_hue_keeps_the_luma_and_moves_colours() -> None:
    images = pictures() * 0.2 + 0.4  # none is clamped
    views = Augmentation(jitter=(0, 0, 0, 0.5))(images, Draw(0, 0, 13))
    torch.testing.assert_close(augment.luma(views), augment.luma(images), rtol=0, atol=1e-5)
    assert (views - images).abs().amax((1, 2, 3)).min() > 0.005


def test_brightness_contrast_and_saturation_have_their_meaning() -> None:
    images = pictures() * 0.2 + 0.4
    mean = augment.luma(images).mean((1, 2))
    bright = Augmentation(jitter=(0.3, 0, 0, 0))(images, Draw(0, 0, 13)) / images
    assert bright.std((1, 2, 3)).max() < 1e-5 and bright.min() < 0.85 and bright.max() > 1.15
    views = Augmentation(jitter=(0, 0.5, 0, 0))(images, Draw(0, 0, 13))
    torch.testing.assert_close(augment.luma(views).mean((1, 2)), mean, rtol=0, atol=1e-5)
    spread = views.std((1, 2, 3)) / images.std((1, 2, 3))
    assert 0.45 < spread.min() < 0.8 and 1.2 < spread.max() < 1.55
    both = Augmentation(jitter=(0.3, 0.5, 0, 0))(images, Draw(0, 0, 13))  # of the brightened image
    torch.testing.assert_close(augment.luma(both).mean((1, 2)), mean * bright[:, 0, 0, 0], rtol=0, atol=1e-5)
    views = Augmentation(jitter=(0, 0, 0.5, 0))(images, Draw(0, 0, 13))
    torch.testing.assert_close(augment.luma(views), augment.luma(images), rtol=0, atol=1e-5)


def test_greyscale_gives_equal_channels() -> None:
    images = pictures()
    views = Augmentation(greyscale=1)(images, Draw(0, 0, 13))
    torch.testing.assert_close(views, augment.luma(images)[:, None].expand_as(views), rtol=0, atol=1e-6)
    assert torch.equal(views[:, 0], views[:, 1]) and torch.equal(views[:, 0], views[:, 2])


def test_jitter_probability_leaves_the_others() -> None:
    images = pictures(count=200) * 0.2 + 0.4
    views = Augmentation(jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=0.8)(images, Draw(0, 0, 200))
    kept = (views - images).abs().amax((1, 2, 3)) < 1e-6
    assert 0.1 < kept.float().mean() < 0.3


def test_blur_keeps_constants_and_means_and_is_gaussian() -> None:
    constant = torch.full((13, 3, 20, 24), 0.3)
    blurred = Augmentation(blur=1)
    torch.testing.assert_close(blurred(constant, Draw(0, 0, 13)), constant, rtol=0, atol=1e-6)
    images = pictures(3, 20, 24)
    views = blurred(images, Draw(0, 0, 13))
    torch.testing.assert_close(views.mean((2, 3)), images.mean((2, 3)), rtol=0, atol=1e-5)
    assert (views.std((2, 3)) < images.std((2, 3)) + 1e-6).all()
    dot = torch.zeros(2, 1, 31, 31)
    dot[..., 15, 15] = 1
    spread = augment.gaussian_blur(dot, torch.tensor([1.0, 2.0]))[:, 0]
    square = torch.arange(-15.0, 16) ** 2
    for axis in (1, 2):
        torch.testing.assert_close(
            (spread.sum(axis) * square).sum(1), torch.tensor([1.0, 4.0]), rtol=1e-3, atol=0
        )


def test_solarize_and_erase() -> None:
    images = pictures()
    inverted = Augmentation(solarize=1)(images, Draw(0, 0, 13))
    assert torch.equal(inverted, torch.where(images < 0.5, images, 1 - images))
    erased = Augmentation(erase=1, erase_side=(0.3, 0.5))(images + 0.01, Draw(0, 0, 13)) == 0
    count = erased.sum((1, 2, 3)) // 3
    assert count.min() >= 6**2 and count.max() <= 10**2
    assert all(math.isqrt(n) ** 2 == n for n in count.tolist())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMED)
def test_named_views(name: str, channels: int) -> None:
    view = getattr(augment, name)
    images = pictures(channels, count=4).requires_grad_()
    before = images.detach().clone()
    draw = Draw(0, 0, 4)
    one, two = view(images, draw), view(images, draw)
    side = view.size or 20
    assert (
        one.shape == (4, channels, side, side) and one.dtype == torch.float32 and one.device == images.device
    )
    assert torch.equal(images, before) and not one.requires_grad
    assert not torch.equal(one, two)
    if not view.noise:
        assert one.min() >= 0 and one.max() <= 1 + 1e-6


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_grow_with_severity(name: str, channels: int) -> None:
    images = augment.gaussian_blur(pictures(channels, 28, 28), torch.full((13,), 1.0)).requires_grad_()
    distances = [0.0]
    for severity in range(1, 6):
        corrupt = CORRUPTIONS[name](images, Draw(0, 0, 13), severity)
        assert torch.equal(corrupt, CORRUPTIONS[name](images, Draw(0, 0, 13), severity))
        assert corrupt.shape == images.shape and corrupt.dtype == torch.float32 and not corrupt.requires_grad
        assert corrupt.min() >= 0 and corrupt.max() <= 1
        distances.append((corrupt - images).detach().norm().item())
    assert all(b > 1.05 * a for a, b in pairwise(distances)), distances


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"images are torch.uint8 \[2, 1, 8, 8\]"):
        augment.WEAK(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), Draw(0, 0, 2))
    with pytest.raises(ValueError, match=r"images are .* \[2, 2, 8, 8\]"):
        augment.WEAK(torch.zeros(2, 2, 8, 8), Draw(0, 0, 2))
    with pytest.raises(ValueError, match="images have 2 rows, draw has 3"):
        augment.WEAK(torch.zeros(2, 1, 8, 8), Draw(0, 0, 9, slice(1, 4)))
    with pytest.raises(ValueError, match="severity is 6"):
        CORRUPTIONS["blur"](torch.zeros(2, 1, 8, 8), Draw(0, 0, 2), 6)
    with pytest.raises(ValueError, match=r"crop is \(0.08, 8\)"):
        Augmentation(crop=(0.08, 8))
    with pytest.raises(ValueError, match="blur is 2"):
        Augmentation(blur=2)
    with pytest.raises(ValueError, match="seed and step are 1 and -1"):
        Draw(1, -1, 2)
