"""Batched image augmentations and corruptions in plain torch, a function of (seed, step) alone.

Images are float32 [B, C, H, W] in [0, 1] with one or three channels, on the CPU or a GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import exactly
from .seeds import VIEWS, mixed

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: the Y of YIQ
TO_YIQ = torch.tensor([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
TO_GREY = torch.tensor(LUMA).expand(3, 3)
QUARTER_TURN = TO_YIQ.inverse() @ torch.tensor([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ TO_YIQ  # of the hue


class Draw:
    """Random numbers of one step: drawn for the whole batch, of which this process's rows are given.

    Every process draws all of them, so that a run's views do not depend on how many there are. The calls of
    one object go on in one stream: two views are two augmentations with the same `Draw`. The stream is set by
    `seed` and `step`.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        batch: int,
        rows: slice = slice(None),
        device: torch.device | str = "cpu",
    ) -> None:
        if min(seed, step) < 0:
            raise ValueError(f"seed and step are {seed} and {step}; neither may be negative")
        self.generator = torch.Generator().manual_seed(mixed(seed, VIEWS, step))
        self.batch, self.rows, self.device = batch, rows, torch.device(device)

    def __len__(self) -> int:
        """Own rows."""
        return len(range(*self.rows.indices(self.batch)))

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Numbers from `low` to `high`: float32 [own rows, *shape]."""
        numbers = torch.rand(self.batch, *shape, generator=self.generator)
        return numbers[self.rows].to(self.device) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers: float32 [own rows, *shape]."""
        return torch.randn(self.batch, *shape, generator=self.generator)[self.rows].to(self.device)

    def chance(self, probability: float) -> Tensor:
        """True with `probability`: bool [own rows]."""
        return self.uniform(0, 1) < probability


