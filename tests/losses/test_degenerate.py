"""Rows without positives or negatives, and losses that are exactly zero or nearly negative."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
from comparisons import Problem, assert_close, unit

import cl_kernels as clk
from cl_kernels.losses._common import at_least_zero

pytestmark = pytest.mark.usefixtures("backend", "poisoned", "one_thread")


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("denominator", ["all", "one_positive", "only_negatives"])
@pytest.mark.parametrize("summation", ["out", "in"])
def test_rows_without_positives_or_negatives_count_as_zero(
    summation: str, denominator: str, views: int
) -> None:
    for n, labels in ((1, [0]), (3, [0, 0, 0]), (3, [0, 1, 2]), (4, [0, 0, 1, 2])):
        features = unit(n, views, 4).requires_grad_()
        rows = clk.supcon_loss(
            features, torch.tensor(labels), summation=summation, denominator=denominator, reduction="none"
        )
        (gradient,) = torch.autograd.grad(rows.sum(), features)
        assert rows.isfinite().all()
        assert gradient.isfinite().all()
        alone = torch.tensor([labels.count(x) == 1 and views == 1 for x in labels]).repeat(views)
        assert (rows[alone] == 0).all()


def test_nothing_but_empty_rows_has_gradient_zero() -> None:
    for loss in (
        lambda x: clk.supcon_loss(x, torch.arange(5), no_positive="drop"),
        lambda x: clk.supcon_loss(x),
        lambda x: clk.supcon_loss(x, mask=torch.zeros(5, 5)),
        lambda x: clk.selfcon_loss(x, torch.arange(5), no_positive="drop"),
        lambda x: clk.dcl_loss(x[:1, 0], x[1:2, 0]),
    ):
        features = unit(5, 1, 4).requires_grad_()
        value = loss(features)
        value.backward()
        assert value == 0
        assert (features.grad == 0).all()


def test_mean_counts_what_it_should() -> None:
    features, labels = unit(6, 1, 4), torch.tensor([0, 0, 1, 2, 3, 3])
    rows = clk.supcon_loss(features, labels, reduction="none")
    assert ((rows > 0) == torch.tensor([1, 1, 0, 0, 1, 1]).bool()).all()
    torch.testing.assert_close(clk.supcon_loss(features, labels), rows.sum() / 6)
    torch.testing.assert_close(clk.supcon_loss(features, labels, no_positive="drop"), rows.sum() / 4)


def test_one_pair_has_loss_zero() -> None:
    """The denominator is the positive alone: 0, and gradient 0, in every digit."""
    for seed, tau in itertools.product(range(3), (0.5, 0.02)):
        torch.manual_seed(seed)
        x, y = (unit(1, 96).requires_grad_() for _ in range(2))
        learnt = torch.tensor(tau, requires_grad=True)
        views = torch.stack([x, y], 1)
        weights = torch.tensor([[0.3]])
        target = {"scale": 1 / tau, "target_scale": 2.0}
        for loss in (
            clk.nt_xent_loss(x, y, temperature=learnt),
            clk.info_nce_loss(x, y, temperature=learnt),
            clk.clip_loss(x, y, 1 / learnt),
            clk.sce_loss(x, y, temperature=learnt, coeff=0.3),
            clk.sce_loss(x, y, temperature=learnt, positive_in_target="zero"),
            clk.soft_target_cross_entropy(x, y, x, y, **target),
            clk.soft_target_cross_entropy(x, y, x, y, **target, positive=torch.tensor([0]), coeff=0.2),
            clk.dimcl_loss(x.T, y.T, temperature=learnt),
            clk.dcl_loss(x, y, temperature=learnt, sigma=0.5),
            clk.supcon_loss(views, temperature=learnt),
            clk.supcon_loss(views, torch.tensor([7]), temperature=learnt, reduction="none").sum(),
            clk.supcon_loss(views, mask=weights, temperature=learnt),
            clk.supcon_loss(views, torch.tensor([7]), temperature=learnt, summation="in"),
            clk.supcon_loss(views.transpose(0, 1), torch.tensor([7, 7]), temperature=learnt),
            clk.supcon_loss(views.transpose(0, 1), torch.tensor([7, 8]), temperature=learnt),
            clk.selfcon_loss(views, anchors="exits", temperature=learnt),
            clk.selfcon_loss(views.transpose(0, 1), augmentations=2, temperature=learnt),
            clk.multilevel_loss([views, views], torch.tensor([7]), temperature=learnt),
        ):
            assert loss == 0
            grads = torch.autograd.grad(loss, (x, y, learnt), allow_unused=True)
            assert all(g is None or (g == 0).all() for g in grads)
            assert any(g is not None for g in grads)


ALONE: dict[str, Callable[[], torch.Tensor]] = {
    "nt_xent": lambda: clk.nt_xent_loss(unit(1, 4), unit(1, 4)),
    "info_nce": lambda: clk.info_nce_loss(unit(1, 4), unit(1, 4)),
    "clip": lambda: clk.ClipLoss()(unit(1, 4), unit(1, 4), 2.0),
    "sce": lambda: clk.SCELoss()(unit(1, 4), unit(1, 4)),
    "dcl": lambda: clk.dcl_loss(unit(1, 4), unit(1, 4)),
    "dclw": lambda: clk.dcl_loss(unit(1, 4), unit(1, 4), sigma=0.5),
    "dimcl": lambda: clk.dimcl_loss(unit(4, 1), unit(4, 1)),
    "simclr": lambda: clk.SupConLoss()(unit(1, 2, 4)),
    "supcon": lambda: clk.supcon_loss(unit(1, 1, 4), torch.tensor([1])),
    "supcon in": lambda: clk.supcon_loss(unit(2, 1, 4), torch.tensor([1, 1]), summation="in"),
    "supcon capped": lambda: clk.supcon_loss(unit(1, 2, 4), torch.tensor([1]), positives_cap=2),
    "only negatives": lambda: clk.supcon_loss(
        unit(3, 2, 4), torch.ones(3), denominator="only_negatives", summation="out"
    ),
    "only negatives, in": lambda: clk.supcon_loss(
        unit(3, 2, 4), torch.ones(3), denominator="only_negatives", summation="in"
    ),
    "only negatives, mask": lambda: clk.supcon_loss(
        unit(3, 2, 4), mask=torch.ones(3, 3), denominator="only_negatives"
    ),
    "only negatives, capped": lambda: clk.supcon_loss(
        unit(3, 2, 4), torch.ones(3), denominator="only_negatives", positives_cap=2
    ),
    "selfcon": lambda: clk.selfcon_loss(unit(1, 2, 4)),
    "empty queue": lambda: clk.info_nce_loss(unit(3, 4), unit(3, 4), clk.KeyQueue(8, 4)),
    "empty queue, sce": lambda: clk.sce_loss(unit(3, 4), unit(3, 4), queue=clk.KeyQueue(8, 4)),
    "stablerep": lambda: clk.stablerep_loss(unit(1, 4), torch.tensor([1])),
    "multilevel": lambda: clk.multilevel_loss([unit(1, 2, 4)]),
}


@pytest.mark.parametrize("case", ALONE)
def test_nothing_to_contrast_with_is_said(case: str) -> None:
    """With the reason, at the line that asks for the loss, and by default once there."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            assert ALONE[case]() == 0
    assert [x.category for x in caught] == [clk.EmptyContrastWarning]
    assert caught[0].filename == __file__
    reasons = {"only negatives": "only_negatives", "empty queue": "the queue is empty"}
    assert reasons.get(case.partition(",")[0], "beside its positive") in str(caught[0].message)


