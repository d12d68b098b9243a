"""Makes tests/data/*.npz, the compact set of oracle cases, from the folder of the whole set.

Of every file: the cases of up to SMALL bytes, and of the larger ones the smallest with each combination of
library, function, options (but temperatures), stored arrays and outcome (compared, refused, not finite). A
process of a run comes with the others. The same whole set gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import oracles
from oracles import Case

SMALL = 12_000
NOT_OPTIONS = ("B", "V", "D", "N", "K", "T", "seed", "shape", "note", "ids")
TEMPERATURES = ("temperature", "base_temperature", "temp", "temp_m", "tau_decor")


def size(case: Case) -> int:
    return sum(array.nbytes for array in case.arrays.values())


def kind(case: Case) -> str:
    """A key that says what a case covers."""

    def options(meta: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in meta.items() if key not in (*NOT_OPTIONS, *TEMPERATURES)}
        return {key: options(value) if isinstance(value, dict) else value for key, value in kept.items()}

    outcome = [oracles.skip_reason(case), oracles.not_finite(case)]
    return json.dumps([case.family, options(case.meta), sorted(case.arrays), outcome], sort_keys=True)


def compact(cases: tuple[Case, ...]) -> list[Case]:
    smallest: dict[str, Case] = {}
    for case in sorted(cases, key=lambda case: (size(case), case.name)):
        smallest.setdefault(kind(case), case)
    chosen = {case.name for case in cases if size(case) <= SMALL or smallest[kind(case)] is case}
    together = {other.name for case in cases if case.name in chosen for other in case.ranks()}
    return [case for case in cases if case.name in chosen | together]


def write(path: Path, cases: list[Case]) -> None:
    arrays = {"cases": np.array([case.name for case in cases])}
    for case in cases:
        arrays[f"{case.name}/meta"] = np.array(json.dumps(case.meta))
        arrays |= {f"{case.name}/{name}": array for name, array in case.arrays.items()}
    np.savez_compressed(path, **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the whole set")
    whole = parser.parse_args().folder
    oracles.DATA.mkdir(exist_ok=True)
    for path in sorted(whole.glob("*.npz")):
        cases = oracles.load(path)
        chosen = compact(cases)
        write(oracles.DATA / path.name, chosen)
        kib = (oracles.DATA / path.name).stat().st_size / 1024
        print(f"{path.stem}: {len(chosen)} of {len(cases)} cases, {kib:.0f} KiB")


if __name__ == "__main__":
    main()
