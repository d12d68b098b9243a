"""Image data on disk, as their authors distribute them."""

from __future__ import annotations

import codecs
import csv
import io
import os
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .images import Data, Folder, Images

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
LAYOUTS = {
    "cifar10": "cifar-10-batches-py/ with data_batch_1 to data_batch_5 and test_batch (the Python version)",
    "cifar100": "cifar-100-python/ with train and test (the Python version)",
    "stl10": "stl10_binary/ with train_X.bin, train_y.bin, test_X.bin, test_y.bin and unlabeled_X.bin",
    "miniimagenet": "train/ and test/ of class folders, or train.csv, test.csv (filename,label) and images/",
    "imagenet": "train/ and val/, each with a folder of images for every class, named alike in both",
}


def cifar10(root: Path | None, size: int | None) -> Data:
    """CIFAR-10, [3, 32, 32]: 50,000 to train, 10,000 to test."""
    names = [f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)]
    train = cifar("cifar10", root, names, b"labels")
    return Data(train, cifar("cifar10", root, ["cifar-10-batches-py/test_batch"], b"labels"), 10)


def cifar100(root: Path | None, size: int | None) -> Data:
    """CIFAR-100 with its 100 fine labels, [3, 32, 32]: 50,000 to train, 10,000 to test."""
    parts = (cifar("cifar100", root, [f"cifar-100-python/{x}"], b"fine_labels") for x in ("train", "test"))
    return Data(*parts, 100)


def cifar(data: str, root: Path | None, names: list[str], key: bytes) -> Images:
    pixels, labels = [], []
    for name in names:
        path = found(data, root, name)
        try:
            batch = Arrays(io.BytesIO(path.read_bytes()), encoding="bytes").load()
            pixels.append(torch.from_numpy(batch[b"data"]).view(-1, 3, 32, 32))
            labels += batch[key]
        except Exception as error:  # a broken pickle raises anything
            raise ValueError(f"{path} is no part of {data}: {error!r}") from error
    return Images(torch.cat(pixels), torch.tensor(labels))


class Arrays(pickle.Unpickler):
    """An unpickler of containers, numbers, strings and NumPy arrays, and of nothing else."""

    def find_class(self, module: str, name: str) -> object:
        rebuild = np.empty(0).__reduce__()[0]  # in another module with each NumPy
        known = {"_reconstruct": rebuild, "ndarray": np.ndarray, "dtype": np.dtype, "encode": codecs.encode}
        if name not in known:
            raise pickle.UnpicklingError(f"{module}.{name} in a file that should hold arrays only")
        return known[name]


def stl10(root: Path | None, size: int | None) -> Data:
    """STL-10, [3, 96, 96]: 5,000 to train, 8,000 to test, 100,000 without labels."""
    parts = {part: stl10_pixels(root, part) for part in ("train", "test", "unlabeled")}
    train, test = (Images(parts[part], stl10_labels(root, part)) for part in ("train", "test"))
    without = torch.full((len(parts["unlabeled"]),), -1)
    return Data(train, test, 10, Images(parts["unlabeled"], without))


def stl10_pixels(root: Path | None, part: str) -> Tensor:
    path = found("stl10", root, f"stl10_binary/{part}_X.bin")
    values = np.fromfile(path, np.uint8)
    if values.size % (3 * 96 * 96):
        raise ValueError(f"{path} has {values.size} bytes; wanted: a multiple of 3 x 96 x 96")
    return torch.from_numpy(values.reshape(-1, 3, 96, 96)).transpose(2, 3)  # stored column by column


def stl10_labels(root: Path | None, part: str) -> Tensor:
    return (
        torch.from_numpy(np.fromfile(found("stl10", root, f"stl10_binary/{part}_y.bin"), np.uint8)).long() - 1
    )


def miniimagenet(root: Path | None, size: int | None) -> Data:
    """The train classes of miniImageNet, 84 pixels square by default; every sixth image is to test on."""
    classes = miniimagenet_part(root, "train")
    images = folder(classes, size or 84)
    held = torch.arange(len(images)) % 6 == 5  # 100 of a class's 600
    return Data(images.where(~held), images.where(held), len(classes))


def miniimagenet_few_shot(root: Path | None, size: int | None) -> Data:
    """The train and the test classes of miniImageNet, each numbered from 0."""
    train, test = (miniimagenet_part(root, part) for part in ("train", "test"))
    if both := train.keys() & test.keys():
        raise ValueError(f"{root}: class {min(both)} is in train and in test; wanted: different classes")
    return Data(folder(train, size or 84), folder(test, size or 84), len(train))


def miniimagenet_part(root: Path | None, part: str) -> dict[str, list[str]]:
    if root is None or (root / part).is_dir():
        return by_class("miniimagenet", root, part)
    with found("miniimagenet", root, f"{part}.csv").open(newline="") as table:
        rows = csv.DictReader(table)
        if not {"filename", "label"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{table.name} has the columns {rows.fieldnames}; wanted: filename, label")
        images, classes = found("miniimagenet", root, "images"), {}
        for row in rows:
            classes.setdefault(row["label"], []).append(str(images / row["filename"]))
    return {name: sorted(classes[name]) for name in sorted(classes)}


def imagenet(root: Path | None, size: int | None) -> Data:
    """ImageNet, 256 pixels square by default, or those of its classes in train/; val/ may have more."""
    train, val = by_class("imagenet", root, "train"), by_class("imagenet", root, "val")
    if missing := [name for name in train if name not in val]:
        raise FileNotFoundError(f"{root}/val has no {missing[0]}/; wanted: {LAYOUTS['imagenet']}")
    test = folder({name: val[name] for name in train}, size or 256)
    return Data(folder(train, size or 256), test, len(train))


def by_class(data: str, root: Path | None, part: str) -> dict[str, list[str]]:
    """The images of each class folder, both sorted by name."""
    top = found(data, root, part)
    classes = {}
    for name in sorted(entry.name for entry in os.scandir(top) if entry.is_dir()):
        images = sorted(x.path for x in os.scandir(top / name) if x.name.lower().endswith(SUFFIXES))
        if not images:
            raise FileNotFoundError(f"{top / name} has no images ({', '.join(SUFFIXES)})")
        classes[name] = images
    if not classes:
        raise FileNotFoundError(f"{top} has no folders; wanted in {root}: {LAYOUTS[data]}")
    return classes


def folder(classes: dict[str, list[str]], size: int) -> Folder:
    counts = torch.tensor([len(paths) for paths in classes.values()])
    labels = torch.arange(len(classes)).repeat_interleave(counts)
    return Folder([path for paths in classes.values() for path in paths], labels, size)


def found(data: str, root: Path | None, name: str) -> Path:
    if root is None:
        raise ValueError(f"root is needed for {data}: a folder that has {LAYOUTS[data]}")
    if not (root / name).exists():
        raise FileNotFoundError(f"{root} has no {name}; {data} wants {LAYOUTS[data]}")
    return root / name


LOADERS = (cifar10, cifar100, stl10, miniimagenet, imagenet)
