"""NaN under the options of the losses: whose rows it reaches, what leaves it out, and labels that are NaN."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from comparisons import Problem, assert_close, unit

import cl_kernels as clk
from cl_kernels import autograd
from cl_kernels.problem import Contrast

LABELS = torch.tensor([0, 0, 1, 1, 2, 3])  # the last two alone, in one view
NAN = float("nan")
MODULES = pytest.mark.parametrize("module", [clk, clk.reference], ids=["ours", "reference"])

pytestmark = pytest.mark.usefixtures("backend", "poisoned", "one_thread")


def with_nan(x: torch.Tensor, row: int) -> torch.Tensor:
    x = x.clone()
    x[row, ..., 1] = NAN
    return x


@MODULES
@pytest.mark.parametrize("denominator", ["all", "one_positive", "only_negatives"])
@pytest.mark.parametrize("summation", ["out", "in"])
def test_nan_among_the_rows_is_nan_in_every_row(summation: str, denominator: str, module: Any) -> None:
    """Also in rows without positives, which count as 0 or not at all: their gradient would be NaN."""
    same = (LABELS[:, None] == LABELS).float()
    for given, cap, alone in itertools.product(
        ({"labels": LABELS}, {"mask": same}), (None, 1), ("zero", "drop")
    ):
        options = {
            "summation": summation, "denominator": denominator, "positives_cap": cap, "no_positive": alone,
            **given,
        }  # fmt: skip
        for row in (2, 5):
            features = with_nan(unit(6, 1, 4), row)
            assert module.supcon_loss(features, **options, reduction="none").isnan().all()
            assert module.supcon_loss(features, **options).isnan()


@MODULES
def test_what_a_cap_leaves_out_may_be_nan(module: Any) -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    rows = module.supcon_loss(with_nan(unit(6, 1, 4), 2), labels, positives_cap=1, reduction="none")
    assert torch.equal(rows.isnan(), torch.tensor([False, False, True, True, True, True]))


@pytest.mark.parametrize("summation", ["out", "in"])
def test_nan_among_positives_without_negatives(summation: str) -> None:
    features, labels = unit(3, 2, 5), torch.ones(3)
    features[0, 1, 2] = torch.nan
    loss = clk.supcon_loss(
        features, labels, summation=summation, denominator="one_positive", reduction="none"
    )  # fmt: skip
    assert loss.isnan().all()


def nan_calls(module: Any) -> dict[str, tuple[Any, ...]]:
    """A function of tensors, then these."""
    first, second, queue = unit(6, 4), unit(6, 4), unit(7, 4)
    gathered = torch.cat([second, unit(6, 4)])
    column_mask = torch.zeros(8, 8, dtype=torch.bool)
    index = torch.tensor([0, 1, 2, 3, -1, 4])

    def target(q: Any, k: Any, t: Any, u: Any, **options: Any) -> Any:
        return module.soft_target_cross_entropy(q, k, t, u, scale=4.0, target_scale=5.0, **options)

    def sce(**options: Any) -> Any:
        return lambda q, k, keys=None, queue=None: module.sce_loss(q, k, keys, queue, **options)

    both = {"positive": index, "coeff": 0.4}
    return {
        "nt_xent": (module.nt_xent_loss, first, second),
        "info_nce": (module.info_nce_loss, first, second),
        "info_nce queue": (module.info_nce_loss, first, second, queue),
        "clip": (lambda x, y: module.clip_loss(x, y, 5.0), first, second),
        "dcl": (module.dcl_loss, first, second),
        "dclw": (lambda x, y: module.dcl_loss(x, y, sigma=0.5), first, second),
        "dcl of one pair": (module.dcl_loss, first[:1], second[:1]),
        "dimcl": (module.dimcl_loss, first, second),
        "dimcl mask": (lambda x, y: module.dimcl_loss(x, y, positive_mask=column_mask), first, second),
        "multilevel": (lambda x: module.multilevel_loss([x], LABELS), first[:, None]),
        "selfcon": (lambda x: module.selfcon_loss(x, LABELS, no_positive="drop"), first[:, None]),
        "sce": (sce(), first, second),
        "sce queue": (lambda q, k, queue: sce()(q, k, None, queue), first, second, queue),
        "sce queue zero": (
            lambda q, k, queue: sce(positive_in_target="zero", coeff=0.0)(q, k, None, queue),
            first, second, queue,
        ),
        "sce keys": (sce(coeff=1.0), first, second, gathered),
        "sce keys queue": (sce(coeff=0.0), first, second, gathered, queue),
        "soft target": (target, first, queue, second, queue.flip(0)),
        "soft target positive": (lambda *x: target(*x, **both), first, queue, second, queue.flip(0)),
        "soft target zero": (
            lambda *x: target(*x, **both, positive_in_target="zero"), first, queue, second, queue.flip(0),
        ),
        "similarity": (lambda q, k: module.similarity(q, k, normalize=True).sum(), first, queue),
        "lse": (lambda q, k: module.contrastive_lse(q, k, exclude=None).sum(), first, queue),
        "log softmax": (lambda x: module.masked_log_softmax(x).logsumexp(1).sum(), first),
    }  # fmt: skip


@MODULES
@pytest.mark.parametrize("case", nan_calls(clk))
def test_nan_in_any_input_is_nan_in_the_loss(case: str, module: Any) -> None:
    function, *inputs = nan_calls(module)[case]
    assert function(*inputs).isfinite()
    for i in range(len(inputs)):
        bad = [with_nan(x, 0) if i == j else x for j, x in enumerate(inputs)]
        assert function(*bad).isnan(), f"input {i}"
        with torch.no_grad():
            assert function(*[x.clone() for x in bad]).isnan()
        learnt = [x.clone().requires_grad_() for x in bad]
        assert function(*learnt).isnan(), f"input {i}, with gradients"


@MODULES
def test_nan_in_an_excluded_column_does_not_count(module: Any, backend: str) -> None:
    q, k = unit(4, 3), with_nan(unit(4, 3), 1)
    labels = torch.tensor([0, 1, 0, 0])
    met = torch.tensor([False, True, False, False])
    lse = module.contrastive_lse(q, k, exclude=None, row_labels=labels, col_labels=labels, among="same")
    assert torch.equal(lse.isnan(), met)
    if backend != "reference":
        return  # kernels may multiply by a weight of 0
    mask = (labels[:, None] == labels).float()
    for options in ({"label_positives": True}, {"positive_mask": mask}, {"positive_index": torch.arange(4)}):
        problem = Contrast(q, k, 2.0, None, labels, labels, "same", **options)
        if module is clk:
            positive_sum = autograd.contrastive(problem).positive_sum
        else:
            positive_sum = module.contrastive_stats(problem)[2]
        assert torch.equal(positive_sum.isnan(), met)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_nan_labels_match_nothing(dtype: torch.dtype) -> None:
    """By ==, as plain torch compares them: not each other, not themselves, nor their own other views."""
    labels = torch.tensor([0.0, -0.0, NAN, NAN, 1.0, NAN], dtype=dtype)
    for views in (1, 2):
        features = unit(6, views, 4)
        rows = labels.repeat(views)
        same = (rows[:, None] == rows) & ~torch.eye(len(rows), dtype=torch.bool)
        keys = features.transpose(0, 1).flatten(0, 1).double()
        logits = (keys @ keys.T / 0.2).fill_diagonal_(-torch.inf)
        log_p = logits.log_softmax(1).masked_fill(~same, 0)
        expected = -log_p.sum(1) / same.sum(1).clamp(min=1)
        options = {"temperature": 0.2, "base_temperature": 0.2, "reduction": "none"}
        for module in (clk, clk.reference):
            found = module.supcon_loss(features.double(), labels, **options)
            torch.testing.assert_close(found, expected)
        for summation, denominator, cap in itertools.product(
            ("out", "in"), ("all", "one_positive", "only_negatives"), (None, views)
        ):
            more = {"summation": summation, "denominator": denominator, "positives_cap": cap}
            assert_close(Problem("supcon_loss", {"features": features, "labels": labels}, more))
        assert_close(Problem("selfcon_loss", {"features": features, "labels": labels}))


def test_nan_labels_of_rows_and_columns() -> None:
    """A row's NaN differs from a column's, also from its own; integers and floats compare by value."""
    rows, cols = torch.tensor([NAN, 1.0, 2.0]), torch.tensor([NAN, 1.0, NAN, 2.0], dtype=torch.float64)
    q, k = unit(3, 4), unit(4, 4)
    expected = torch.full((3,), -torch.inf)
    expected[1], expected[2] = q[1] @ k[1], q[2] @ k[3]
    for module in (clk, clk.reference):
        options = {"exclude": None, "among": "same"}
        found = module.contrastive_lse(q, k, row_labels=rows, col_labels=cols, **options)
        torch.testing.assert_close(found, expected)
        found = module.contrastive_lse(q, k, row_labels=torch.tensor([5, 1, 2]), col_labels=cols, **options)
        torch.testing.assert_close(found, expected)
        found = module.contrastive_lse(q, row_labels=rows, **options)
        torch.testing.assert_close(found, (q * q).sum(1).masked_fill(rows.isnan(), -torch.inf))
        assert (module.contrastive_lse(q, row_labels=rows, among="same") == -torch.inf).all()


@MODULES
def test_a_nan_alone_with_its_caption(module: Any) -> None:
    """It is every image's, as it is in every denominator."""
    images = with_nan(unit(6, 4), 0)
    for captions in (torch.tensor([2, 0, 0, 1, 1, 1]), torch.arange(6)):
        assert module.stablerep_loss(images, captions, reduction="none").isnan().all()
