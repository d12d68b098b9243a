"""The patches of docs/upstream name what the adapters replace, and apply to clones of the libraries."""

from __future__ import annotations

import re
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
from peers.repositories import clone

from cl_kernels.integrations import _swap
from cl_kernels.integrations._registry import REPOSITORIES

PATCHES = sorted((Path(__file__).resolve().parents[2] / "docs" / "upstream").glob("*.patch"))
CLONES = {
    "dimcl": "DimCL",
    "pytorch_metric_learning": "pytorch-metric-learning",
    "sentence_transformers": "sentence-transformers",
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
    if patch.stem not in (*REPOSITORIES, "swift"):  # whose adapters do without the library
        pytest.importorskip(patch.stem)
    import_module(f"cl_kernels.integrations.{patch.stem}")
    here = {target for target, swap in _swap.SWAPS.items() if swap.library == patch.stem}
    assert targets(patch) and targets(patch) <= here


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_applies(patch: Path) -> None:
    repository = clone(CLONES.get(patch.stem, patch.stem))
    if repository is None:
        pytest.skip("CL_KERNELS_REPOSITORIES has no clone of it")
    subprocess.run(["git", "apply", "--check", "--unidiff-zero", str(patch)], cwd=repository, check=True)
