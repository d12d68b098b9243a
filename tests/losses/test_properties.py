"""Properties that hold for all shapes: the reference's values, and the symmetries of each loss."""

from __future__ import annotations

from typing import Any

import comparisons
import pytest
import torch
import torch.nn.functional as F
from comparisons import Problem, assert_close, assert_parity, unit
from hypothesis import given
from hypothesis import strategies as st

import cl_kernels as clk

pytestmark = pytest.mark.usefixtures("backend", "one_thread")

SIZES = st.integers(1, 40)
WIDTHS = st.integers(1, 40)
TAUS = st.sampled_from([0.01, 0.07, 0.1, 0.5, 2.0])
SEEDS = st.integers(0, 2**31)


def f64(*shape: int) -> torch.Tensor:
    return unit(*shape, dtype=torch.float64)


OPTIONS = st.fixed_dictionaries(
    {
        "contrast_mode": st.sampled_from(["all", "one"]),
        "summation": st.sampled_from(["out", "in"]),
        "denominator": st.sampled_from(["all", "one_positive", "only_negatives"]),
        "no_positive": st.sampled_from(["zero", "drop"]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "temperature": TAUS,
    }
)


@given(
    n=SIZES,
    views=st.integers(1, 4),
    d=WIDTHS,
    classes=st.integers(0, 40),
    kept=st.sampled_from([None, 0, 1, 3]),
    options=OPTIONS,
    seed=SEEDS,
)
def test_supcon(
    n: int, views: int, d: int, classes: int, kept: int | None, options: dict[str, Any], seed: int
) -> None:
    torch.manual_seed(seed)
    labels = {"labels": torch.randint(0, classes, (n,))} if classes else {}
    options = {**options, "positives_cap": None if kept is None else kept * views}
    assert_close(Problem("supcon_loss", {"features": f64(n, views, d), **labels}, options))


@given(n=SIZES, d=WIDTHS, tau=TAUS, seed=SEEDS, kind=st.sampled_from(["random", "converged"]))
def test_every_loss(n: int, d: int, tau: float, seed: int, kind: str) -> None:
    torch.manual_seed(seed)
    for problem in [*comparisons.problems(kind, n, d), comparisons.clip_problem(kind, n, d, 1 / tau)]:
        assert_close(problem if problem.function == "clip_loss" else comparisons.tempered(problem, tau))


@given(n=SIZES, d=WIDTHS, seed=SEEDS, tau=TAUS)
def test_parity(n: int, d: int, seed: int, tau: float) -> None:
    torch.manual_seed(seed)
    features = unit(n, 2, d)
    assert_parity(Problem("supcon_loss", {"features": features}, {"temperature": tau}))
    assert_parity(Problem("nt_xent_loss", {"z0": features[:, 0], "z1": features[:, 1]}, {"temperature": tau}))


@given(n=SIZES, d=WIDTHS, seed=SEEDS)
def test_the_order_of_samples_does_not_matter(n: int, d: int, seed: int) -> None:
    torch.manual_seed(seed)
    order, labels, features = torch.randperm(n), torch.randint(0, 5, (n,)), f64(n, 2, d)
    rows = clk.supcon_loss(features, labels, reduction="none").view(2, n)
    shuffled = clk.supcon_loss(features[order], labels[order], reduction="none").view(2, n)
    torch.testing.assert_close(shuffled, rows[:, order])


@given(n=SIZES, d=WIDTHS, seed=SEEDS)
def test_only_equality_of_labels_matters(n: int, d: int, seed: int) -> None:
    torch.manual_seed(seed)
    labels, features = torch.randint(0, 5, (n,)), unit(n, 2, d)
    names = torch.randint(-(2**62), 2**62, (5,))
    assert torch.equal(clk.supcon_loss(features, names[labels]), clk.supcon_loss(features, labels))


@given(n=SIZES, d=WIDTHS, seed=SEEDS)
def test_a_rotation_changes_nothing(n: int, d: int, seed: int) -> None:
    torch.manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))
    x, y = f64(n, d), f64(n, d)
    for loss in (clk.nt_xent_loss, clk.info_nce_loss, clk.dcl_loss, clk.sce_loss):
        torch.testing.assert_close(loss(x @ rotation, y @ rotation), loss(x, y))


@given(n=st.integers(2, 40), d=WIDTHS, seed=SEEDS)
def test_what_is_normalised_has_no_scale(n: int, d: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, y = f64(n, d), f64(n, d)
    torch.testing.assert_close(clk.nt_xent_loss(7 * x, 0.1 * y), clk.nt_xent_loss(x, y))
    torch.testing.assert_close(clk.dimcl_loss(7 * x + 3, 0.1 * y - 1), clk.dimcl_loss(x, y))


@given(n=SIZES, d=WIDTHS, seed=SEEDS, tau=TAUS)
def test_losses_that_are_one_another(n: int, d: int, seed: int, tau: float) -> None:
    torch.manual_seed(seed)
    features, labels = f64(n, 2, d), torch.randint(0, 5, (n,))
    x, y = features.unbind(1)
    simclr = clk.supcon_loss(features, temperature=tau, base_temperature=tau)
    torch.testing.assert_close(clk.nt_xent_loss(x, y, temperature=tau), simclr)
    torch.testing.assert_close(clk.selfcon_loss(features, temperature=tau, base_temperature=tau), simclr)
    torch.testing.assert_close(clk.supcon_loss(features, torch.arange(n)), clk.supcon_loss(features))
    torch.testing.assert_close(clk.supcon_loss(features, mask=torch.eye(n)), clk.supcon_loss(features))
    equal = (labels[:, None] == labels).float()
    torch.testing.assert_close(clk.supcon_loss(features, mask=equal), clk.supcon_loss(features, labels))
    torch.testing.assert_close(clk.multilevel_loss([features], labels), clk.supcon_loss(features, labels))
    one_way = clk.info_nce_loss(x, y, temperature=tau)
    torch.testing.assert_close(clk.sce_loss(x, y, temperature=tau, coeff=1.0), one_way)
    other_way = clk.info_nce_loss(y, x, temperature=tau)
    torch.testing.assert_close(clk.clip_loss(x, y, 1 / tau), (one_way + other_way) / 2)
    torch.testing.assert_close(one_way, F.cross_entropy(x @ y.T / tau, torch.arange(n)))


@given(n=SIZES, d=WIDTHS, m=SIZES, seed=SEEDS, coeff=st.floats(0, 1))
def test_a_queue_is_more_keys(n: int, d: int, m: int, seed: int, coeff: float) -> None:
    torch.manual_seed(seed)
    q, k, queue = f64(n, d), f64(n, d), f64(m, d)
    torch.testing.assert_close(
        clk.sce_loss(q, k, k, queue, coeff=coeff), clk.sce_loss(q, k, torch.cat([k, queue]), coeff=coeff)
    )
    for i in range(min(n, 3)):
        row = slice(i, i + 1)
        for how in ("exclude", "zero"):
            torch.testing.assert_close(
                clk.sce_loss(q[row], k[row], queue=queue, coeff=coeff, positive_in_target=how),
                clk.sce_loss(q[row], k[row], k[row], queue, coeff=coeff, positive_in_target=how),
            )
        torch.testing.assert_close(
            clk.info_nce_loss(q[row], k[row], queue),
            F.cross_entropy(q[row] @ torch.cat([k[row], queue]).T / 0.07, torch.zeros(1, dtype=torch.int64)),
        )
