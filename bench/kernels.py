"""Tables of what compilers made of the GPU kernels, from the figures that the gates keep in gates."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

GATES = Path(__file__).resolve().parents[1] / "gates"
sys.path.append(str(GATES))

import issue_slots  # noqa: E402

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
MISSING = "–"

# What a line says, the kernel, the case that asked for it, and the features of its tile or, where a tile has
# them in chunks, of its row of configs.TABLE.
TRITON = (
    ("`lse` 128, positives by index", "lse._lse_kernel", "contrastive self", 128),
    ("`lse` 256, the same", "lse._lse_kernel", "contrastive self", 256),
    ("`lse` wider, the same", "lse._lse_kernel", "contrastive self", 512),
    ("`gradient_rows` 128, the same", "gradient_rows._gradient_rows_kernel", "contrastive self", 128),
    ("`gradient_rows` 256, the same", "gradient_rows._gradient_rows_kernel", "contrastive self", 256),
    ("`gradient_tiles`, any width", "gradient_chunks._gradient_tiles_kernel", "contrastive self", 512),
    ("`lse_frozen` 128", "lse_frozen._frozen_kernel", "contrastive keys, frozen", 128),
)

# Kernel, case and width of what the issue slots are told of.
SLOTS = (
    # That of labels is that without positives, but for few rows.
    *(
        ("lse._lse_kernel", f"contrastive {case}", 128)
        for case in ("self", "self, labels", "self, labels, few rows", "keys", "both axes")
    ),
    ("lse._lse_kernel", "contrastive self", 64),
    ("lse._lse_kernel", "contrastive self", 256),
    ("lse._lse_kernel", "contrastive self", 512),
    *(("gradient_rows._gradient_rows_kernel", f"contrastive {case}", 128) for case in issue_slots.MAIN),
    ("gradient_rows._gradient_rows_kernel", "contrastive self", 64),
    ("gradient_rows._gradient_rows_kernel", "contrastive self", 256),
    ("lse_frozen._frozen_kernel", "contrastive keys, frozen", 128),
    ("soft_target_means._soft_target_means_kernel", "soft_target shared keys, frozen", 256),
)

# CUDA C++ on Hopper: label, instance, columns that its hot path takes of 128 rows, features, products.
HOPPER_WARPS = 8  # that compute
HOPPER_CHUNK = 64  # features
HOPPER = (
    ("`lse_sm90` 128, self", "lse_kernel<HopperLoop<__nv_bfloat16, 2, 1>, true>", 256, 128, 1),
    ("`lse_sm90` 128, keys", "lse_kernel<HopperLoop<__nv_bfloat16, 2, 1>, false>", 128, 128, 1),
    ("`lse_sm90` 512, self", "lse_kernel<HopperLoop<__nv_bfloat16, 1, 2>, true>", 128, 512, 1),
    ("`gradient_rows_sm90` 64, self", "gradient_rows_kernel<__nv_bfloat16, 64, true>", 128, 64, 2),
    ("`gradient_rows_sm90` 128, self", "gradient_rows_kernel<__nv_bfloat16, 128, true>", 128, 128, 2),
    ("`gradient_rows_sm90` 256, self", "gradient_rows_kernel<__nv_bfloat16, 256, false>", 64, 256, 2),
    ("`attention_sm90` 128, keys, frozen", "attention_kernel<__nv_bfloat16, 128, true>", 128, 128, 2),
)


def recorded(file: str) -> list[dict[str, str]]:
    """The figures of a file by the names of its columns."""
    lines = [line.split("\t") for line in (GATES / file).read_text(encoding="utf-8").splitlines()]
    columns = next(cells for kind, *cells in lines if kind == "#")
    return [dict(zip(columns, cells, strict=True)) for kind, *cells in lines if kind == "figures"]


def compiler(file: str) -> str:
    text = (GATES / file).read_text(encoding="utf-8")
    found = re.search(r"^compiler\t(.*)$", text, re.MULTILINE)
    return found[1] if found else MISSING


def table(header: Iterable[str], rows: Iterable[Iterable[str]], numbers: bool) -> str:
    header = list(header)
    rule = ["---", *(["---:" if numbers else "---"] * (len(header) - 1))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def triton() -> str:
    """In half precision: tile, warps, registers a thread, KiB of shared memory."""
    lines = [line for line in recorded("triton.tsv") if line["row"].split()[1] == "half"]
    rows = []
    for label, kernel, case, width in TRITON:
        cells = [label]
        for architecture in ARCHITECTURES:
            wanted = {"architecture": architecture, "kernel": kernel, "case": case}
            found = [line for line in lines if wanted.items() <= line.items() and _features(line) == width]
            cells.append(_launch(found[0]) if found else MISSING)
        rows.append(cells)
    return table(["kernel, features, case", *ARCHITECTURES], rows, numbers=False) + total(
        "triton.tsv", "spilled"
    )


def total(file: str, column: str) -> str:
    """A sentence on all that a file has, whose bytes spilled stand in the column."""
    found = [int(line[column]) for line in recorded(file)]
    spilling = [spilled for spilled in found if spilled]
    most = f", {max(spilling)} bytes at most" if spilling else ""
    return f"\n\n{len(found)} kernels by {compiler(file)}, of which {len(spilling)} spill{most}."


def _features(line: Mapping[str, str]) -> int:
    """Features of the tile, or those of the row of the table, where its tile walks them in chunks."""
    tile, row = int(line["tile"].split("x")[-1]), int(line["row"].split()[-1])
    return row if row > 256 else tile


def _launch(line: Mapping[str, str]) -> str:
    warps = line["launch"].split("x")[0]
    shared = round(int(line["shared"]) / 1024)
    return f"{line['tile'].replace('x', '×')}, {warps}, {line['registers']}, {shared}"


def counted(kernel: str, case: str, width: int) -> dict[str, str]:
    """The line of a kernel's loop in the narrowest row of the table for so many features; of several, as for
    the gradients of queries and of keys, that with the longest hot path."""
    lines = [
        line
        for line in recorded("triton.tsv")
        if line["hot"] != "-" and line["kernel"] == kernel and line["case"] == case
    ]
    wide = [line for line in lines if _reach(line) >= width] or lines
    nearest = min(_reach(line) for line in wide)
    return max((line for line in wide if _reach(line) == nearest), key=lambda line: int(line["hot"]))


def _reach(line: Mapping[str, str]) -> int:
    """The features that a launch is for: those of its tile, unless that walks them in chunks."""
    block_d = line["tile"].split("x")[2:]
    return int(line["row"].split()[-1]) if line["inner"] != "0" or not block_d else int(block_d[0])


def issue_clocks(kernel: str, case: str, width: int) -> float:
    """Issue clocks of a pair on a multiprocessor of sm_90."""
    made = issue_slots.clocks(counted(kernel, case, width), width)
    assert made is not None
    return made.issue / made.pairs


def slots() -> str:
    """Instructions and clocks of a tile of main kernels on sm_90 in half precision."""
    rows = []
    for kernel, case, width in SLOTS:
        line = counted(kernel, case, width)
        made = issue_slots.clocks(line)
        assert made is not None
        bound = issue_slots.wanted(line)
        met = MISSING if bound is None else f"{bound}, {'met' if made.ratio <= bound else 'not met'}"
        name = kernel.partition(".")[0]
        rows.append(
            [
                f"`{name}` {width}, {case.removeprefix('contrastive ').removeprefix('soft_target ')}",
                line["tile"].replace("x", "×"),
                line["launch"].split("x")[0],
                line["hot"] + (f", {line['inner']} a chunk" if line["inner"] != "0" else ""),
                line["loop"],
                *(f"{clocks:.0f}" for clocks in made[:3]),
                f"{made.ratio:.2f}",
                met,
            ]
        )
    header = [
        "kernel, features, case", "tile", "warps", "hot path", "loop", "issue clocks", "product clocks",
        "exponential clocks", "ratio", "wanted",
    ]  # fmt: skip
    return table(header, [*rows, *hopper_slots()], numbers=True)


def hopper_slots() -> list[list[str]]:
    """The same of CUDA C++ kernels for Hopper, where a loop inside goes around for each chunk of features."""
    instances = {line["kernel"]: line for line in recorded("cuda.tsv")}
    rows = []
    for label, kernel, columns, width, products in HOPPER:
        line, pairs = instances[kernel], 128 * columns
        inner = int(line["inner"])
        instructions = int(line["hot"]) + inner * (width // HOPPER_CHUNK - 1)
        made = issue_slots.Clocks(
            instructions * HOPPER_WARPS / issue_slots.ISSUES,
            products * pairs * width / issue_slots.MULTIPLICATIONS,
            pairs / issue_slots.EXPONENTIALS,
            pairs,
        )
        hot = line["hot"] + (f", {inner} a chunk" if inner else "")
        clocks = (f"{clocks:.0f}" for clocks in made[:3])
        ratio = f"{made.ratio:.2f}"
        rows.append(
            [label, f"128×{columns}×{width}", str(HOPPER_WARPS), hot, line["loop"], *clocks, ratio, MISSING]
        )
    return rows


def cuda() -> str:
    """Over the instances of each kernel: registers by architecture, and what its machine code has."""
    kernels: dict[tuple[str, str], list[dict[str, str]]] = {}
    for line in recorded("cuda.tsv"):
        name = line["kernel"].split("<")[0].removesuffix("_kernel")
        kernels.setdefault((line["file"].removesuffix(".cu"), name), []).append(line)
    rows = []
    for (file, name), lines in sorted(kernels.items()):
        by_architecture = [
            _range(int(line["registers"]) for line in lines if line["architecture"] == architecture)
            for architecture in ("sm_80", "sm_90a")
        ]
        counts = [_range(int(line[column]) for line in lines) for column in ("HMMA", "HGMMA", "MUFU.EX2")]
        static = _range(int(line["shared"]) for line in lines)
        loops = [
            _range(int(line[column]) for line in lines if line[column] != "-") for column in ("hot", "loop")
        ]
        rows.append([f"`{file}`: `{name}`", *by_architecture, *counts, *loops, static])
    header = [
        "kernel", "registers sm_80", "sm_90a", "HMMA", "HGMMA", "exponentials", "hot path", "loop",
        "static shared bytes",
    ]  # fmt: skip
    return table(header, rows, numbers=True) + total("cuda.tsv", "spills")


def _range(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    if not found:
        return MISSING
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


TABLES = {"triton": triton, "slots": slots, "cuda": cuda}
