"""Sums over positives are made of the logits that the log-sum-exps are made of: on converged classes, where
the loss is their difference, nothing is lost."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import cl_kernels as clk
from cl_kernels import autograd, extension
from cl_kernels.problem import Contrast
from cl_kernels.tools.parity import unit

CAPABILITIES = extension.cpu.module.cpu_capabilities() if extension.cpu.module else []
D = 96


@dataclass(frozen=True)
class Converged:
    """Rows of few different vectors, so that every positive's logit is the largest of its row."""

    features: Tensor  # [B, V, D]
    labels: Tensor  # [B]


def converged(kind: str) -> Converged:
    if kind == "classes":  # of one vector each
        labels = torch.arange(90) % 9
        return Converged(unit(9, D)[labels][:, None].repeat(1, 2, 1), labels)
    if kind == "pairs":
        return Converged(unit(64, D)[:, None].repeat(1, 2, 1), torch.arange(64))
    if kind == "collapsed":
        return Converged(unit(1, D).expand(64, 2, D).contiguous(), torch.arange(64))
    if kind == "collapsed, one class":
        return Converged(unit(1, D).expand(200, 2, D).contiguous(), torch.zeros(200, dtype=torch.int64))
    labels = torch.arange(300) % 3  # "long": logits far beyond the range of a fixed shift
    return Converged(3 * unit(3, D)[labels][:, None], labels)


KINDS = ["classes", "pairs", "collapsed", "collapsed, one class", "long"]


def eager(case: Converged, tau: float) -> Tensor:
    """[B * V] losses as the formula has them, in the features' dtype."""
    z = torch.cat(case.features.unbind(1))
    labels = case.labels.repeat(case.features.shape[1])
    own = torch.eye(len(z), dtype=torch.bool)
    logits = z @ z.T / tau
    positives = ((labels[:, None] == labels) & ~own).to(z.dtype)
    lse = torch.logsumexp(logits.masked_fill(own, -torch.inf), 1)
    return ((lse[:, None] - logits) * positives).sum(1) / positives.sum(1)


@pytest.mark.parametrize("supervision", ["labels", "mask"])
@pytest.mark.parametrize("tau", [0.01, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_converged_classes(kind: str, tau: float, supervision: str, backend: str) -> None:
    """Errors at most twice eager's, which are a unit or two in the last place of a logit."""
    case = converged(kind)
    truth = eager(Converged(case.features.double(), case.labels), tau)
    given = (
        {"labels": case.labels} if supervision == "labels" else {"mask": case.labels[:, None] == case.labels}
    )
    ours = clk.supcon_loss(
        case.features, **given, temperature=tau, base_temperature=tau, reduction="none"
    ).flatten()
    error, limit = (ours - truth).abs().max(), (eager(case, tau) - truth).abs().max()
    smallest = 2 * torch.finfo(torch.float32).eps * max(1.0, float(truth.abs().max()))
    assert error <= max(2 * limit, smallest), (float(error), float(limit))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "n, m, exclude", [(150, None, 0), (150, None, None), (150, None, 3), (75, 210, -4), (33, 300, None)]
)
@pytest.mark.parametrize("scale", [10.0, 300.0])
def test_sums_of_every_instruction_set(
    capability: str, dtype: torch.dtype, n: int, m: int | None, exclude: int | None, scale: float
) -> None:
    """By labels and by a mask that repeats, against float64: tails, an offset, fixed and running shifts."""
    before = extension.cpu.module.cpu_capability()
    extension.cpu.module.set_cpu_capability(capability)
    try:
        q = unit(n, 19).to(dtype)
        k = None if m is None else unit(m, 19).to(dtype)
        columns = n if m is None else m
        row_labels = torch.arange(n) % 7
        col_labels = row_labels if m is None else torch.arange(columns) % 5
        mask = torch.rand(31, 45) * (torch.rand(31, 45) > 0.5)
        pairs = Contrast(q, k, scale, exclude)
        for problem in (
            pairs._replace(row_labels=row_labels, col_labels=col_labels, label_positives=True),
            pairs._replace(positive_mask=mask),
        ):
            stats = autograd.contrastive(problem)
            wide = problem._replace(q=q.double(), k=None if k is None else k.double())
            lse, _, sums, counts = clk.reference.contrastive_stats(wide)
            eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
            assert (stats.positive_sum - sums).abs().max() <= 8 * eps * scale * counts.max()
            assert torch.allclose(
                stats.positive_count, counts, rtol=1e-6 if problem.positive_mask is not None else 0
            )
            assert (stats.lse - lse).abs().max() <= 8 * eps * scale
    finally:
        extension.cpu.module.set_cpu_capability(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 50.0, 1000.0])
def test_a_single_column_is_its_own_lse(scale: float, dtype: torch.dtype, backend: str) -> None:
    """A denominator of one column: lse is that logit to the last bit, so that a loss over it is 0."""
    q, k = unit(1, D).to(dtype), unit(1, D).to(dtype)
    two, label = torch.cat([q, k]), torch.zeros(2, dtype=torch.int64)
    index = torch.tensor([1, 0])
    for problem in (
        Contrast(two, None, scale, 0, positive_index=index),
        Contrast(two, None, scale, 0, row_labels=label, col_labels=label, label_positives=True),
        Contrast(two, None, scale, 0, positive_mask=torch.ones(1, 1)),
        Contrast(q, k, scale, positive_index=index[1:]),
        Contrast(q, two, scale, 0, positive_index=index[:1]),
        Contrast(two, k, scale, positive_index=torch.tensor([0, 0])),
    ):
        stats = autograd.contrastive(problem)
        assert torch.equal(stats.lse, stats.positive_sum)
    stats = autograd.contrastive(Contrast(q, k, scale, positive_index=index[1:], both_axes=True))
    assert torch.equal(stats.lse, stats.positive_sum) and torch.equal(stats.lse_cols, stats.positive_sum)
