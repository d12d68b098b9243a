"""Sums over positives by class of half rows, against the chunked reference in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_checks import DEVICE
from torch import Tensor

from cl_kernels import chunked
from cl_kernels.problem import Contrast
from cl_kernels.triton import class_sums, lse

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

N, SMALL = 150, 16
LABELS = {
    "one class": torch.zeros(N, dtype=torch.int64),
    "two": torch.arange(N) % 2 - 1,
    "singletons": torch.randperm(N, generator=torch.Generator().manual_seed(0)),
    "a long tail": (torch.linspace(0, 1, N).pow(4) * 40).long()[torch.arange(N - 1, -1, -1)] << 33,
}


def problem(labels: Tensor, dtype: torch.dtype) -> Contrast:
    torch.manual_seed(0)
    q = F.normalize(torch.randn(labels.shape[0], 40), dim=1).to(DEVICE, dtype)
    labels = labels.to(DEVICE)
    scale = torch.tensor(100.0)
    return Contrast(q, None, scale, 0, labels, labels, "all", True, None, None, None, False)


def truth(asked: Contrast) -> tuple[Tensor, Tensor]:
    exact = asked._replace(q=asked.q.double(), scale=asked.scale.double())
    return chunked.contrastive_forward(*exact, False)[2:4]


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_classes_of_any_size(labels: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a chunk, over many of them, and with their ends in the midst of one."""
    monkeypatch.setattr(class_sums, "CHUNK", SMALL)
    monkeypatch.setattr(class_sums, "CHUNKS", 4)
    asked = problem(LABELS[labels], dtype)
    total, count = class_sums.class_positives(asked)
    expected, expected_count = truth(asked)
    assert torch.equal(count, expected_count)
    assert torch.allclose(total, expected, rtol=0, atol=1e-6 * float(asked.scale) * max(1.0, count.max()))


@pytest.mark.parametrize("n", [1, 2, SMALL, SMALL + 1])
def test_few_rows(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_sums, "CHUNK", SMALL)
    asked = problem(torch.full((n,), 3), torch.bfloat16)
    total, count = class_sums.class_positives(asked)
    assert torch.equal(count, torch.full((n,), n - 1.0, dtype=torch.float64, device=count.device))
    assert torch.allclose(total, truth(asked)[0], rtol=0, atol=1e-4)


def test_a_nan_stays_in_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the chunks beside it, which its class does not reach."""
    monkeypatch.setattr(class_sums, "CHUNK", SMALL)
    asked = problem(torch.arange(4 * SMALL) // SMALL, torch.bfloat16)
    asked.q[SMALL, 0] = float("nan")
    total, _ = class_sums.class_positives(asked)
    assert total.isnan().tolist() == [SMALL <= i < 2 * SMALL for i in range(4 * SMALL)]


def test_only_labels_of_half_rows_with_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_sums, "FEWEST_ROWS", N)
    asked = problem(LABELS["two"], torch.bfloat16)
    assert class_sums.by_class_sums(asked)
    others = [
        asked._replace(q=asked.q.float()),
        asked._replace(k=asked.q),
        asked._replace(exclude=None),
        asked._replace(among="same"),
        asked._replace(label_positives=False),
        problem(LABELS["two"][:-1], torch.bfloat16),
    ]
    assert not any(map(class_sums.by_class_sums, others))


@pytest.mark.parametrize("fewest", [N, N + 1])
def test_the_log_sum_exp_gives_them(fewest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By class of so many rows, in its tiles of fewer."""
    seen = []
    monkeypatch.setattr(class_sums, "FEWEST_ROWS", fewest)
    monkeypatch.setattr(lse, "class_positives", lambda x: (seen.append(x), class_sums.class_positives(x))[1])
    asked = problem(LABELS["two"], torch.bfloat16)
    given = lse.log_sum_exp(asked)
    assert len(seen) == (fewest == N) and torch.allclose(given[2], truth(asked)[0], rtol=0, atol=1e-2)
