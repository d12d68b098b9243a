"""Clocks of a tile by what it uses up, from recorded figures, and the bounds of main kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

MULTIPLICATIONS = 2048  # of halves, a clock and multiprocessor of sm_90
EXPONENTIALS = 16
ISSUES = 4  # instructions of a warp
LONGEST_LOOP = 4000  # instructions that stay in the instruction caches

# By kernel: products of a tile's rows, columns and features, and exponentials a pair.
PER_TILE = {
    "lse._lse_kernel": (1, 1),
    "gradient_rows._gradient_rows_kernel": (2, 1),
    "lse_frozen._frozen_kernel": (2, 1),
    "soft_target_means._soft_target_means_kernel": (4, 2),
}
# Issue clocks over the larger of the other two, at most.
WANTED = {
    "lse._lse_kernel": 1.5,
    "gradient_rows._gradient_rows_kernel": 1.3,
    "lse_frozen._frozen_kernel": 1.3,
}
LABELS_WANTED = 1.15  # issue clocks of positives by label over those by index, in gradients
BOUND_AT = ("sm_90", "half", 128)  # architecture, kind of dtype, features
MAIN = ("self", "self, no positives", "self, labels", "keys", "both axes")  # cases of the engine
FROZEN = "keys, frozen"


def counted(architecture: str, kind: str, kernel: str) -> bool:
    """Whether a kernel's loop over tiles is counted, its row of configs.TABLE being of that kind of dtype."""
    return architecture == BOUND_AT[0] and kind == BOUND_AT[1] and kernel in PER_TILE


class Clocks(NamedTuple):
    """Clocks of a tile on a multiprocessor."""

    issue: float
    products: float
    exponentials: float
    pairs: int  # of the tile

    @property
    def ratio(self) -> float:
        """Issue clocks over those that something else takes anyway."""
        return self.issue / max(self.products, self.exponentials)


def clocks(row: Mapping[str, str], features: int | None = None) -> Clocks | None:
    """Clocks of a line of triton.tsv, by the names of its columns; None where no loop was counted.
    `features`: those that a loop over chunks goes around for, by default the row's width."""
    if row["hot"] == "-":
        return None
    products, exponentials = PER_TILE[row["kernel"]]
    block_m, block_n, *block_d = map(int, row["tile"].split("x"))
    hot, inner, warps = int(row["hot"]), int(row["inner"]), int(row["launch"].split("x")[0])
    width = int(row["row"].split()[-1])
    if inner:
        width = features or width
        hot += inner * (-(-width // block_d[0]) - 1)
    elif block_d:
        width = block_d[0]
    pairs = block_m * block_n
    return Clocks(
        hot * warps / ISSUES,
        products * pairs * width / MULTIPLICATIONS,
        exponentials * pairs / EXPONENTIALS,
        pairs,
    )


def _bound(row: Mapping[str, str]) -> bool:
    """Whether a row's features are those that the bounds are for."""
    return (row["architecture"], row["row"].split()[1], row["tile"].split("x")[-1]) == tuple(
        map(str, BOUND_AT)
    )


def wanted(row: Mapping[str, str]) -> float | None:
    """The ratio of issue clocks to the others that a main kernel should keep to."""
    main = row["case"].removeprefix("contrastive ") in (*MAIN, FROZEN)
    return WANTED.get(row["kernel"]) if main and _bound(row) else None


def of_labels(rows: Iterable[Mapping[str, str]]) -> float | None:
    """Issue clocks a pair of the gradient by label over those by index; None where either is not there."""
    issue = {}
    for row in rows:
        if row["kernel"] == "gradient_rows._gradient_rows_kernel" and _bound(row):
            made = clocks(row)
            if made is not None:
                issue[row["case"]] = made.issue / made.pairs
    labels, index = issue.get("contrastive self, labels"), issue.get("contrastive self")
    return None if labels is None or index is None else labels / index


def faults(row: Mapping[str, str]) -> list[str]:
    """Faults: a loop's size or issue clocks beyond their bounds."""
    if row["loop"] == "-":
        return []
    found = []
    if int(row["loop"]) > LONGEST_LOOP:
        found.append(f"a loop of {row['loop']} instructions, over {LONGEST_LOOP}")
    bound, made = wanted(row), clocks(row)
    if bound is not None and made is not None and made.ratio > bound:
        found.append(f"issue clocks {made.ratio:.2f} times the others, over {bound}")
    return found
