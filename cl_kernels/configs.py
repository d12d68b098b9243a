"""The launch shapes of Triton's kernels, by kernel, architecture, dtype and padded width.

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
    registers: int | None = None  # a thread's, at most (NVIDIA)


class Device(NamedTuple):
    """A device, as launchers see it."""

    architecture: str  # whose launch shapes it has
    processors: int  # multiprocessors, compute units
    chip: str  # what it is


# Small tiles, so that small tests see several of them, tails and splits.
_INTERPRETED = Shape(32, 16, 32, 1, 1)


Key = tuple[str, str, str]  # kernel, architecture, kind of dtype

TABLE: dict[Key, dict[int, Shape]] = {
    # Log-sum-exps, "lse_pairs" with labels or a mask. A thread holds its share of a tile of S and, where
    # columns are summed up too, as many sums: the larger, the fewer instructions a pair for all that comes on
    # top. Two programs share a multiprocessor at 255 registers with 4 warps and at 128 with 8, three at 168
    # with 4. What takes its last register spills with another release of Triton: wide rows with a mask
    # (DimCL's above all) have more than that.
    ("lse", "sm_80", "half"): {
        32: Shape(64, 64, 32, 4, 3),
        64: Shape(64, 64, 64, 4, 3),
        128: Shape(64, 64, 128, 4, 2),
        256: Shape(64, 64, 256, 4, 2),
        512: Shape(128, 128, 64, 8, 2),
    },
    ("lse_pairs", "sm_80", "half"): {
        32: Shape(64, 32, 32, 4, 3, 240),
        64: Shape(64, 32, 64, 4, 3, 240),
        128: Shape(64, 32, 128, 4, 2, 240),
        256: Shape(64, 32, 256, 8, 2, 240),
        512: Shape(128, 32, 64, 8, 3, 240),
    },
    ("lse", "sm_80", "float32"): {32: Shape(128, 32, 32, 8, 3)},
    ("lse_pairs", "sm_80", "float32"): {32: Shape(64, 32, 32, 8, 3)},
    ("lse", "sm_90", "half"): {
        32: Shape(64, 128, 32, 4, 3),
        64: Shape(64, 128, 64, 4, 3),
        128: Shape(64, 128, 128, 4, 2),
        256: Shape(64, 64, 256, 4, 2),
        512: Shape(128, 128, 64, 8, 3),
    },
    ("lse_pairs", "sm_90", "half"): {
        32: Shape(64, 32, 32, 4, 3),
        64: Shape(64, 32, 64, 4, 3),
        128: Shape(64, 32, 128, 4, 2),
        256: Shape(64, 32, 256, 8, 2, 240),
        512: Shape(128, 32, 64, 8, 3),
    },
    ("lse", "sm_90", "float32"): {32: Shape(128, 64, 32, 8, 3)},
    ("lse_pairs", "sm_90", "float32"): {32: Shape(64, 32, 32, 8, 3)},
    ("lse", "sm_100", "half"): {
        32: Shape(128, 32, 32, 8, 3, 240),
        64: Shape(128, 32, 64, 8, 3, 240),
        128: Shape(128, 32, 128, 8, 3, 240),
        256: Shape(128, 32, 256, 8, 2, 240),
        512: Shape(128, 32, 64, 8, 3, 240),
    },
    ("lse_pairs", "sm_100", "half"): {
        32: Shape(128, 32, 32, 8, 3, 240),
        64: Shape(128, 32, 64, 8, 3, 240),
        128: Shape(128, 32, 128, 8, 3, 240),
        256: Shape(64, 32, 256, 8, 3, 240),
        512: Shape(128, 32, 64, 8, 3, 240),
    },
    ("lse", "sm_100", "float32"): {32: Shape(128, 32, 32, 8, 3)},
    ("lse_pairs", "sm_100", "float32"): {32: Shape(64, 32, 32, 8, 3)},
    ("lse", "gfx942", "half"): {
        32: Shape(64, 64, 32, 4, 2),
        64: Shape(64, 64, 64, 4, 2),
        128: Shape(64, 64, 128, 4, 2),
        256: Shape(64, 32, 256, 4, 2),
        512: Shape(64, 64, 64, 4, 2),
    },
    ("lse_pairs", "gfx942", "half"): {
        32: Shape(64, 32, 32, 4, 2),
        64: Shape(64, 32, 64, 4, 2),
        128: Shape(64, 32, 128, 4, 2),
        256: Shape(64, 32, 256, 4, 2),
        512: Shape(64, 32, 64, 4, 2),
    },
    ("lse", "gfx942", "float32"): {64: Shape(64, 64, 64, 4, 2), 128: Shape(64, 64, 32, 4, 2)},
    ("lse_pairs", "gfx942", "float32"): {64: Shape(64, 32, 64, 4, 2), 128: Shape(64, 32, 32, 4, 2)},
}
# Rows of stride 1, as DimCL's, take registers for their addresses: chunks of the features whatever the width.
for _architecture in ARCHITECTURES:
    TABLE["lse_transposed", _architecture, "half"] = {512: TABLE["lse", _architecture, "half"][512]}

# Attention over frozen keys: a tile of S, and the mean of the keys, [block_m, width].
TABLE["lse_frozen", "sm_80", "half"] = {128: Shape(64, 64, 128, 8, 2), 256: Shape(32, 32, 256, 8, 2)}
TABLE["lse_frozen", "sm_90", "half"] = {128: Shape(64, 64, 128, 4, 2), 256: Shape(64, 64, 256, 8, 2)}
TABLE["lse_frozen", "sm_100", "half"] = {128: Shape(128, 32, 128, 8, 2), 256: Shape(64, 32, 256, 8, 2)}
TABLE["lse_frozen", "gfx942", "half"] = {128: Shape(64, 32, 128, 4, 1), 256: Shape(64, 32, 256, 8, 1)}
TABLE["lse_frozen", "sm_80", "float32"] = {64: Shape(32, 32, 64, 4, 2)}
TABLE["lse_frozen", "sm_90", "float32"] = {64: Shape(64, 32, 64, 4, 2)}
TABLE["lse_frozen", "sm_100", "float32"] = {64: Shape(32, 32, 64, 4, 2)}
TABLE["lse_frozen", "gfx942", "float32"] = {128: Shape(64, 32, 128, 4, 1)}

# A thread holds its share of a tile of S and of the gradient, [block_m, width], beside the addresses of
# features and what the columns bring: 255 registers decide the tiles. 64 rows on 4 warps rather than 128 on
# 8, the same for a thread, because two programs then share a multiprocessor: one multiplies while the other
# takes exponentials. float32 takes three products for one, and past 64 features is left to chunks of G. A
# mask is read in another order than S is held in, which costs as many registers again: half the columns.
TABLE["gradient_rows", "sm_80", "half"] = {128: Shape(64, 64, 128, 4, 2), 256: Shape(64, 32, 256, 8, 2)}
TABLE["gradient_rows", "sm_90", "half"] = {
    64: Shape(64, 128, 64, 4, 2),
    128: Shape(64, 64, 128, 4, 2),
    256: Shape(64, 32, 256, 4, 2),
}
TABLE["gradient_rows", "sm_100", "half"] = {128: Shape(128, 64, 128, 8, 2), 256: Shape(128, 32, 256, 8, 2)}
TABLE["gradient_rows", "gfx942", "half"] = {128: Shape(64, 32, 128, 4, 1)}
for _architecture in ("sm_80", "sm_90"):
    TABLE["gradient_rows_mask", _architecture, "half"] = {
        128: Shape(64, 32, 128, 4, 2),
        256: Shape(64, 32, 256, 8, 2),
    }
TABLE["gradient_rows_index", "sm_90", "half"] = {
    **TABLE["gradient_rows", "sm_90", "half"],
    256: Shape(64, 32, 256, 8, 2),
}
# Left to itself, the assembler aims at 128 registers here, and spills.
TABLE["gradient_rows_index", "sm_100", "half"] = {256: Shape(128, 32, 256, 8, 2, 255)}
TABLE["gradient_rows_mask", "sm_100", "half"] = {256: Shape(128, 32, 256, 8, 2)}
TABLE["gradient_rows", "sm_80", "float32"] = {64: Shape(32, 32, 64, 4, 2)}
TABLE["gradient_rows", "sm_90", "float32"] = {64: Shape(64, 32, 64, 4, 2)}
TABLE["gradient_rows", "sm_100", "float32"] = {64: Shape(64, 32, 64, 8, 2)}
TABLE["gradient_rows", "gfx942", "float32"] = {128: Shape(64, 32, 128, 4, 1)}

# Square; a second product and its atomic additions in the loop need more registers still.
for _architecture in ("sm_80", "sm_90", "sm_100"):
    TABLE["gradient_triangle", _architecture, "half"] = {128: Shape(64, 64, 128, 8, 2)}
    TABLE["gradient_triangle_mask", _architecture, "half"] = {128: Shape(32, 32, 128, 8, 2)}
    TABLE["gradient_triangle", _architecture, "float32"] = {64: Shape(32, 32, 64, 8, 2)}
    TABLE["gradient_triangle_mask", _architecture, "float32"] = {64: Shape(32, 32, 64, 8, 2)}
TABLE["gradient_triangle_labels", "sm_80", "half"] = {128: Shape(32, 32, 128, 8, 2)}
TABLE["gradient_triangle", "gfx942", "half"] = {128: Shape(32, 32, 128, 4, 1)}
TABLE["gradient_triangle", "gfx942", "float32"] = {128: Shape(32, 32, 128, 4, 1)}

# One row for every width: the features are walked in chunks, and no gradient is held.
TABLE["gradient_tiles", "sm_80", "half"] = {512: Shape(128, 64, 32, 8, 3)}
TABLE["gradient_tiles", "sm_90", "half"] = {512: Shape(128, 64, 64, 8, 3)}
TABLE["gradient_tiles", "sm_100", "half"] = {512: Shape(128, 64, 64, 8, 3)}
for _architecture in ("sm_80", "sm_90", "sm_100"):
    TABLE["gradient_tiles", _architecture, "float32"] = {512: Shape(128, 64, 32, 8, 3)}
TABLE["gradient_tiles", "gfx942", "half"] = {512: Shape(64, 64, 64, 4, 2)}
TABLE["gradient_tiles", "gfx942", "float32"] = {512: Shape(64, 64, 32, 4, 2)}

TABLE["similarity", "sm_80", "half"] = {128: Shape(128, 128, 32, 8, 4)}
TABLE["similarity", "sm_90", "half"] = {128: Shape(128, 256, 64, 8, 3)}
TABLE["similarity", "sm_100", "half"] = {128: Shape(128, 256, 64, 8, 3)}
TABLE["similarity", "gfx942", "half"] = {128: Shape(128, 128, 64, 8, 2)}
TABLE["similarity", "sm_80", "float32"] = {128: Shape(128, 64, 32, 8, 3)}
TABLE["similarity", "sm_90", "float32"] = {128: Shape(128, 128, 32, 8, 3)}
TABLE["similarity", "sm_100", "float32"] = {128: Shape(128, 128, 32, 8, 3)}
TABLE["similarity", "gfx942", "float32"] = {128: Shape(128, 128, 32, 8, 2)}

TABLE["similarity_gradient", "sm_80", "half"] = {
    64: Shape(128, 32, 64, 8, 3),
    128: Shape(128, 32, 128, 8, 2),
}
TABLE["similarity_gradient", "sm_90", "half"] = {
    64: Shape(128, 64, 64, 8, 3),
    128: Shape(128, 64, 128, 8, 3),
}
TABLE["similarity_gradient", "sm_100", "half"] = {
    64: Shape(128, 64, 64, 4, 3),
    128: Shape(128, 64, 128, 8, 3),
}
TABLE["similarity_gradient", "gfx942", "half"] = {
    64: Shape(128, 64, 64, 8, 2),
    128: Shape(128, 32, 128, 8, 2),
}
TABLE["similarity_gradient", "sm_80", "float32"] = {64: Shape(64, 32, 64, 8, 3)}
TABLE["similarity_gradient", "sm_90", "float32"] = {
    64: Shape(64, 32, 64, 8, 3),
    128: Shape(64, 32, 128, 8, 3),
}
TABLE["similarity_gradient", "sm_100", "float32"] = {
    64: Shape(64, 32, 64, 8, 3),
    128: Shape(64, 32, 128, 8, 3),
}
TABLE["similarity_gradient", "gfx942", "float32"] = {
    64: Shape(64, 32, 64, 8, 2),
    128: Shape(64, 32, 128, 8, 2),
}

# Kernels that stream rows or columns through registers: as much in each thread everywhere.
for _architecture in ARCHITECTURES:
    for _kind in ("half", "float32"):
        TABLE["reciprocal_norm", _architecture, _kind] = {
            128: Shape(16, 0, 128, 4, 1),
            512: Shape(4, 0, 512, 4, 1),
        }
        TABLE["similarity_rows", _architecture, _kind] = {
            128: Shape(16, 0, 128, 4, 1),
            512: Shape(2, 0, 512, 2, 1),
        }
        TABLE["log_softmax", _architecture, _kind] = {
            256: Shape(8, 256, 0, 4, 1),
            1024: Shape(2, 1024, 0, 4, 1),
            4096: Shape(1, 4096, 0, 4, 1),
            8192: Shape(1, 8192, 0, 8, 1),
            16384: Shape(1, 16384, 0, 16, 1),
        }
        TABLE["columns", _architecture, _kind] = {
            2048: Shape(512, 0, 16, 8, 1),
            8192: Shape(256, 0, 32, 8, 1),
        }

# soft_target.py: widths are those of a tile of keys, D where student and teacher share them, else D + E.
TABLE["soft_target", "sm_80", "half"] = {
    128: Shape(128, 64, 128, 8, 2),
    256: Shape(64, 32, 256, 4, 2),
    512: Shape(32, 32, 256, 4, 2),
    1024: Shape(64, 64, 64, 8, 3),
}
TABLE["soft_target", "sm_90", "half"] = {
    64: Shape(128, 64, 64, 8, 3),
    128: Shape(128, 128, 128, 8, 2),
    256: Shape(128, 64, 256, 8, 2),
    512: Shape(64, 64, 256, 8, 2),
    1024: Shape(128, 64, 64, 8, 3),
}
TABLE["soft_target", "sm_100", "half"] = {
    128: Shape(128, 64, 128, 8, 2),
    256: Shape(128, 64, 256, 8, 2),
    512: Shape(64, 64, 256, 8, 2),
    1024: Shape(64, 64, 64, 8, 3),
}
TABLE["soft_target", "gfx942", "half"] = {
    128: Shape(128, 64, 128, 8, 1),
    256: Shape(64, 32, 256, 4, 1),
    512: Shape(32, 32, 256, 4, 1),
    1024: Shape(64, 64, 64, 8, 1),
}
TABLE["soft_target", "sm_80", "float32"] = {1024: Shape(64, 32, 32, 8, 2)}
TABLE["soft_target", "sm_90", "float32"] = {1024: Shape(64, 64, 32, 8, 2)}
TABLE["soft_target", "sm_100", "float32"] = {1024: Shape(128, 64, 32, 8, 2)}
TABLE["soft_target", "gfx942", "float32"] = {1024: Shape(64, 64, 32, 4, 1)}

# soft_target_means.py, whose tiles hold 2 block_m rows of the whole width.
TABLE["soft_target_means", "sm_80", "half"] = {128: Shape(64, 64, 128, 8, 2), 256: Shape(32, 32, 256, 8, 2)}
TABLE["soft_target_means", "sm_90", "half"] = {128: Shape(64, 64, 128, 8, 3), 256: Shape(64, 32, 256, 8, 2)}
TABLE["soft_target_means", "sm_100", "half"] = {128: Shape(64, 64, 128, 8, 3), 256: Shape(64, 32, 256, 8, 3)}
TABLE["soft_target_means", "gfx942", "half"] = {128: Shape(64, 64, 128, 8, 1), 256: Shape(32, 32, 256, 8, 1)}
TABLE["soft_target_means", "sm_80", "float32"] = {64: Shape(32, 16, 64, 8, 2)}
TABLE["soft_target_means", "sm_90", "float32"] = {64: Shape(32, 32, 64, 8, 2)}
TABLE["soft_target_means", "sm_100", "float32"] = {64: Shape(32, 32, 64, 8, 1)}
TABLE["soft_target_means", "gfx942", "float32"] = {64: Shape(32, 32, 64, 8, 1)}

TABLE["soft_target_softmax", "sm_80", "half"] = {1024: Shape(128, 64, 64, 8, 3)}
TABLE["soft_target_softmax", "sm_90", "half"] = {1024: Shape(128, 64, 64, 8, 3)}
TABLE["soft_target_softmax", "sm_100", "half"] = {1024: Shape(128, 64, 64, 8, 3)}
TABLE["soft_target_softmax", "gfx942", "half"] = {1024: Shape(128, 64, 64, 8, 1)}
TABLE["soft_target_softmax", "sm_80", "float32"] = {1024: Shape(64, 64, 32, 8, 2)}
TABLE["soft_target_softmax", "sm_90", "float32"] = {1024: Shape(64, 64, 32, 8, 2)}
TABLE["soft_target_softmax", "sm_100", "float32"] = {1024: Shape(64, 64, 32, 8, 2)}
TABLE["soft_target_softmax", "gfx942", "float32"] = {1024: Shape(64, 64, 32, 4, 1)}

for _architecture in ARCHITECTURES:  # soft_target_gradient.py: no products, memory alone
    TABLE["soft_target_gradient", _architecture, "half"] = {1024: Shape(8, 1, 128, 4, 1)}
    TABLE["soft_target_gradient", _architecture, "float32"] = {1024: Shape(8, 1, 128, 4, 1)}


@functools.cache
def gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        chip = architecture = str(properties.gcnArchName).partition(":")[0]
    else:
        chip = architecture = f"sm_{properties.major}{properties.minor}"
        if properties.major >= 8:
            architecture = {9: "sm_90", 10: "sm_100"}.get(properties.major, "sm_80")
    return Device(architecture, properties.multi_processor_count, chip)


def unsuited(architecture: str) -> str | None:
    """Why Triton's kernels have no launch shapes for an architecture, or None."""
    if architecture in ARCHITECTURES:
        return None
    if architecture.startswith("sm_"):
        return f"takes GPUs from sm_80 on, for their shared memory and bfloat16, not {architecture}"
    return f"has launch shapes for gfx942 only among AMD's GPUs, not for {architecture}"


