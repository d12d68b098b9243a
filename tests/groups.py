"""Processes of a Gloo group on this machine: what tests run in each of them, and how they report."""

from __future__ import annotations

import datetime
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_group(
    world: int, work: Callable[..., Any], folder: Path, *args: Any, timeout: float = 60
) -> list[Any]:
    """The results of `work(rank, *args)` in each of so many processes of one group; of one that failed, its
    traceback."""
    context = mp.get_context("spawn")
    join_at = (str(folder / "store"), world, timeout)
    processes = [
        context.Process(target=_main, args=(rank, join_at, str(folder), work, args)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    results = []
    for rank in range(world):
        path = folder / f"{rank}.pt"
        results.append(torch.load(path, weights_only=False) if path.exists() else "no report")
    return results


def _main(
    rank: int, join_at: tuple[str, int, float], folder: str, work: Callable[..., Any], args: Any
) -> None:
    store, world, timeout = join_at
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        result = work(rank, *args)
    except Exception:
        result = traceback.format_exc()
    torch.save(result, Path(folder) / f"{rank}.pt")
    os._exit(0)  # a group whose other processes are gone does not shut down