def test_nothing_is_said_of_other_batches() -> None:
    labels = torch.tensor([0, 0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for denominator, summation in itertools.product(("all", "only_negatives"), ("out", "in")):
            clk.supcon_loss(unit(3, 1, 4), labels, denominator=denominator, summation=summation)
            clk.supcon_loss(unit(3, 1, 4), mask=torch.eye(3), denominator=denominator, summation=summation)
            clk.supcon_loss(unit(3, 1, 4), labels, denominator=denominator, positives_cap=1)
        clk.supcon_loss(unit(1, 3, 4), torch.tensor([1]))
        for options in ({}, {"summation": "in"}, {"denominator": "one_positive"}):
            clk.supcon_loss(unit(1, 1, 4), labels[:1], memory=(unit(2, 4), labels[1:]), **options)
        clk.info_nce_loss(unit(1, 4), unit(1, 4), unit(1, 4))
        clk.sce_loss(unit(1, 4), unit(1, 4), queue=unit(1, 4))
        clk.clip_loss(unit(2, 4), unit(2, 4), 2.0)
        torch.compile(clk.nt_xent_loss, fullgraph=True, backend="eager")(unit(1, 4), unit(1, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_cross_entropy_is_negative(dtype: torch.dtype) -> None:
    """On identical, on converged and on dominated rows, where rounding decides the sign."""
    for tau, width in itertools.product((0.01, 0.07), (16, 768)):
        same = unit(1, width).expand(24, -1).to(dtype)
        x = unit(24, width).to(dtype)
        labels = torch.arange(24) // 3
        for first, second in ((same, same), (x, x), (x[labels], x[labels])):
            views = torch.stack([first, second], 1)
            every = {"temperature": tau, "reduction": "none"}
            for loss in (
                clk.nt_xent_loss(first, second, **every),
                clk.info_nce_loss(first, second, **every),
                clk.info_nce_loss(first, second, x[:1], **every),
                clk.clip_loss(first, second, 1 / tau, reduction="none"),
                clk.sce_loss(first, second, coeff=0.9, **every),
                clk.sce_loss(first, second, queue=x[:1], coeff=0.9, **every),
                clk.dimcl_loss(first.T, second.T, **every),
                clk.soft_target_cross_entropy(
                    first, second, first, second, scale=1 / tau, target_scale=1 / tau, reduction="none"
                ),
                *(
                    clk.supcon_loss(views, *given, summation=summation, denominator=denominator, **every)
                    for given in ((), (torch.arange(24),), (labels,), (None, torch.eye(24) * 0.3))
                    for summation in ("out", "in")
                    for denominator in ("all", "one_positive")
                ),
            ):
                assert (loss >= 0).all()


def test_the_gradient_passes_where_rounding_made_a_value_negative() -> None:
    """And negative weights, or a denominator without the positives, make negative losses."""
    below = torch.tensor([-1e-6, 2.0, torch.nan, -3.0], requires_grad=True)
    rows = at_least_zero(below * 1)
    assert rows[[0, 1, 3]].tolist() == [0.0, 2.0, 0.0]
    assert rows[2].isnan()
    assert torch.equal(torch.autograd.grad(rows.sum(), below)[0], torch.ones(4))
    features, weights = unit(6, 2, 4), -torch.rand(6, 6)
    assert_close(Problem("supcon_loss", {"features": features, "mask": weights}, {"reduction": "none"}))
    assert (clk.supcon_loss(features, mask=weights, reduction="none") < 0).any()
    assert clk.dcl_loss(features[:, 0], features[:, 0]) < 0
    assert clk.supcon_loss(features[:, :1].expand(-1, 2, -1), denominator="only_negatives") < 0