def device_of(x: torch.Tensor) -> Device:
    """The device of a tensor; a CPU tensor is the interpreter's."""
    return Device(INTERPRETER, 4, INTERPRETER) if x.device.type == "cpu" else gpu(x.device.index)


def dtype_kind(dtype: torch.dtype) -> str:
    return "float32" if dtype == torch.float32 else "half"


def padded(width: int) -> int:
    """The next power of two, at least 16: the least that a matrix instruction multiplies."""
    return max(16, 1 << (width - 1).bit_length())


def wide_enough(rows: Collection[int], width: int) -> int:
    """The width of the row for so many features: the next wider one, or the widest."""
    return min((known for known in rows if known >= width), default=max(rows))


def widest(kernel: str, x: torch.Tensor) -> int:
    """The widest features that a kernel which keeps all of them on chip takes."""
    architecture = device_of(x).architecture
    return 256 if architecture == INTERPRETER else max(TABLE[kernel, architecture, dtype_kind(x.dtype)])


def key(kernel: str, x: torch.Tensor, variant: str = "") -> Key:
    """The place in the table of a kernel's rows for features like `x`, or of kernel_variant's, if there."""
    architecture, kind = device_of(x).architecture, dtype_kind(x.dtype)
    own = (f"{kernel}_{variant}", architecture, kind)
    return own if own in TABLE else (kernel, architecture, kind)


def shape(kernel: str, x: torch.Tensor, width: int, variant: str = "") -> Shape:
    """The launch shape of a kernel for features like `x`, `width` of them."""
    if device_of(x).architecture == INTERPRETER:
        # The engine's forward and backward add up the features in the same steps, as on GPUs.
        whole = kernel == "lse" and width <= widest("gradient_rows", x)
        return _INTERPRETED._replace(block_d=padded(width)) if whole else _INTERPRETED
    rows = TABLE[key(kernel, x, variant)]
    return rows[wide_enough(rows, width)]
