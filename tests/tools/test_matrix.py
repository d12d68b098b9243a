"""Which tests a push runs: every case in one dtype, the main ones in all; fewer of kernels as they were."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import matrix
import pytest
import recorded
from matrix import Parameters

DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16")
OPS = {"contrastive": ("self", "keys", "mask"), "dimcl": ("views", "wide")}


def variants(file: str = "tests/cpu/test_opcheck.py", kernels: Sequence[str] = ()) -> list[Parameters]:
    """As of a test over kernels, ops, their variants, three sizes and three dtypes."""
    made = []
    for kernel, op in itertools.product(kernels or [""], OPS):
        for variant, size, dtype in itertools.product(OPS[op], ("tails", "wide", "one"), DTYPES):
            values = {"op": op, "variant": variant, "size": size, "dtype": dtype}
            made.append(
                Parameters(f"{file}::test_every", file, values | ({"kernels": kernel} if kernels else {}))
            )
    return made


def kept(tests: Sequence[Parameters], same: Sequence[str] = ()) -> list[Parameters]:
    return [test for test, stays in zip(tests, matrix.choose(tests, same).kept, strict=True) if stays]


def test_every_case_runs_and_the_main_one_in_every_dtype() -> None:
    tests = variants()
    found = kept(tests)
    assert {test.case for test in found} == {test.case for test in tests}
    for op, (main, *others) in OPS.items():
        of_main = [
            test for test in found if test.values["variant"] == main and test.values["size"] == "tails"
        ]
        assert [test.values["dtype"] for test in of_main] == list(DTYPES)
        for variant in others:
            of_other = [
                test for test in found if (test.values["op"], test.values["variant"]) == (op, variant)
            ]
            assert len(of_other) == 3  # sizes, each in a dtype
    assert matrix.choose(tests).left_out == {"further dtypes": len(tests) - len(found)}


def test_dtypes_take_turns() -> None:
    """No size is left with one dtype, though there are as many sizes as dtypes."""
    found = kept(variants())
    for size in ("tails", "wide", "one"):
        assert len({test.values["dtype"] for test in found if test.values["size"] == size}) == 3


def test_the_choice_is_the_same_each_time() -> None:
    assert matrix.choose(variants()) == matrix.choose(variants())


def test_a_case_that_would_be_skipped_is_not_the_one_kept() -> None:
    """Hopper's kernels skip float32."""
    tests = variants("tests/cuda/test_ops.py", ["80", "90"])
    main = [("self", "tails"), ("views", "tails")]
    for test in kept(tests):
        if test.values["kernels"] == "90" and (test.values["variant"], test.values["size"]) not in main:
            assert test.values["dtype"] != "torch.float32"


def test_two_temperatures_run() -> None:
    file = "tests/losses/test_losses.py"
    function = f"{file}::test_temperatures"
    taus = (0.5, 0.1, 0.07, 0.01)
    tests = [Parameters(function, file, {"tau": tau}) for tau in taus]
    assert [test.values["tau"] for test in kept(tests)] == [0.07, 0.01]
    others = [Parameters(function, file, {"tau": tau}) for tau in (0.2, 0.01)]
    assert kept(others) == others


def test_kernels_that_did_not_change_run_their_main_cases() -> None:
    cuda, triton = (variants(f"tests/{name}/test_ops.py") for name in ("cuda", "triton"))
    plain = variants()
    alone = [Parameters("tests/cuda/test_ops.py::test_one", "tests/cuda/test_ops.py", {})]
    found = kept([*cuda, *triton, *plain, *alone], ["csrc/cuda"])
    assert [test.case for test in found if test.kind == "csrc/cuda"] == [
        *(cuda[i].case for i in (0, 1, 2)),
        *(test.case for test in cuda if test.values["variant"] == "views" and test.values["size"] == "tails"),
        (),
    ]
    assert [test for test in found if test.kind != "csrc/cuda"] == kept([*triton, *plain])


def test_losses_on_gpus_belong_to_their_kernels() -> None:
    kinds = [
        Parameters("f", "tests/losses/test_gpu_losses.py", {"kernels": name}).kind
        for name in ("triton", "cuda 80", "cuda 90")
    ]
    assert kinds == ["cl_kernels/triton", "csrc/cuda", "csrc/cuda"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in (
        "csrc/cuda/lse.cu",
        "csrc/contrastive.h",
        "cl_kernels/triton/lse.py",
        "tests/triton/test_ops.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        ("csrc/cuda/lse.cu", {"cl_kernels/triton"}),
        ("csrc/contrastive.h", {"cl_kernels/triton"}),
        ("cl_kernels/triton/lse.py", {"csrc/cuda"}),
        ("tests/triton/test_ops.py", {"csrc/cuda"}),
        ("README.md", {"csrc/cuda", "cl_kernels/triton"}),
    ],
)
def test_what_changed_is_known_by_its_text(checkout: Path, name: str, stays: set[str]) -> None:
    file = checkout / "tested.tsv"
    assert matrix.unchanged(checkout, file) == set()
    file.write_text("".join(f"{kind}\t{made}\n" for kind, made in matrix.digests(checkout).items()))
    assert matrix.unchanged(checkout, file) == set(matrix.KERNELS)
    (checkout / name).write_text("changed")
    assert matrix.unchanged(checkout, file) == stays


# The hook in a run of pytest.

TESTS = """
import pytest

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["main", "other"])
def test_it(case, dtype):
    pass
"""


FOLDERS = [str(Path(module.__file__).parent) for module in (matrix, recorded)]
CONFTEST = f"""
import sys
sys.path[:0] = {FOLDERS}
import matrix
def pytest_configure(config):
    config.pluginmanager.register(matrix.Plugin(config))
"""


@pytest.mark.parametrize(
    ("arguments", "runs"),
    [([], 3), (["-m", "full"], 4), (["-k", "other"], 2), (["test_toy.py::test_it[other-float32]"], 1)],
)
def test_what_is_asked_for_runs(pytester: pytest.Pytester, arguments: list[str], runs: int) -> None:
    pytester.makepyfile(test_toy=TESTS)
    pytester.makeconftest(CONFTEST)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments)
    result.assert_outcomes(passed=runs, deselected={3: 1}.get(runs, 4 - runs if "-k" in arguments else 0))
    if runs == 3:
        result.stdout.fnmatch_lines(["left for `make test-full`: 1 of 4 tests: 1 further dtypes"])


def test_workers_say_what_they_left_out(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_toy=TESTS)
    pytester.makeconftest(CONFTEST)
    result = pytester.runpytest_subprocess("-n", "2", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["left for `make test-full`: 1 of 4 tests: 1 further dtypes"])
