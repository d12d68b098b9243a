"""Every oracle case against the reference, the compiled CPU kernels and the chunked reference."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections import Counter
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import oracles
import pytest
from oracles import Case

pytestmark = pytest.mark.skipif(
    not oracles.folder().is_dir(), reason=f"no oracle files in {oracles.folder()} (set CL_KERNELS_ORACLES)"
)

CASES = list(oracles.cases())
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


def errors(case: Case, api: str) -> dict[str, float]:
    """The errors on this backend; an option that it refuses by name runs under "auto"."""
    package = importlib.import_module("cl_kernels")
    with namespace(api) as functions:
        try:
            return oracles.errors(case, functions)
        except package.BackendError:
            with package.use_backend("auto"):
                return oracles.errors(case, functions)


@every_api
@by_id(USED)
def test_matches_upstream(case: Case, api: str) -> None:
    found = errors(case, api)
    assert max(found.values()) <= oracles.tolerance(case), found


@every_api
@by_id(NOT_FINITE)
def test_finite_where_upstream_is_not(case: Case, api: str) -> None:
    package = importlib.import_module("cl_kernels")
    with namespace(api) as functions:
        try:
            loss, gradients = oracles.call(case, functions)
        except package.BackendError:
            with package.use_backend("auto"):
                loss, gradients = oracles.call(case, functions)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@every_api
@by_id(REFUSED)
def test_refused_upstream(case: Case, api: str) -> None:
    with namespace(api) as functions, pytest.raises(ValueError):
        oracles.call(case, functions)


def test_every_case_is_used_or_skipped_by_name() -> None:
    stored = {}
    for path in sorted(oracles.folder().glob("*.npz")):
        with np.load(path) as archive:
            stored[path.stem] = {f"{path.stem}:{name}" for name in archive["cases"]}
    assert {case.id for case in CASES} == set().union(*stored.values())

    used = Counter(case.file for case in USED)
    skipped = {case.id: oracles.skip_reason(case) for case in CASES if case not in USED}
    for file, names in stored.items():
        print(f"{file}: {used[file]} of {len(names)} used")
    for name, reason in skipped.items():
        print(f"  {name}: {reason}")
    assert len(USED) + len(skipped) == sum(map(len, stored.values()))
    assert all(skipped.values())
    assert all(used[file] > 0 for file in stored)
