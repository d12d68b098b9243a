"""Triton's interpreter, which runs kernels on the CPU with numpy, made right where it is not.

It rounds float32 to bfloat16 by truncation, and multiplies bfloat16 tiles as the integers that hold them.
GPUs do neither. And the sums of its products depend on the shape of a tile and on a pair's place in it, as
numpy's do; a matrix unit adds the features in the same order for every pair, so that the forward and the
backward see the same logits, on which float32 at low temperatures relies: here sums are float64, rounded
once. Set TRITON_INTERPRET=1 before triton is imported, then call `repair()`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values, dtype=np.float32)
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)


def repair() -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast = builder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            return cast(self, handle(_float32(src.data), tl.float32), dst_type)
        if target == tl.bfloat16 and source != tl.bfloat16:
            return handle(_bfloat16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        x, y = (_float32(z.data) if z.dtype.scalar == tl.bfloat16 else z.data for z in (a, b))
        return handle(
            (x.astype(np.float64) @ y.astype(np.float64) + d.data).astype(d.data.dtype), d.dtype.scalar
        )

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
