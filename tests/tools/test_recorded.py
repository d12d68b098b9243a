"""Recorded figures of the gates, and what makes a kernel another one."""

from __future__ import annotations

from pathlib import Path

import cuda_gate
import pytest
import recorded

COLUMNS = ("architecture", "kernel", "registers", "shared")


def record(**figures: tuple[str, str]) -> recorded.Record:
    made = recorded.Record(COLUMNS, 2, "compiler 1.0", {"lse": "abc"})
    made.figures = {("sm_90", name): cells for name, cells in figures.items()}
    return made


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = record(second=("128", "0"), first=("32", "4096"))
    made.save(tmp_path / "gates" / "some.tsv")
    again = recorded.Record(COLUMNS, 2).load(tmp_path / "gates" / "some.tsv")
    assert (again.compiler, again.sources, again.figures) == (made.compiler, made.sources, made.figures)
    assert again.text() == made.text() == (tmp_path / "gates" / "some.tsv").read_text()


def test_the_order_of_finding_does_not_show() -> None:
    one, other = record(a=("1", "0"), b=("2", "0")), record(b=("2", "0"), a=("1", "0"))
    assert one.text() == other.text()
    assert one.text().splitlines()[-2:] == ["figures\tsm_90\ta\t1\t0", "figures\tsm_90\tb\t2\t0"]


def test_no_file_is_nothing_recorded(tmp_path: Path) -> None:
    assert recorded.Record(COLUMNS, 2).load(tmp_path / "none.tsv").figures == {}


@pytest.mark.parametrize("line", ["figures\tsm_90\tlse\t128", "source\tlse", "something\telse"])
def test_another_line_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="line 1"):
        recorded.Record(COLUMNS, 2).read(line + "\n")


def test_differences() -> None:
    before, now = record(a=("1", "0"), gone=("2", "0")), record(a=("3", "0"), new=("2", "0"))
    now.sources["lse"] = "def"
    assert before.differences(before) == []
    assert before.differences(now) == [
        "lse: its source is not that recorded",
        "sm_90 | a: registers 1 -> 3",
        "sm_90 | gone: is recorded, and there is no such kernel",
        "sm_90 | new: is not recorded",
    ]


def test_code_is_without_comments() -> None:
    text = "// what\n  float x;  // of what\n\n  // why\nint y; \n"
    assert recorded.code(text, "//") == "  float x;  // of what\nint y;"


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    (tmp_path / "kernel.cu").write_text('#include "middle.h"\n#include <cuda.h>\nint kernel;\n')
    (tmp_path / "other.cu").write_text("int other;\n")
    (tmp_path / "middle.h").write_text('#pragma once\n#include "low.h"\n')
    (tmp_path / "low.h").write_text("int low;\n")
    return tmp_path


def test_a_header_is_part_of_what_includes_it(sources: Path) -> None:
    kernel, other = (cuda_gate.source_digest(sources / name) for name in ("kernel.cu", "other.cu"))
    (sources / "low.h").write_text("// moved\n\nint low;\n")
    assert cuda_gate.source_digest(sources / "kernel.cu") == kernel
    (sources / "low.h").write_text("int low = 1;\n")
    assert cuda_gate.source_digest(sources / "kernel.cu") != kernel
    assert cuda_gate.source_digest(sources / "other.cu") == other


def test_flags_are_part_of_what_is_compiled(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cuda_gate.source_digest(sources / "kernel.cu")
    monkeypatch.setattr(cuda_gate, "FLAGS", [*cuda_gate.FLAGS, "-G"])
    assert cuda_gate.source_digest(sources / "kernel.cu") != before


def test_a_place_is_not_part_of_what_is_compiled(sources: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in sources.glob("*.*"):
        (moved / path.name).write_text(path.read_text())
    assert cuda_gate.source_digest(moved / "kernel.cu") == cuda_gate.source_digest(sources / "kernel.cu")


# The gate of CUDA's kernels without nvcc.


@pytest.fixture
def nothing_compiles(monkeypatch: pytest.MonkeyPatch, sources: Path) -> Path:
    monkeypatch.setattr(cuda_gate, "SOURCES", sources)
    monkeypatch.setattr(cuda_gate, "obstacle", lambda: "there is no nvcc")
    monkeypatch.setattr(cuda_gate, "compiler", lambda: "")
    made = cuda_gate.new_record("nvcc 13.0.88")
    made.sources = {name: cuda_gate.source_digest(sources / name) for name in ("kernel.cu", "other.cu")}
    good, bad = (cuda_gate.Kernel("k", "kernel.cu", "80", registers=32, spills=n) for n in (8, 200))
    made.figures = {good.what: good.cells}
    made.save(sources / "cuda.tsv")
    made.figures = {bad.what: bad.cells}
    made.save(sources / "spilling.tsv")
    return sources


def check(folder: Path, file: str = "cuda.tsv") -> list[str]:
    gate = cuda_gate.Gate(1)
    gate.check(sorted(folder.glob("*.cu")), ["80"], folder / file, everything=False, update=False)
    return gate.faults


def test_texts_are_compared_without_a_compiler(
    nothing_compiles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(nothing_compiles) == []
    assert "there is no nvcc: texts are compared" in capsys.readouterr().out
    (nothing_compiles / "low.h").write_text("int low = 2;\n")
    (fault,) = check(nothing_compiles)
    assert fault.startswith("kernel.cu: its source is not that recorded")


def test_a_file_that_went_is_a_fault(nothing_compiles: Path) -> None:
    (nothing_compiles / "other.cu").unlink()
    (fault,) = check(nothing_compiles)
    assert fault.startswith("other.cu: its source is not that recorded")
    (nothing_compiles / "kernel.cu").unlink()
    assert any("k: is recorded, and there is no such kernel" in fault for fault in check(nothing_compiles))


def test_recorded_figures_are_held_to_limits(
    nothing_compiles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few spilled bytes are reported, more are a fault."""
    assert check(nothing_compiles) == []
    assert "spills 8 bytes" in capsys.readouterr().out
    assert any("200 bytes of spills" in fault for fault in check(nothing_compiles, "spilling.tsv"))
