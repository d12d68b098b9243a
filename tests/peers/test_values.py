"""The losses of libraries and ours have the same values and gradients."""

from __future__ import annotations

import pytest
import torch
from peers.cases import PeerCase, cases
from peers.side_by_side import assert_same

ALL = cases()


@pytest.mark.skipif(not ALL, reason="none of the libraries is installed: make test-peers")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.id)
def test_same_value_and_gradient(case: PeerCase, dtype: torch.dtype) -> None:
    inputs = case.example(case.rows, dtype)
    close = case.close[dtype == torch.float32]
    assert_same(case.theirs(), case.ours(), inputs, case.loss, case.fused, close)
