"""The table of launch shapes: by architecture, dtype, padded width and kernel.

A row is found for the architecture of a tensor's device, the kind of its dtype and its number of features
rounded up to a power of two; where the table has no row for that width, the next wider one serves, and the
widest row serves everything beyond, because such kernels walk the features in chunks of `block_d`.

Rows for sm_80 keep to the 99 KiB of shared memory that sm_86, sm_89 and sm_120 have too. Every row is
compiled ahead of time, and held to limits, by `make compile-gate`.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import NamedTuple

import torch

INTERPRETER = "interpreter"  # Triton's, on the CPU
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


class Shape(NamedTuple):
    """A launch shape: a program's tile, and how it is compiled."""

    block_m: int  # rows
    block_n: int  # columns
    block_d: int  # features at a time
    warps: int
    stages: int  # of the software pipeline


class Device(NamedTuple):
    """What a launcher needs to know of a device."""

    architecture: str
    processors: int  # multiprocessors, compute units


# Small tiles, so that small tests see several of them, tails and splits.
_INTERPRETED = Shape(16, 16, 16, 1, 1)

TABLE: dict[tuple[str, str, str], dict[int, Shape]] = {}

# (kernel, architecture) whose half tiles are too small for the widest matrix instruction of the architecture,
# wgmma on sm_90 and tcgen05 on sm_100; in all others it has to be found.
SMALL_PRODUCTS: frozenset[tuple[str, str]] = frozenset()


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        architecture = "gfx942"
    else:
        architecture = {9: "sm_90", 10: "sm_100"}.get(properties.major, "sm_80")
    return Device(architecture, properties.multi_processor_count)


def device_of(x: torch.Tensor) -> Device:
    """The device of a tensor; a CPU tensor is the interpreter's."""
    return Device(INTERPRETER, 4) if x.device.type == "cpu" else _cuda_device(x.device.index)


def dtype_kind(dtype: torch.dtype) -> str:
    return "float32" if dtype == torch.float32 else "half"


def padded(width: int) -> int:
    """The next power of two, at least 16: the least that a matrix instruction multiplies."""
    return max(16, 1 << (width - 1).bit_length())


def serving(rows: Collection[int], width: int) -> int:
    """The width of the row that serves: the next wider one, or the widest."""
    return min((known for known in rows if known >= width), default=max(rows))


def shape(kernel: str, x: torch.Tensor, width: int) -> Shape:
    """The launch shape of a kernel for features like `x`, `width` of them."""
    architecture = device_of(x).architecture
    if architecture == INTERPRETER:
        return _INTERPRETED
    rows = TABLE[kernel, architecture, dtype_kind(x.dtype)]
    return rows[serving(rows, width)]
