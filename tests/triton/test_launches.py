"""How much a step of a loss launches, by bench/launches.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from op_checks import DEVICE
from torch import Tensor

from cl_kernels.triton import class_sums, unit_rows

BENCH = Path(__file__).resolve().parents[2] / "bench"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not BENCH.exists(), reason="not a source checkout"),
    pytest.mark.skipif(DEVICE != "cpu", reason="recorded under Triton's interpreter"),
]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import launches

    return launches


@pytest.mark.parametrize(
    ("loss", "most"),
    [("supcon", 9), ("nt_xent", 13), ("clip", 14), ("info_nce", 7), ("sce", 6), ("dimcl", 11)],
)
def test_a_step(launches: Any, loss: str, most: int) -> None:
    forward, backward = launches.of_loss(loss)
    assert len(forward) + len(backward) <= most, (forward, backward)
    assert any("(Triton)" in name for name in forward)
    assert backward == ["mul", "_to_copy"] or any("(Triton)" in name for name in backward)


def test_labels_of_many_rows(launches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sort and the two kernels of class_sums.py come on top."""
    few = launches.of_loss("supcon")
    monkeypatch.setattr(class_sums, "FEWEST_ROWS", 1)
    forward, backward = launches.of_loss("supcon")
    more = sorted(set(forward) - set(few[0]))
    assert more == ["chunk_sums_kernel (Triton)", "class_positives_kernel (Triton)", "sort"]
    assert (len(forward), backward) == (len(few[0]) + 3, few[1])


def test_a_launch_that_is_added_is_found(launches: Any) -> None:
    x = torch.randn(4, 8)

    def step() -> Tensor:
        return x.detach().requires_grad_().exp().sum()

    assert launches.launches(step) == (["exp", "sum"], ["mul"])
    assert launches.launches(lambda: step() * 2) == (["exp", "sum", "mul"], ["mul", "mul"])
    with launches.recorded() as names:
        unit_rows.unit_rows(x[:2].T.T)
    assert names == ["unit_rows_kernel (Triton)"]
