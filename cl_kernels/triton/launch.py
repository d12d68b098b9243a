"""Arguments as kernels take them, and sizes of grids: shared by the launchers."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import configs
from .tiles import Matrix


def precision(x: Tensor) -> str:
    """The precision of products of tiles like `x`, as `tiles.dot` takes it.

    float32 follows `torch.get_float32_matmul_precision()`: "highest" is float32's accuracy, by three tf32
    products on NVIDIA and natively on AMD, "high" tf32, "medium" bfloat16. Half tiles always multiply as they
    are, with float32 sums.
    """
    if x.dtype != torch.float32:
        return "ieee"
    asked = torch.get_float32_matmul_precision()
    exact = "tf32x3" if configs.device_of(x).architecture.startswith("sm_") else "ieee"
    return {"highest": exact, "high": "tf32", "medium": "bf16"}[asked]


def scalar(x: Tensor) -> float | Tensor:
    """A 0-dim tensor as a kernel argument: its value from the CPU, else itself; never a synchronisation."""
    return x.item() if x.device.type == "cpu" else x


def matrix(x: Tensor | None) -> Matrix | None:
    return None if x is None else Matrix(x, *x.stride())


def require_features(x: Tensor) -> None:
    if x.shape[1] == 0:
        raise ValueError(f"q must be [N, D] with features, got {list(x.shape)}")


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def splits(parallel: int, serial: int, x: Tensor, waves: int = 4) -> int:
    """The number of parts to cut a loop of `serial` steps into, of which `parallel` run side by side, so that
    they fill the device about `waves` times."""
    wanted = cdiv(waves * configs.device_of(x).processors, parallel)
    per_part = cdiv(serial, min(wanted, serial))
    return cdiv(serial, per_part)


def options(tile: configs.Shape) -> dict[str, int]:
    """Triton's options of compilation for a launch shape."""
    chosen = {"num_warps": tile.warps, "num_stages": tile.stages}
    return chosen if tile.registers is None else {**chosen, "maxnreg": tile.registers}


def mm_float32(a: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
    """a b in float32, sums too, of matrices of one dtype; added to `onto`, which may be overwritten."""
    if a.dtype == torch.float32 or a.device.type == "cpu":
        a, b = a.float(), b.float()
        return a @ b if onto is None else onto.addmm_(a, b)
    if onto is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(onto, a, b, out_dtype=torch.float32)
