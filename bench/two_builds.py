"""Times SupCon of two builds in turn, in a process each: `python bench/two_builds.py BEFORE AFTER N CLASSES`.

BEFORE and AFTER are folders that hold a built cl_kernels. Prints the least time of either and the median of
the ratios of neighbouring turns. CPU time by default, which a busy machine disturbs less than the clock.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

WORKER = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch
import cl_kernels
assert cl_kernels.__file__.startswith(sys.argv[1]), cl_kernels.__file__
rows, classes, threads = map(int, sys.argv[2:5])
dtype, kind = getattr(torch, sys.argv[5]), sys.argv[6]
backward, wall = (flag == "True" for flag in sys.argv[7:9])
torch.set_num_threads(threads)
torch.manual_seed(0)
features = torch.nn.functional.normalize(torch.randn(rows // 2, 2, 128), dim=-1).to(dtype)
features.requires_grad_(backward)
labels = torch.arange(rows // 2) % classes if classes else None
given = {"mask": labels[:, None] == labels} if kind == "mask" else {"labels": labels}
clock = time.perf_counter if wall else time.process_time
for _ in sys.stdin:
    start = clock()
    loss = cl_kernels.supcon_loss(features, temperature=0.1, **given)
    if backward:
        torch.autograd.grad(loss, features)
    print(clock() - start, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("rows", type=int, help="N, of 128 features and two views")
    parser.add_argument("classes", type=int, help="0: no labels")
    parser.add_argument("--positives", choices=["labels", "mask"], default="labels")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backward", action="store_true", help="and the backward")
    parser.add_argument("--wall", action="store_true", help="by the clock")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=20)
    args = parser.parse_args()

    options = (args.rows, args.classes, args.threads, args.dtype, args.positives, args.backward, args.wall)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder.resolve()), *map(str, options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder,
        )
        for folder in (args.before, args.after)
    ]  # fmt: skip

    def sample(worker: subprocess.Popen[str]) -> float:
        worker.stdin.write("\n")
        worker.stdin.flush()
        return 1e3 * float(worker.stdout.readline())

    for worker in workers:
        sample(worker)
    before, after = zip(*([sample(worker) for worker in workers] for _ in range(args.turns)), strict=True)
    ratio = statistics.median(b / a for a, b in zip(before, after, strict=True))
    print(f"before {min(before):.2f} ms, after {min(after):.2f} ms: {min(after) / min(before):.3f} times")
    print(f"median of {args.turns} neighbouring turns: {ratio:.3f} times")
    for worker in workers:
        worker.stdin.close()
        worker.wait()


if __name__ == "__main__":
    main()
