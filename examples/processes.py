"""Shared by the examples over processes: the group, and each process's part of a batch."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor


def join() -> torch.device:
    """Join the processes that torchrun started; this process's device."""
    on_gpus = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpus else "gloo")
    if not on_gpus:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def parts(rows: int, batch: int, steps: int) -> Iterator[Tensor]:
    """This process's indices of each step's batch, of which no process has another's."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shuffle = torch.Generator().manual_seed(0)  # the same everywhere
    torch.manual_seed(1 + rank)  # augmentations are each process's own
    for _ in range(steps):
        yield torch.randperm(rows, generator=shuffle)[:batch][rank::world]


def leave(text: str) -> None:
    """Wait for all, and let the first process say how it went."""
    if dist.get_rank() == 0:
        print(text)
    dist.barrier()
    dist.destroy_process_group()
