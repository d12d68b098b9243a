"""Loops over tiles are found in machine code, and their hot paths counted; gates hold them to bounds."""

from __future__ import annotations

import issue_slots
import machine_code
import pytest


def sass(*lines: str) -> str:
    """As cuobjdump prints a function; the encoding of an instruction stands on its line and the next."""
    code = [
        f"        /*{16 * i:04x}*/    {line} ;   /* 0x0000 */\n               /* 0x0000 */"
        for i, line in enumerate(lines)
    ]
    return "\n".join(["\t\tFunction : kernel", '\t.headerflags\t@"EF_CUDA_SM90"', *code])


def found(*lines: str) -> machine_code.Loop | None:
    ((name, code),) = machine_code.functions(sass(*lines))
    assert name == "kernel" and len(code) == len(lines)
    return machine_code.tile_loop(code)


TILES = (
    "MOV R1, c[0x0][0x28]",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4]",  # 0x10: the tile loop
    "@P0 BRA 0x60",  # to the edge's mask, four instructions
    "MUFU.EX2 R2, R2",
    "@!P1 BRA 0x10",
    "EXIT",
    "FSEL R2, R2, RZ, P0",  # 0x60
    "FSEL R3, R3, RZ, P0",
    "FSEL R4, R4, RZ, P0",
    "BRA 0x30",
)


def test_the_edge_does_not_count() -> None:
    assert found(*TILES) == machine_code.Loop(hot=4, inner=0, size=8)


def test_products_are_on_the_hot_path() -> None:
    """Though the way around without them is shorter."""
    lines = list(TILES)
    lines[7] = "HMMA.16816.F32 R8, R4, R6, R8"
    assert found(*lines) == machine_code.Loop(hot=8, inner=0, size=8)


def test_a_loop_over_chunks_counts_once_and_apart() -> None:
    loop = found(
        "MOV R1, R2",
        "MOV R2, R3",  # 0x10: the tile loop
        "HMMA.16816.F32 R8, R4, R6, R8",  # 0x20: the loop over chunks
        "IADD3 R4, R4, 0x1, RZ",
        "@P0 BRA 0x20",
        "MUFU.EX2 R2, R2",
        "@P1 BRA 0x10",
        "EXIT",
    )
    assert loop == machine_code.Loop(hot=6, inner=3, size=6)


def test_a_switch_leads_to_what_nothing_else_does() -> None:
    loop = found(
        "HMMA.16816.F32 R8, R4, R6, R8",  # 0x0: the tile loop
        "BRX R2 -0x20",
        "FADD R3, R3, R3",
        "BRA 0x60",
        "FADD R3, R3, R4",
        "FADD R3, R3, R5",
        "MUFU.EX2 R2, R2",  # 0x60
        "@P1 BRA 0x0",
        "EXIT",
    )
    assert loop == machine_code.Loop(hot=6, inner=0, size=8)


def test_no_loop() -> None:
    assert found("HMMA.16816.F32 R8, R4, R6, R8", "EXIT") is None


def row(**changes: str) -> dict[str, str]:
    """A line of triton.tsv: 128 x 64 pairs of 128 features, 8 warps."""
    made = {
        "architecture": "sm_90", "row": "lse half 128", "kernel": "lse._lse_kernel", "tile": "128x64x128",
        "launch": "8x3 128", "case": "contrastive keys", "hot": "300", "inner": "0", "loop": "400",
    }  # fmt: skip
    return made | changes


def test_clocks_of_a_tile() -> None:
    made = issue_slots.clocks(row())
    assert made == (600, 512, 512, 128 * 64) and made.ratio == pytest.approx(600 / 512)
    wide = issue_slots.clocks(row(row="lse half 512", tile="128x64x64", inner="100"))
    assert wide == (2 * (300 + 7 * 100), 2048, 512, 128 * 64)
    assert issue_slots.clocks(row(hot="-", inner="-", loop="-")) is None


def test_bounds() -> None:
    assert issue_slots.faults(row()) == []
    assert issue_slots.faults(row(loop="4001")) == ["a loop of 4001 instructions, over 4000"]
    (fault,) = issue_slots.faults(row(hot="400"))
    assert "1.56 times" in fault
    assert issue_slots.faults(row(hot="400", case="contrastive keys, mask")) == []


def test_labels_over_an_index() -> None:
    gradient = {"kernel": "gradient_rows._gradient_rows_kernel", "row": "gradient_rows half 128"}
    index = row(**gradient, case="contrastive self", hot="400")
    labels = row(**gradient, case="contrastive self, labels", tile="64x64x128", hot="250")
    assert issue_slots.of_labels([index, labels]) == pytest.approx(250 * 2 / 400)
    assert issue_slots.of_labels([index, labels | {"architecture": "sm_80"}]) is None
    assert issue_slots.of_labels([labels]) is None
