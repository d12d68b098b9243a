"""Oracle cases against the reference, the compiled CPU kernels and the chunked reference: the compact set of
tests/data, and where the whole set is there, the rest of it too."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import make_oracle_data
import numpy as np
import oracles
import pytest
from oracles import Case

needs_whole = pytest.mark.skipif(
    not oracles.whole().is_dir(), reason=f"no whole set in {oracles.whole()} (set CL_KERNELS_ORACLES)"
)

COMPACT = list(oracles.cases(oracles.DATA))
WHOLE = list(oracles.cases(oracles.whole()))
CASES = [*COMPACT, *(case for case in WHOLE if case.id not in {stored.id for stored in COMPACT})]
USED = [case for case in CASES if oracles.skip_reason(case) is None]
REFUSED = [case for case in CASES if "error" in case.meta]
NOT_FINITE = [case for case in CASES if case not in REFUSED and oracles.not_finite(case)]
BACKENDS = {"cpu": "cpu", "chunked": "reference"}


@contextlib.contextmanager
def namespace(api: str) -> Iterator[ModuleType]:
    """`cl_kernels.reference`, or `cl_kernels` on the backend that `api` stands for."""
    package = importlib.import_module("cl_kernels")
    if api == "reference":
        yield package.reference
        return
    dispatch = importlib.import_module("cl_kernels.dispatch")
    obstacle = dispatch.obstacle(BACKENDS[api], "cpu")
    if obstacle is not None and os.environ.get("CL_KERNELS_REQUIRE_EXTENSION", "") not in ("", "0"):
        pytest.fail(obstacle)
    if obstacle is not None:
        pytest.skip(obstacle)
    with package.use_backend(BACKENDS[api]):
        yield package


def by_id(selection: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", selection, ids=[case.id for case in selection])


every_api = pytest.mark.parametrize("api", ["reference", *BACKENDS])


@every_api
@by_id(USED)
def test_matches_upstream(case: Case, api: str) -> None:
    """By name: no case needs what a backend does not have."""
    with namespace(api) as functions:
        found = oracles.errors(case, functions)
    assert max(found.values()) <= oracles.tolerance(case), found


@every_api
@by_id(NOT_FINITE)
def test_finite_where_upstream_is_not(case: Case, api: str) -> None:
    with namespace(api) as functions:
        loss, gradients = oracles.call(case, functions)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@every_api
@by_id(REFUSED)
def test_refused_upstream(case: Case, api: str) -> None:
    with namespace(api) as functions, pytest.raises(ValueError):
        oracles.call(case, functions)


@pytest.mark.parametrize(
    "folder", [oracles.DATA, pytest.param(oracles.whole(), marks=needs_whole)], ids=["compact", "whole"]
)
def test_every_case_is_used_or_skipped_by_name(folder: Path) -> None:
    stored = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as archive:
            stored[path.stem] = {f"{path.stem}:{name}" for name in archive["cases"]}
    names = set().union(*stored.values())
    assert names <= {case.id for case in CASES}

    used = Counter(case.file for case in USED if case.id in names)
    skipped = {case.id: oracles.skip_reason(case) for case in CASES if case not in USED and case.id in names}
    for file, inside in stored.items():
        print(f"{file}: {used[file]} of {len(inside)} used")
    for name, reason in skipped.items():
        print(f"  {name}: {reason}")
    assert used.total() + len(skipped) == len(names)
    assert all(skipped.values())
    assert all(used[file] > 0 for file in stored)


def test_compact_set_covers_every_family() -> None:
    assert set(oracles.FAMILIES) - {case.family for case in COMPACT} <= {
        "stablerep"
    }  # of which none is stored
    assert REFUSED and NOT_FINITE
    files = list(oracles.DATA.glob("*.npz"))
    assert sum(path.stat().st_size for path in files) < 4e6


@needs_whole
def test_compact_set_is_of_the_whole() -> None:
    whole = {case.id: case for case in WHOLE}
    for case in COMPACT:
        other = whole[case.id]
        assert case.meta == other.meta and case.arrays.keys() == other.arrays.keys()
        assert all(case.arrays[name].tobytes() == other.arrays[name].tobytes() for name in case.arrays)
    kinds = {make_oracle_data.kind(case) for case in COMPACT}
    assert {make_oracle_data.kind(case) for case in WHOLE} == kinds
