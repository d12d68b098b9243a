"""Labelled images, in memory or on disk, with one interface."""

from __future__ import annotations

import functools
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


class Images:
    """Images in memory: uint8 [N, C, H, W], labels int64 [N]."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4:
            raise ValueError(f"pixels: {pixels.dtype} {list(pixels.shape)}; wanted: uint8 [N, C, H, W]")
        if labels.dtype != torch.int64 or labels.shape != pixels.shape[:1]:
            raise ValueError(f"labels: {labels.dtype} {list(labels.shape)}; wanted: int64 [{len(pixels)}]")
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Images as float32 [B, C, H, W] in [0, 1]; indices: int64 [B]."""
        return self.pixels[indices].float().div_(255).contiguous()

    def prefetch(self, indices: Tensor) -> None:
        """Do nothing: the images are in memory."""

    def where(self, chosen: Tensor) -> Images:
        """Rows by index, int64 [M], or by mask, bool [N]."""
        return Images(self.pixels[chosen], self.labels[chosen])


class Folder(Images):
    """Images on disk with the interface of `Images`: RGB, `size` pixels square, decoded by threads."""

    def __init__(self, paths: list[str], labels: Tensor, size: int) -> None:
        if labels.dtype != torch.int64 or labels.shape != (len(paths),):
            raise ValueError(f"labels: {labels.dtype} {list(labels.shape)}; wanted: int64 [{len(paths)}]")
        self.paths, self.labels, self.size = paths, labels, size
        self.begun: dict[tuple[int, ...], list[Future[Tensor]]] = {}

    @property
    def pixels(self) -> Tensor:
        """All images, uint8 [N, 3, size, size], decoded anew each time."""
        return self.decoded(range(len(self)))

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self.decoded(self.rows(indices)).float().div_(255)

    def prefetch(self, indices: Tensor) -> None:
        """Begin to decode the images that are wanted next; two batches wait at most, the oldest goes."""
        rows = tuple(self.rows(indices))
        if rows not in self.begun:
            self.begun[rows] = self.begin(rows)
        while len(self.begun) > 2:
            for image in self.begun.pop(next(iter(self.begun))):
                image.cancel()

    def where(self, chosen: Tensor) -> Folder:
        rows = self.rows(chosen)
        return Folder([self.paths[i] for i in rows], self.labels[rows], self.size)

    def rows(self, chosen: Tensor) -> list[int]:
        return torch.arange(len(self))[chosen].tolist()

    def begin(self, rows: tuple[int, ...] | range) -> list[Future[Tensor]]:
        return [threads().submit(decode, self.paths[i], self.size) for i in rows]

    def decoded(self, rows: list[int] | range) -> Tensor:
        images = torch.empty(len(rows), 3, self.size, self.size, dtype=torch.uint8)
        decodings = self.begun.pop(tuple(rows), None) or self.begin(rows)
        for image, decoding in zip(images, decodings, strict=True):
            image.copy_(decoding.result())
        return images


@dataclass(frozen=True)
class Data:
    """Images to train and to test on, the number of classes to train on, and images without labels (-1)."""

    train: Images
    test: Images
    classes: int
    unlabelled: Images | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return tuple(self.train[torch.arange(1)].shape[1:])

    @property
    def channels(self) -> int:
        return self.shape[0]


@functools.cache
def threads() -> ThreadPoolExecutor:
    share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return ThreadPoolExecutor(max(share, 1), thread_name_prefix="decode")


def decode(path: str | Path, size: int) -> Tensor:
    """Read an image as RGB, uint8 [3, size, size]: shorter side resized (bicubic), centre square cut."""
    try:
        with Image.open(path) as image:
            square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's readers raise what they like
        raise ValueError(f"{path} cannot be decoded as an image: {error}") from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)
