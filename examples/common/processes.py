"""The processes of torchrun, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


@contextmanager
def joined() -> Iterator[torch.device]:
    """Be one of the processes that torchrun started, if it did, on this process's device.

    Where one fails, it does not wait for the others, and torchrun ends them.
    """
    yield join()
    wait()
    if dist.is_initialized():
        dist.destroy_process_group()


def join() -> torch.device:
    """Join the processes that torchrun started, if it did; this process's device."""
    on_gpu = torch.cuda.is_available()
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        # The first evaluates while the others wait.
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=3))
    if not on_gpu:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def wait() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def agree(number: int) -> bool:
    """Whether all processes have the same number."""
    numbers = [number] * count()
    if count() > 1:
        dist.all_gather_object(numbers, number)
    return len(set(numbers)) == 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def group() -> dist.ProcessGroup | None:
    """All processes as the losses take them; None for one process."""
    return dist.group.WORLD if count() > 1 else None
