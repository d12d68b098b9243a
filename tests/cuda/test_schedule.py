"""The schedule of the CUDA kernels (csrc/cuda/schedule.h), compiled for the CPU: every tile once."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 128
MOST_ROWS = 2**31 - 1 - BLOCK


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    path = tmp_path_factory.mktemp("schedule") / "schedule.so"
    source = ROOT / "tests" / "emulator" / "schedule.cpp"
    include = f"-I{ROOT / 'csrc' / 'cuda'}"
    subprocess.run(
        [compiler, "-std=c++17", "-shared", "-fPIC", include, str(source), "-o", str(path)], check=True
    )
    return ctypes.CDLL(str(path))


def schedule(library: ctypes.CDLL, *problem: int) -> dict[str, int]:
    values = (ctypes.c_int64 * 5)()
    library.make_schedule(*problem, values)
    names = ("row_blocks", "column_blocks", "row_groups", "column_groups", "programs")
    return dict(zip(names, values, strict=True))


def groups(library: ctypes.CDLL, *problem: int) -> numpy.ndarray:
    found = numpy.zeros((schedule(library, *problem)["programs"] * problem[-1], 6), numpy.int32)
    library.make_groups(*problem, found.ctypes.data_as(ctypes.c_void_p))
    return found


@given(
    n=st.integers(1, 40_000), m=st.integers(1, 40_000), mirrored=st.booleans(),
    at_once=st.sampled_from([1, 3, 33, 108, 132]), cluster=st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_every_tile_is_visited_once(
    library: ctypes.CDLL, n: int, m: int, mirrored: bool, at_once: int, cluster: int
) -> None:
    m = n if mirrored else m
    problem = (n, m, int(mirrored), at_once, cluster)
    plan = schedule(library, *problem)
    assert plan["row_blocks"] == -(-n // BLOCK)
    assert plan["column_blocks"] == -(-m // BLOCK)
    visits = numpy.zeros((plan["row_blocks"], plan["column_blocks"]), int)
    slots = set()
    for at, found in enumerate(groups(library, *problem)):
        row, row_end, column, column_end, row_group, column_group = found
        assert row < row_end
        assert column < column_end or at % cluster > 0  # the last cluster may be wider than what is left
        if column == column_end:
            continue
        visits[row:row_end, column:column_end] += 1
        assert (row_group, column_group) not in slots  # nor do two blocks write to the same slots
        slots.add((row_group, column_group))
        assert row_group < plan["row_groups"] and column_group < plan["column_groups"]
        if mirrored:
            assert row <= column  # a strip's first row has a tile
    if mirrored:
        above = numpy.triu(numpy.ones_like(visits)) == 1
        assert (visits[above] == 1).all()
    else:
        assert (visits == 1).all()


@given(
    n=st.integers(1, MOST_ROWS), m=st.integers(1, MOST_ROWS), mirrored=st.booleans(),
    cluster=st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_memory_and_parallelism_of_any_size(
    library: ctypes.CDLL, n: int, m: int, mirrored: bool, cluster: int
) -> None:
    m = n if mirrored else m
    plan = schedule(library, n, m, int(mirrored), 132 // cluster, cluster)
    assert plan["row_blocks"] == -(-n // BLOCK)
    assert 1 <= plan["programs"] <= 2**31 - 1
    tiles = plan["row_blocks"] * plan["column_blocks"] // (2 if mirrored else 1)
    # A tile of a cluster is as many rows by as many columns where mirrored, two rows by as many else.
    of_cluster = cluster * (cluster if mirrored else min(cluster, 2))
    assert plan["programs"] >= min(132 // cluster, tiles // of_cluster) // 2
    # Partial sums: a float for each row and group of columns, and the other way round.
    assert plan["column_groups"] * n + plan["row_groups"] * m <= 2 * 96 * (n + m) + 2**20


def steps(rows: int, columns: int, processors: int, parts: int) -> int:
    return -(-rows * parts // processors) * (-(-columns // parts) + 2)


@given(
    rows=st.integers(1, 2000), columns=st.integers(1, 2000), processors=st.sampled_from([1, 3, 108, 132])
)  # fmt: skip
def test_parts_of_rows_fit_the_device(library: ctypes.CDLL, rows: int, columns: int, processors: int) -> None:
    parts = library.make_splits(rows, columns, processors)
    assert 1 <= parts <= columns
    assert (parts - 1) * -(-columns // parts) < columns  # none is empty
    assert rows * parts <= max(rows, 4 * processors)
    found = steps(rows, columns, processors, parts)
    assert all(
        found <= steps(rows, columns, processors, other)
        for other in (1, min(columns, max(1, processors // rows)))
    )


@pytest.mark.parametrize(("blocks", "parts"), [(16, 8), (32, 4), (64, 2), (96, 4), (256, 1)])
def test_most_of_a_device_is_busy(library: ctypes.CDLL, blocks: int, parts: int) -> None:
    """On 132 multiprocessors a batch of 4096 rows and more keeps nine in ten of them at work."""
    assert library.make_splits(blocks, blocks, 132) == parts
    rounds = -(-blocks * parts // 132)
    if blocks >= 32:
        assert blocks**2 >= 0.9 * 132 * rounds * -(-blocks // parts)
