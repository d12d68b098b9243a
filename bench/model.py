"""Times that the GPU kernels should take on an H200, on paper: the table in docs/performance.md.

For each workload the operations, exponentials and bytes of the schemes that the kernels follow, the
instructions that Triton's kernels issue for their tiles (gates/triton.tsv), and the time that each takes at
the chip's rate alone. The largest of the four is the floor of the scheme.
`python bench/model.py` prints the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import kernels

PRODUCTS = 790e12  # bf16 FLOP/s of a plain 8192^3 product
MEMORY = 4.3e12  # bytes/s of a copy, read and written
PROCESSORS, CLOCK, EXPONENTIALS = 132, 1.755e9, 16  # ex2 a clock and multiprocessor
CACHE = 50e6  # bytes of features that stay in the second-level cache
TILE = 128  # rows of a program
HALF, STATISTIC = 2, 8  # bytes
FEW_ROWS = ", few rows"  # fewer than class_sums.FEWEST_ROWS: label sums in the tiles of the log-sum-exp


@dataclass(frozen=True)
class Estimate:
    id: str
    work: str
    forward: float  # FLOPs
    backward: float
    bytes: float  # through device memory
    exponentials: float
    issues: float = 0.0  # clocks of multiprocessors

    @property
    def times(self) -> dict[str, float]:
        """Seconds by what is used up."""
        return {
            "products": (self.forward + self.backward) / PRODUCTS,
            "memory": self.bytes / MEMORY,
            "exponentials": self.exponentials / (PROCESSORS * EXPONENTIALS * CLOCK),
            "issue slots": self.issues / (PROCESSORS * CLOCK),
        }


def streamed(rows: float, keys: float, width: float) -> float:
    """Bytes of a pass in which every program of TILE rows walks all keys: the keys once where they stay in
    the cache, else once for each time that the chip fills with programs."""
    size = HALF * keys * width
    passes = 1 if size <= CACHE else -(-rows // (TILE * PROCESSORS))
    return HALF * rows * width + passes * size


def log_sum_exps(pairs: float, case: str, width: int) -> float:
    """Issue clocks of the tiles of so many pairs."""
    return pairs * kernels.issue_clocks("lse._lse_kernel", f"contrastive {case}", width)


def gradients(pairs: float, case: str, width: int) -> float:
    """Issue clocks of the fused kernel; wider, those of a tile are few beside its products."""
    if width > 256:
        return 0.0
    return pairs * kernels.issue_clocks("gradient_rows._gradient_rows_kernel", f"contrastive {case}", width)


def self_similarity(id: str, name: str, n: int, d: int, case: str = "self") -> Estimate:
    """The triangle for the log-sum-exp, N^2 D. Then each row's gradient from whole rows, 4 N^2 D: fused up to
    a width of 256, beyond it the final G is written in half precision and multiplied by a library."""
    pairs = n * n
    matrix = 2 * HALF * pairs if d > 256 else 0  # G, written and read
    moved = 2 * streamed(n, n, d) + HALF * n * d + matrix + 4 * STATISTIC * n  # features and the gradient
    issues = log_sum_exps(pairs / 2, case, d) + gradients(pairs, case.removesuffix(FEW_ROWS), d)
    return Estimate(id, f"{name} {n}² × {d}", pairs * d, 4 * pairs * d, moved, 1.5 * pairs, issues)


def one_axis(id: str, name: str, n: int, m: int, d: int) -> Estimate:
    """2 NMD for the log-sum-exp, 4 NMD for each of the two gradients."""
    pairs = n * m
    moved = 3 * streamed(n, m, d) + HALF * d * (n + m) + 4 * STATISTIC * n
    issues = log_sum_exps(pairs, "keys", d) + 2 * gradients(pairs, "keys", d)
    return Estimate(id, f"{name} {n} × {m} × {d}", 2 * pairs * d, 8 * pairs * d, moved, 3 * pairs, issues)


def frozen_keys(id: str, name: str, n: int, m: int, d: int) -> Estimate:
    """The log-sum-exp and the mean of the keys, which is the gradient, in one pass, 4 NMD; then O(ND)."""
    pairs = n * m
    moved = streamed(n, m, d) + 2 * (4 + HALF) * n * d + 4 * STATISTIC * n
    issues = pairs * kernels.issue_clocks("lse_frozen._frozen_kernel", "contrastive keys, frozen", d)
    return Estimate(id, f"{name} {n} × {m} × {d}, frozen keys", 4 * pairs * d, 0, moved, pairs, issues)


def both_axes(id: str, name: str, n: int, d: int) -> Estimate:
    """One pass for the log-sum-exps of both axes, 2 N^2 D; then 6 N^2 D by the final G in half precision,
    written once and read by the products of both gradients. Tiles as those of the triangle."""
    pairs = n * n
    moved = 2 * streamed(n, n, d) + 2 * HALF * n * d + 3 * HALF * pairs + 8 * STATISTIC * n
    issues = log_sum_exps(pairs, "self", d) + gradients(pairs, "self", d)
    return Estimate(id, f"{name} {n}² × {d}", 2 * pairs * d, 6 * pairs * d, moved, 2 * pairs, issues)


def sce(id: str, n: int, m: int, d: int, calls: int = 1) -> Estimate:
    """Logits of student and teacher and two weighted means of the keys, which both share, in one pass, 8 NMD;
    the backward is O(ND)."""
    pairs = calls * n * m
    rows = n * (HALF * d + 2 * 4 * d + 4 * STATISTIC)  # the teacher's, two float32 means, statistics
    moved = calls * (streamed(n, m, d) + rows)
    times = f"{calls} × " if calls > 1 else ""
    kernel, case = "soft_target_means._soft_target_means_kernel", "soft_target shared keys, frozen"
    issues = pairs * kernels.issue_clocks(kernel, case, d)
    return Estimate(id, f"SCE {times}{n} × {m} × {d}", 8 * pairs * d, 0, moved, 2 * pairs, issues)


def similarity(n: int, d: int) -> Estimate:
    """The matrix itself is written, and its gradient read by two products."""
    pairs = n * n
    moved = HALF * (3 * pairs + 6 * n * d)
    return Estimate("", f"similarity {n}² × {d}", 2 * pairs * d, 4 * pairs * d, moved, 0)


def log_softmax(n: int) -> Estimate:
    """Logits and result, then gradient, result and gradient, with a mask of bytes in both passes."""
    pairs = n * n
    return Estimate("", f"masked log-softmax {n}²", 0, 0, (5 * HALF + 2) * pairs, 2 * pairs)


def estimates() -> Iterator[Estimate]:
    yield self_similarity("A", "SupCon", 2048, 128, f"self, labels{FEW_ROWS}")
    yield self_similarity("C", "SelfCon", 4096, 128, f"self, labels{FEW_ROWS}")
    yield self_similarity("E", "SupCon", 8192, 128, "self, labels")
    yield self_similarity("F", "SupCon", 12288, 128, "self, labels")
    yield sce("G", 512, 65537, 256)
    yield sce("H", 256, 65537, 256, calls=10)
    yield sce("I", 256, 4097, 128)
    yield sce("I", 64, 65537, 256)
    yield self_similarity("L", "DimCL", 512, 256)
    yield self_similarity("L", "DimCL", 4096, 256)
    yield self_similarity("L", "DimCL", 16384, 2048)
    yield both_axes("N", "CLIP", 32768, 512)
    yield self_similarity("X", "NT-Xent", 131072, 128)
    yield self_similarity("X", "NT-Xent", 1048576, 128)
    yield one_axis("", "InfoNCE", 8192, 8192, 128)
    yield frozen_keys("", "InfoNCE", 256, 65536, 128)
    yield similarity(8192, 128)
    yield log_softmax(8192)


def quantity(value: float) -> str:
    """Three digits and a power of a thousand."""
    if value == 0:
        return "0"
    for power, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{value / power:.3g} {letter}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    micro = 1e6 * seconds
    return f"{micro:.1f}" if micro < 100 else f"{micro:.0f}"


def table() -> str:
    lines = [
        "| id | work | forward FLOPs | backward FLOPs | bytes | exponentials | products µs | memory µs "
        "| exponentials µs | issue slots µs | binding | measured |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    for estimate in estimates():
        times = estimate.times
        cells = (
            estimate.id, estimate.work, quantity(estimate.forward), quantity(estimate.backward),
            quantity(estimate.bytes), quantity(estimate.exponentials), *map(duration, times.values()),
            max(times, key=lambda name: times[name]), "not yet run on a GPU",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