@dataclass(frozen=True)
class Augmentation:
    """Random views of images; a field at its default draws nothing and costs nothing.

    Geometry is one affine map, sampled bilinearly without a low-pass filter. Brightness, contrast,
    saturation, hue and greyscale are one affine map of the channels, in this order and clamped to [0, 1] at
    its end alone; the usual chains draw the order and clamp in between. Hue turns the plane of I and Q in
    YIQ, which keeps the luma: an approximation to the turn in HSV. On one channel saturation, hue and
    greyscale do nothing.
    """

    size: int | None = None  # side of the square output, stretched to it; None: as the input
    crop: tuple[float, float] | None = None  # range of the crop's area, in parts of the image
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # range of the crop's width over its height, where it fits
    flip: float = 0.0  # probability of a flip from left to right
    rotate: float = 0.0  # degrees to either side, at most
    zoom: tuple[float, float] | None = None  # range of the magnification
    shift: float = 0.0  # in parts of the side, along each axis, at most
    padding: str = "reflection"  # beyond the image, for rotate, zoom and shift: or "zeros", "border"
    jitter: tuple[float, float, float, float] | None = None  # brightness, contrast, saturation; hue in turns
    jitter_probability: float = 1.0
    greyscale: float = 0.0  # probability
    blur: float = 0.0  # probability of a Gaussian blur
    sigma: tuple[float, float] = (0.1, 2.0)  # range of its standard deviation, in pixels
    solarize: float = 0.0  # probability that values from 0.5 on are inverted
    erase: float = 0.0  # probability that a square is set to zero
    erase_side: tuple[float, float] = (0.15, 0.4)  # range of its side, in parts of the shorter side
    noise: float = 0.0  # standard deviation of Gaussian noise, which is not clamped

    def __post_init__(self) -> None:
        for name in ("flip", "jitter_probability", "greyscale", "blur", "solarize", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted is a probability from 0 to 1")
        if self.crop and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop is {self.crop}; wanted are two parts of the image, 0 < low <= high <= 1")

    @torch.no_grad()
    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Draw a view of each image: float32 [B, C, size, size], for the B rows of `draw`, on its device."""
        check(images, draw)
        with exactly(images):
            return self._view(images, draw)

    def _view(self, images: Tensor, draw: Draw) -> Tensor:
        images = self._move(images, draw)
        if self.jitter is not None or self.greyscale:
            images = self._colour(images, draw)
        if self.blur:
            chosen, sigma = draw.chance(self.blur), draw.uniform(*self.sigma)
            images = images.clone()
            images[chosen] = gaussian_blur(images[chosen], sigma[chosen])
        if self.solarize:
            inverted = (images >= 0.5) & draw.chance(self.solarize)[:, None, None, None]
            images = torch.where(inverted, 1 - images, images)
        if self.erase:
            side = draw.uniform(*self.erase_side) * draw.chance(self.erase)
            images = images * ~square(images, side, draw.uniform(0, 1, 2))
        if self.noise:
            images = images + self.noise * draw.normal(*images.shape[1:])
        return images

    def _move(self, images: Tensor, draw: Draw) -> Tensor:
        """Crop, flip, rotate, zoom, shift and resize."""
        h, w = images.shape[2:]
        size = (h, w) if self.size is None else (self.size, self.size)
        if size == (h, w) and not (self.crop or self.flip or self.rotate or self.zoom or self.shift):
            return images
        one = torch.ones(len(draw), device=draw.device)
        width, height, x, y, cos, sin = one, one, 0 * one, 0 * one, one, 0 * one  # in parts of the sides
        if self.crop:
            width, height = crop_sides(draw.uniform(*self.crop), draw.uniform(0, 1), self.ratio, w / h)
            x, y = (1 - width) * draw.uniform(-1, 1), (1 - height) * draw.uniform(-1, 1)
        if self.zoom:
            zoom = draw.uniform(*self.zoom)
            width, height = width / zoom, height / zoom
        if self.flip:
            width = torch.where(draw.chance(self.flip), -width, width)
        if self.rotate:
            angle = draw.uniform(-self.rotate, self.rotate).double() * (math.pi / 180)
            cos, sin = angle.cos().float(), angle.sin().float()
        if self.shift:
            x, y = (v + 2 * draw.uniform(-self.shift, self.shift) for v in (x, y))
        rows = cos * width, -sin * height * (h / w), x, sin * width * (w / h), cos * height, y
        return sample(images, torch.stack(rows, 1), size, self.padding)

    def _colour(self, images: Tensor, draw: Draw) -> Tensor:
        """Map colours x to b c (G + s (cos h (1 - G) + sin h Q)) x + t.

        Brightness is b, contrast c, saturation s, zero for greyscale, and hue h; G gives the luma, Q a
        quarter turn of the hue, and t = (1 - c) b times the mean luma.
        """
        b = c = s = torch.ones(len(draw), device=draw.device)
        hue = torch.zeros(len(draw), device=draw.device)
        if self.jitter is not None:
            chosen = draw.chance(self.jitter_probability)
            factors = (draw.uniform(max(0.0, 1 - v), 1 + v) for v in self.jitter[:3])
            b, c, s = (torch.where(chosen, factor, 1.0) for factor in factors)
            hue = draw.uniform(-self.jitter[3], self.jitter[3]) * chosen
        if self.greyscale:
            s = torch.where(draw.chance(self.greyscale), 0.0, s)
        offset = (1 - c) * b * luma(images).mean((1, 2))
        if images.shape[1] == 1:
            factor, offset = (v[:, None, None, None] for v in (b * c, offset))
            return torch.addcmul(offset, images, factor).clamp_(0, 1)
        angle = hue.double() * (2 * math.pi)
        cos, sin = ((s * turn.float())[:, None, None] for turn in (angle.cos(), angle.sin()))
        grey, quarter = TO_GREY.to(images.device), QUARTER_TURN.to(images.device)
        matrix = grey + cos * (torch.eye(3, device=images.device) - grey) + sin * quarter
        colours = torch.baddbmm(offset[:, None, None], matrix * (b * c)[:, None, None], images.flatten(2))
        return colours.clamp_(0, 1).view_as(images)


def check(images: Tensor, draw: Draw) -> None:
    """Raise a ValueError unless images are float32 [B, 1 or 3, H, W], where B are the rows of `draw`."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != torch.float32:
        raise ValueError(
            f"images are {images.dtype} {list(images.shape)}; wanted are float32 [B, C, H, W] with C 1 or 3"
        )
    if len(images) != len(draw):
        raise ValueError(f"images have {len(images)} rows, draw has {len(draw)}; wanted is one draw an image")


def crop_sides(
    area: Tensor, place: Tensor, ratio: tuple[float, float], image_ratio: float
) -> tuple[Tensor, Tensor]:
    """Widths and heights of crops, in parts of the image's, from their areas [B] and draws [B] in [0, 1).

    The ratio of a crop's sides is log-uniform where the crop lies inside, without a second try: every area is
    equally likely, where trying again until a crop fits makes the larger ones rarer.
    """
    least, most = (math.log(bound / image_ratio) for bound in ratio)
    widest = -area.double().log()  # log ratio of a crop as wide as the image; -widest: as high
    low, high = (-widest).clamp(min=least), widest.clamp(max=most)
    log_ratio = (low + place * (high - low)).clamp(-widest, widest)
    return ((log_ratio - widest) / 2).exp().float(), ((-log_ratio - widest) / 2).exp().float()


def sample(images: Tensor, maps: Tensor, size: tuple[int, int], padding: str = "reflection") -> Tensor:
    """Images at affine maps [B, 6] of the output's coordinates, in half sides of the input."""
    grid = F.affine_grid(maps.view(-1, 2, 3), [*images.shape[:2], *size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode=padding, align_corners=False)


def luma(images: Tensor) -> Tensor:
    """Grey values [B, H, W]: Y = 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601)."""
    if images.shape[1] == 1:
        return images[:, 0]
    return images[:, 0] * LUMA[0] + images[:, 1] * LUMA[1] + images[:, 2] * LUMA[2]


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image by its own standard deviation [B], in pixels; images go on mirrored, so means stay."""
    for axis in (2, 3):
        n = images.shape[axis]
        weights = (-0.5 * (torch.arange(2 * n, device=images.device) / sigma[:, None].double()) ** 2).exp()
        i = torch.arange(n, device=images.device)
        far = i[:, None] + i + 1
        matrix = weights[:, (i[:, None] - i).abs()] + weights[:, far] + weights[:, 2 * n - far]
        matrix = (matrix / matrix.sum(2, keepdim=True)).float()[:, None]  # [B, 1, n, n]
        images = matrix @ images if axis == 2 else images @ matrix.mT
    return images


def square(images: Tensor, side: Tensor, place: Tensor) -> Tensor:
    """Pixels, bool [B, 1, H, W], of squares with sides [B], in parts of the shorter, at places [B, 2]."""
    h, w = images.shape[2:]
    pixels = (side * min(h, w)).round()
    inside = []
    for n, part in ((h, place[:, 0]), (w, place[:, 1])):
        first = (part * (n - pixels)).round()[:, None]
        i = torch.arange(n, device=images.device)
        inside.append((i >= first) & (i < first + pixels[:, None]))
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]


# For greyscale digits of 28 x 28 pixels; own choice, from no paper. A flip would make another character.
DIGITS_STRONG = Augmentation(
    rotate=20, zoom=(0.8, 1.2), shift=0.1, padding="zeros", jitter=(0, 0.5, 0, 0), erase=0.3, noise=0.05
)
DIGITS_WEAK = Augmentation(rotate=8, shift=0.05, padding="zeros")
# Chen et al. 2020 (SimCLR), appendix B.9: strength 0.5 of (0.8, 0.8, 0.8, 0.2), no blur
SIMCLR_CIFAR = Augmentation(
    crop=(0.08, 1), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=0.8, greyscale=0.2
)
# Khosla et al. 2020 (SupCon), github.com/HobbitLong/SupContrast: main_supcon.py
SUPCON_CIFAR = replace(SIMCLR_CIFAR, crop=(0.2, 1))
# Chen et al. 2020 (MoCo v2), github.com/facebookresearch/moco: main_moco.py with --aug-plus
MOCO_V2 = replace(SUPCON_CIFAR, size=224, blur=0.5)
# Grill et al. 2020 (BYOL), table 6, for the one view and the other
BYOL_1 = replace(SIMCLR_CIFAR, size=224, jitter=(0.4, 0.4, 0.2, 0.1), blur=1.0)
BYOL_2 = replace(BYOL_1, blur=0.1, solarize=0.2)
# Denize et al. 2023 (SCE): the weak view
WEAK = Augmentation(crop=(0.2, 1), flip=0.5)


def supervised(shape: tuple[int, int, int]) -> Augmentation:
    """Choose the views of supervised contrast for images [C, H, W]: digits, small and large colour images."""
    channels, height, width = shape
    if channels == 1:
        return DIGITS_STRONG
    return SUPCON_CIFAR if max(height, width) <= 96 else MOCO_V2


Corruption = Callable[[Tensor, Draw, int], Tensor]
# Kinds of ImageNet-C (Hendrycks and Dietterich, 2019) that no view of digits has; the parameters are our own.
CORRUPTIONS: dict[str, Corruption] = {}


def corruption(function: Callable[[Tensor, Draw, float], Tensor]) -> Corruption:
    """Put into `CORRUPTIONS` a function of images, draw and severity 1 to 5, which gets severity / 5."""

    @torch.no_grad()
    @functools.wraps(function)
    def corrupt(images: Tensor, draw: Draw, severity: int) -> Tensor:
        check(images, draw)
        if severity not in range(1, 6):
            raise ValueError(f"severity is {severity}; wanted is an integer from 1 to 5")
        return function(images, draw, severity / 5).clamp(0, 1)

    CORRUPTIONS[function.__name__] = corrupt
    return corrupt


@corruption
def impulse_noise(images: Tensor, draw: Draw, strength: float) -> Tensor:
    """Set 25 % of the values at most to 0 or 1."""
    share, drawn = 0.25 * strength, draw.uniform(0, 1, *images.shape[1:])
    return torch.where(drawn < share, (drawn < share / 2).float(), images)


@corruption
def blur(images: Tensor, draw: Draw, strength: float) -> Tensor:
    """Blur by a standard deviation of 6 % of the shorter side at most."""
    sigma = 0.06 * strength * min(images.shape[2:])
    return gaussian_blur(images, torch.full((len(images),), sigma, device=images.device))


@corruption
def brightness(images: Tensor, draw: Draw, strength: float) -> Tensor:
    """Add 0.5 at most."""
    return images + 0.5 * strength


@corruption
def pixelate(images: Tensor, draw: Draw, strength: float) -> Tensor:
    """Average to fewer pixels, a quarter of the side at least, and repeat these."""
    h, w = images.shape[2:]
    rows, columns = (max(1, round(n * (1 - 0.75 * strength))) for n in (h, w))
    return F.interpolate(F.adaptive_avg_pool2d(images, (rows, columns)), size=(h, w))
