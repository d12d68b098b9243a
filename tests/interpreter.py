"""Triton's interpreter, which runs kernels on the CPU with numpy, made right where it is not.

It rounds float32 to bfloat16 by truncation, and multiplies bfloat16 tiles as the integers that hold them.
GPUs do neither. Set TRITON_INTERPRET=1 before triton is imported, then call `repair()`.
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
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            return cast(self, handle(_float32(src.data), tl.float32), dst_type)
        if target == tl.bfloat16 and source != tl.bfloat16:
            return handle(_bfloat16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (handle(_float32(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
