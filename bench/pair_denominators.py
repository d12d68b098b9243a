"""Time and peak memory of SupCon with a denominator for each positive pair: NT-Xent over labels.

    python bench/pair_denominators.py --rows 4096 --of-a-class 8

Forward and backward, float32, on one thread: processor time, which other programs disturb less than the
clock, and by how much the resident set grew at its peak. A process measures one size.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import torch
import torch.nn.functional as F

import cl_kernels as clk


def step(x: torch.Tensor, labels: torch.Tensor) -> None:
    x.grad = None
    clk.supcon_loss(x[:, None], labels, denominator="one_positive").backward()


def inputs(rows: int, classes: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = F.normalize(torch.randn(rows, width), dim=1).requires_grad_()
    return x, torch.randint(0, classes, (rows,))


def peak() -> int:
    """The largest resident set so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--of-a-class", type=int, default=8, help="rows of a class, on average")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, labels = inputs(options.rows, max(1, options.rows // options.of_a_class), options.width)
    step(*inputs(64, 8, options.width))
    before, times = peak(), []
    for _ in range(options.repeats):
        start = time.process_time()
        step(x, labels)
        times.append(time.process_time() - start)
    grown = (peak() - before) / 1024
    print(f"{options.rows} rows: {statistics.median(times) * 1e3:.0f} ms, {grown:.0f} MiB")


if __name__ == "__main__":
    main()
