"""The evidence: its statistics, its measurements, and the page that they make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

pytest.importorskip("tyro", reason="the examples' requirements are not installed")

from examples.evidence import measure
from examples.evidence.__main__ import ROOT, Options, main, with_summary
from examples.evidence.plan import PLANS, Claim
from examples.evidence.report import Report
from examples.evidence.statistics import POWER, effect, holm, paired

SEEDS = range(5)


@pytest.mark.parametrize("n", [3, 5, 20])
def test_a_difference_that_would_be_seen_is_seen_as_often_as_said(n: int) -> None:
    draws = np.random.default_rng(0).normal(effect(n), 1, (20_000, n))
    found = stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(POWER, abs=0.015)


def test_paired_is_the_t_test() -> None:
    ours, others = [1.0, 2.0, 4.0, 3.5], [0.5, 1.9, 3.0, 3.4]
    found, expected = paired(ours, others), stats.ttest_rel(ours, others)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert found.mean == pytest.approx(0.425)


def test_equal_figures_differ_by_nothing() -> None:
    found = paired([0.5] * 5, [0.5] * 5)
    assert (found.mean, found.low, found.high, found.p, found.detectable) == (0, 0, 0, 1, 0)


def made(better: float) -> dict[str, Any]:
    """Stored measurements of SupCon in which its accuracy exceeds cross-entropy's by about `better`."""
    runs = []
    for seed in SEEDS:
        for variant in PLANS["supcon"].variants:
            for formula in measure.FORMULAS if variant.method == "supcon" else ("cl_kernels",):
                right = 0.9 + 0.001 * seed + (better + 1e-4 * seed) * (variant.method == "supcon")
                figures = {"linear probe": right, "corrupted": right - 0.1}
                run = {"system": "supcon", "variant": variant.name, "formula": formula, "seed": seed}
                runs.append(run | {"figures": figures})
    return {"runs": runs}


@pytest.mark.parametrize(
    ("better", "verdict"), [(0.02, "shows"), (-0.02, "**the opposite shows**"), (-2e-4, "not decided")]
)
def test_claims_are_judged_by_their_p(better: float, verdict: str) -> None:
    claim, report = Claim("", "supcon", "cross-entropy", "linear probe"), Report(made(better))
    test = report.test("supcon", claim)
    *_, difference, interval, _, _, found = report.claim("supcon", claim, test, test.p)
    assert found == verdict
    assert float(difference) == pytest.approx(100 * (better + 2e-4), abs=0.006)
    low, high = map(float, interval.split(" to "))
    assert low <= float(difference) <= high


def test_holm_is_bonferroni_for_the_smallest_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_first_steps_of_ours_and_eager(one_thread: None) -> None:
    """The loss within float32's rounding; the gradient closer than what a rounding of the weights does."""
    found = {(r["run"], r["step"]): r for r in measure.first_steps("supcon", 0)}
    for step in range(measure.FIRST_STEPS):
        assert found["ours", step]["loss"] < 1e-6
        assert 0 < found["ours", step]["gradient"] < found["rounded", step]["gradient"] < 1e-2


def test_variants_are_methods_of_their_recipes() -> None:
    for system, plan in PLANS.items():
        names = {variant.name for variant in plan.variants}
        assert len(names) == len(plan.variants)
        for variant in plan.variants:
            settings = measure.settings_of(system, variant, "cl_kernels", 0, None)
            assert settings.methods == (variant.method,)
        assert {name for claim in plan.claims for name in (claim.better, claim.worse)} <= names


def test_page_is_that_of_the_stored_measurements(tmp_path: Path) -> None:
    if not Options.store.exists():
        pytest.skip("no stored measurements")
    main(["--render", "--document", str(tmp_path / "evidence.md")])
    stale = "python -m examples.evidence --render writes it anew"
    assert (tmp_path / "evidence.md").read_text() == Options.document.read_text(), stale
    readme = (ROOT / "README.md").read_text()
    assert with_summary(readme, Report(json.loads(Options.store.read_text()))) == readme, stale


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "2"], "--seeds must be at least 3"),
        (["--steps", "5"], "give --store and --document of your own"),
        (["--systems", "supcom"], "--systems must be of supcon, .* got supcom"),
    ],
)
def test_wrong_options_lose_nothing(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(arguments)
