"""docs/evidence.md and its picture, from the stored measurements alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined

from cl_kernels.bench import figures
from cl_kernels.bench.workloads import Workload

from .plan import PLANS, Claim
from .statistics import POWER, paired

OURS, EAGER = "cl_kernels", "eager"
PICTURE = "evidence.png"
PAGE = Path(__file__).with_name("page.md.j2")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def spread(values: Sequence[float], digits: int = 2, unit: float = 100) -> str:
    """Mean ± standard deviation, by default of shares in per cent."""
    return f"{unit * np.mean(values):.{digits}f} ± {unit * np.std(values, ddof=1):.{digits}f}"


class Report:
    """The measurements as tables of text."""

    def __init__(self, stored: dict[str, Any]) -> None:
        self.stored = stored
        self.runs = pd.DataFrame(stored["runs"]).sort_values("seed")
        self.systems = [name for name in PLANS if name in set(self.runs.system)]
        self.seeds = self.runs.seed.nunique()

    def of(self, system: str, variant: str, formula: str = OURS) -> pd.DataFrame:
        runs = self.runs
        return runs[(runs.system == system) & (runs.variant == variant) & (runs.formula == formula)]

    def figure(self, system: str, variant: str, name: str, formula: str = OURS) -> list[float]:
        found = self.of(system, variant, formula)
        if name == "step_ms":
            return found.step_ms.tolist()
        return [figures[name] for figures in found.figures]

    def first_steps(self) -> str:
        """The largest relative differences of the first steps, over all seeds."""
        found = pd.DataFrame(self.stored["first_steps"])
        worst = found.groupby(["system", "run", "step"], sort=False)[["loss", "gradient"]].max()
        steps = sorted(found.step.unique())
        rows = [
            [
                PLANS[system].title,
                text,
                *(f"{worst[kind][system, run, s]:.1e}" for kind in worst for s in steps),
            ]
            for system in self.systems
            for run, text in (("ours", "ours"), ("rounded", "eager, other rounding"))
        ]
        return table(
            ["system", "", *(f"{kind}, step {s + 1}" for kind in worst for s in steps)], rows, left=2
        )

    def equality(self) -> str:
        """Ours and eager from the same seeds: the last losses and the accuracy, and how they differ."""
        rows = []
        for system in self.systems:
            plan = PLANS[system]
            last = {
                formula: [
                    float(np.mean(losses[-max(len(losses) // 10, 1) :]))
                    for losses in self.of(system, plan.main.name, formula).losses
                ]
                for formula in (OURS, EAGER)
            }
            right = {
                formula: self.figure(system, plan.main.name, plan.figure, formula)
                for formula in (OURS, EAGER)
            }
            for name, pair, unit, digits in (
                ("last loss", last, 1.0, 4),
                (f"{plan.figure}, %", right, 100.0, 2),
            ):
                test = paired(pair[OURS], pair[EAGER])
                cells = (spread(pair[formula], digits, unit) for formula in (OURS, EAGER))
                bounds = f"{unit * test.low:+.{digits}f} to {unit * test.high:+.{digits}f}"
                found = [
                    f"{unit * test.mean:+.{digits}f}",
                    bounds,
                    f"{test.p:.2f}",
                    f"{unit * test.detectable:.{digits}f}",
                ]
                rows.append([plan.title, name, *cells, *found])
        header = ["system", "figure", "ours", "eager", "difference", "95 % interval", "p", "would be seen"]
        return table(header, rows, left=2)

    def accuracies(self, system: str) -> str:
        """Every method's figures: means and standard deviations over the seeds."""
        plan = PLANS[system]
        names = list(
            dict.fromkeys(name for found in self.runs[self.runs.system == system].figures for name in found)
        )
        rows = []
        for variant in plan.variants:
            cells = [variant.name]
            for name in names:
                present = [f[name] for f in self.of(system, variant.name).figures if name in f]
                cells.append(self.cell(name, present))
            rows.append([*cells, spread(self.figure(system, variant.name, "step_ms"), 1, 1)])
        return table(["method", *map(self.label, names), "ms a step"], rows)

    @staticmethod
    def share(values: Sequence[float]) -> bool:
        return all(0 <= x <= 1 for x in values)

    def label(self, name: str) -> str:
        values = [figures[name] for figures in self.runs.figures if name in figures]
        return f"{name}, %" if self.share(values) else name

    def cell(self, name: str, values: Sequence[float]) -> str:
        if not values:
            return figures.MISSING
        return spread(values) if self.label(name).endswith("%") else spread(values, 3, 1)

    def costs(self) -> str:
        """Eager's time of a step over ours, seed by seed in turn; the loss alone, time and peak memory."""
        alone = pd.DataFrame(self.stored["losses"])
        rows = []
        for system in self.systems:
            plan = PLANS[system]
            ours = self.figure(system, plan.main.name, "step_ms")
            eager = self.figure(system, plan.main.name, "step_ms", EAGER)
            ratio = np.median(np.divide(eager, ours))
            first = [plan.title, f"{np.median(ours):.1f} ms", f"{ratio:.2f}×"]
            for size in ("recipe", "large"):
                both = alone[(alone.system == system) & (alone["size"] == size)].set_index("formula")
                work = Workload(**both.work.iloc[0])
                ms, peak = both.ms[OURS], both.peak[OURS]
                cells = [figures.time(ms / 1e3), f"{both.ms[EAGER] / ms:.1f}×", figures.size(peak)]
                shape = f"{work.rows} × {work.columns} × {work.width}"
                rows.append([*first, shape, *cells, figures.size(both.peak[EAGER])])
                first = ["", "", ""]
        header = ["system", "step", "eager's", "loss alone", "time", "eager's", "peak memory", "eager's"]
        return table(header, rows, left=1)

    def summary(self) -> str:
        """A row a system for the README: its recipe, command and figures."""
        alone = pd.DataFrame(self.stored["losses"]).set_index(["system", "size", "formula"])
        rows = []
        for system in self.systems:
            plan = PLANS[system]
            ours, eager = (
                spread(self.figure(system, plan.main.name, plan.figure, formula), 1)
                for formula in (OURS, EAGER)
            )
            mine, theirs = (alone.loc[(system, "large", formula)] for formula in (OURS, EAGER))
            work = Workload(**mine.work)
            rows.append(
                [
                    f"[{plan.title}](examples/{system}/__main__.py)",
                    f"`make example-{system}`",
                    f"{plan.figure} {ours} %",
                    f"{eager} %",
                    f"{work.rows} × {work.columns} × {work.width}",
                    figures.ratio(theirs.ms / mine.ms),
                    figures.ratio(theirs.peak / mine.peak),
                ]
            )
        header = [
            "recipe",
            "command",
            "trained with our loss",
            "with eager's",
            "the loss alone",
            "faster",
            "less memory",
        ]
        return table(header, rows, left=5)

    def claims(self) -> str:
        return table(
            ["system", "claim", "compared by", "difference", "95 % interval", "p", "at this size"],
            [self.claim(system, claim) for system in self.systems for claim in PLANS[system].claims],
            left=3,
        )

    def claim(self, system: str, claim: Claim) -> list[str]:
        better = self.figure(system, claim.better, claim.figure)
        worse = self.figure(system, claim.worse, claim.other or claim.figure)
        if claim.ratio:
            test = paired(np.log(better), np.log(worse))
            shown = [f"× {np.exp(x):.2f}" for x in (test.mean, test.low, test.high)]
        else:
            test = paired(better, worse)
            percent = self.label(claim.figure).endswith("%")
            shown = [f"{100 * x:+.2f}" if percent else f"{x:+.3f}" for x in (test.mean, test.low, test.high)]
        sign = -1 if claim.lower else 1
        verdict = "not decided"
        if test.low > 0 or test.high < 0:
            verdict = "shows" if sign * test.mean > 0 else "**the opposite shows**"
        sign_of = "/" if claim.ratio else "−"
        compared = f"{claim.figure}: {claim.better} {sign_of} {claim.worse}"
        if claim.other:
            compared = f"{claim.better}: {claim.figure} {sign_of} {claim.other}"
            if claim.better != claim.worse:
                compared = f"{claim.better}'s {claim.figure} {sign_of} {claim.worse}'s {claim.other}"
        interval = f"{shown[1]} to {shown[2]}"
        return [PLANS[system].title, claim.text, compared, shown[0], interval, f"{test.p:.3f}", verdict]

    def draw(self, path: Path) -> None:
        """Both curves of each system, the mean over the seeds, and the band of all seeds."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(2, 3, figsize=(13, 7))
        for axis, system in zip(axes.flat, self.systems, strict=False):
            plan = PLANS[system]
            for formula, style in ((EAGER, "-"), (OURS, "--")):
                curves = np.array(self.of(system, plan.main.name, formula).losses.tolist())
                axis.plot(curves.mean(0), style, label=formula, lw=2 if style == "-" else 1.5)
                if formula == EAGER:
                    axis.fill_between(range(curves.shape[1]), curves.min(0), curves.max(0), alpha=0.2)
            axis.set(title=f"{plan.title}: {plan.main.name}", xlabel="step", ylabel="loss")
            axis.legend(frameon=False)
        for axis in axes.flat[len(self.systems) :]:
            axis.axis("off")
        figure.suptitle(f"Ours and the authors' formula: mean of {self.seeds} seeds, and eager's band")
        figure.tight_layout()
        figure.savefig(path, dpi=100)
        plt.close(figure)

    def markdown(self) -> str:
        page = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(
            PAGE.read_text()
        )
        return page.render(report=self, stored=self.stored, plans=PLANS, picture=PICTURE, power=POWER)
