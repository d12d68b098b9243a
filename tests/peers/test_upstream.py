"""The patches of docs/upstream name what the adapters replace, and apply to clones of the libraries."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
from peers.repositories import clone

from cl_kernels.integrations import LIBRARIES, _swap

PATCHES = sorted((Path(__file__).resolve().parents[2] / "docs" / "upstream").glob("*.patch"))
CLONES = {
    "dimcl": "DimCL",
    "pytorch_metric_learning": "pytorch-metric-learning",
    "solo_learn": "solo-learn",
    "swift": "ms-swift",
}

pytestmark = pytest.mark.skipif(not PATCHES, reason="not a source checkout")


def targets(patch: Path) -> set[str]:
    """The names that its added lines give to the hook."""
    found, module = set(), ""
    for line in patch.read_text().splitlines():
        if line.startswith("+++ b/"):
            module = line[6:].removeprefix("src/").removesuffix(".py").replace("/", ".")
        elif line.startswith("+"):
            found |= set(re.findall(r"[\"']([\w.]+:[\w.]+)[\"']", line.replace("{__name__}", module)))
    return found


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_targets_are_replaced(patch: Path) -> None:
    if LIBRARIES[patch.stem].distribution is not None and patch.stem != "swift":
        pytest.importorskip(patch.stem)
    import_module(f"cl_kernels.integrations.{patch.stem}")
    here = {target for target, swap in _swap.SWAPS.items() if swap.library == patch.stem}
    assert targets(patch) and targets(patch) <= here


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_applies(patch: Path) -> None:
    place = clone(CLONES.get(patch.stem, patch.stem))
    if patch.stem == "sentence_transformers":  # the release is newer than what is cloned
        spec = importlib.util.find_spec(patch.stem)
        place = None if spec is None else Path(str(spec.origin)).parents[1]
    if place is None:
        pytest.skip("the library's source is not here")
    check = ["git", "apply", "--check", "--unidiff-zero", "--ignore-whitespace", "--include=*.py", str(patch)]
    alone = {**os.environ, "GIT_CEILING_DIRECTORIES": str(place.parent)}  # not as a part of this repository
    subprocess.run(check, cwd=place, env=alone, check=True)
