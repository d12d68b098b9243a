"""docs/evidence.md, its picture, and the README's table, from the stored measurements alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined

from cl_kernels.bench import figures
from cl_kernels.bench.workloads import Workload

from .plan import EAGER, OURS, PLANS, Claim
from .statistics import LEVEL, POWER, Paired, holm, paired

PARTS = 10  # of a curve
PICTURE = "evidence.png"
PAGE = Path(__file__).with_name("page.md.j2")
PLAIN = ("corr. h", "corr. z", "hardest tenth", "saved MB", "temperature")  # figures that are no shares


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def spread(values: Sequence[float], digits: int = 2, unit: float = 100) -> str:
    """Mean ± standard deviation, by default of shares in per cent."""
    return f"{unit * np.mean(values):.{digits}f} ± {unit * np.std(values, ddof=1):.{digits}f}"


def shape(work: Workload) -> str:
    """Rows × columns × width, each width of several levels."""
    return f"{work.rows} × {work.columns} × {', '.join(map(str, work.widths))}"


class Report:
    """The measurements as tables of text."""

    def __init__(self, stored: dict[str, Any]) -> None:
        self.stored = stored
        self.runs = pd.DataFrame(stored["runs"]).sort_values("seed")
        self.again = Report({"runs": stored["again"]}) if stored.get("again") else None
        self.systems = [name for name in PLANS if name in set(self.runs.system)]
        self.seeds = self.runs.seed.nunique()

    def of(self, system: str, variant: str, formula: str = OURS) -> pd.DataFrame:
        runs = self.runs
        return runs[(runs.system == system) & (runs.variant == variant) & (runs.formula == formula)]

    def figure(self, system: str, variant: str, name: str, formula: str = OURS) -> list[float]:
        """A figure of each seed."""
        return [found[name] for found in self.of(system, variant, formula).figures if name in found]

    def curves(self, system: str, formula: str) -> np.ndarray:
        """Losses of the main variant, [seeds, steps]."""
        return np.array(self.of(system, PLANS[system].main.name, formula).losses.tolist())

    def first_steps(self) -> str:
        """The largest relative differences of the first steps, over all seeds."""
        found = pd.DataFrame(self.stored["first_steps"])
        worst = found.groupby(["system", "run", "step"], sort=False)[["loss", "gradient"]].max()
        kinds = [(kind, step) for kind in worst for step in sorted(found.step.unique())]
        rows = [
            [PLANS[system].title, text, *(f"{worst[kind][system, run, step]:.1e}" for kind, step in kinds)]
            for system in self.systems
            for run, text in (("ours", "ours"), ("rounded", "eager, other rounding"))
        ]
        return table(["system", "", *(f"{kind}, step {step + 1}" for kind, step in kinds)], rows, left=2)

    def equality(self) -> str:
        """Ours and eager from the same seeds: curves and accuracy, and how they differ."""
        header = ["system", "figure", "ours", "eager", "difference", "95 % interval", "would be seen", "p"]
        found = [pair for system in self.systems for pair in self.equal(system)]
        adjusted = holm([p for _, p in found])
        rows = [[*cells, f"{p:.2f}"] for (cells, _), p in zip(found, adjusted, strict=True)]
        return table(header, rows, left=2)

    def equal(self, system: str) -> Iterator[tuple[list[str], float]]:
        """Rows, and their p."""
        plan = PLANS[system]
        curves = [self.curves(system, formula) for formula in (OURS, EAGER)]
        count = min(PARTS, curves[0].shape[1])
        parts = [np.stack([x.mean(1) for x in np.array_split(curve, count, 1)]) for curve in curves]
        tests = [paired(*both) for both in zip(*parts, strict=True)]
        ps = [min(1.0, count * test.p) for test in tests]
        most = int(np.argmin(ps))
        for word, i, p in (
            (f"part {most + 1} of {count}, which differs most", most, ps[most]),
            ("last part", count - 1, tests[-1].p),
        ):
            yield self.compared(system, f"loss, {word}", parts[0][i], parts[1][i], 1.0, 4), p
        right = [self.figure(system, plan.main.name, plan.figure, formula) for formula in (OURS, EAGER)]
        yield self.compared(system, f"{plan.figure}, %", *right, 100.0, 2), paired(*right).p

    @staticmethod
    def compared(system: str, name: str, ours: Any, eager: Any, unit: float, digits: int) -> list[str]:
        test = paired(ours, eager)
        means = [spread(x, digits, unit) for x in (ours, eager)]
        low, high = (f"{unit * x:+.{digits}f}" for x in (test.low, test.high))
        difference, seen = f"{unit * test.mean:+.{digits}f}", f"{unit * test.detectable:.{digits}f}"
        return [PLANS[system].title, name, *means, difference, f"{low} to {high}", seen]

    def label(self, name: str) -> str:
        return name if name in PLAIN else f"{name}, %"

    def shown(self, name: str, values: Sequence[float]) -> str:
        if not values:
            return figures.MISSING
        return spread(values, 3, 1) if name in PLAIN else spread(values)

    def accuracies(self, system: str) -> str:
        """Every variant's figures: means and standard deviations over the seeds."""
        found = self.runs[self.runs.system == system].figures
        names = list(dict.fromkeys(name for one in found for name in one))
        variants = [variant.name for variant in PLANS[system].variants]
        rows = [[x, *(self.shown(name, self.figure(system, x, name)) for name in names)] for x in variants]
        return table(["", *map(self.label, names)], rows)

    def timed(self, system: str) -> dict[str, np.ndarray]:
        """Milliseconds of steps in turn; ours first, then eager, then other variants."""
        found = [record for record in self.stored["steps"] if record["system"] == system]
        return {EAGER if x["formula"] == EAGER else x["variant"]: np.array(x["ms"]) for x in found}

    def steps(self) -> str:
        """A step of each timed variant; the median of the ratios of steps in turn."""
        rows = []
        for system in self.systems:
            times = self.timed(system)
            ours = times[PLANS[system].main.name]
            rows += [
                [PLANS[system].title, name, f"{np.median(ms):.1f}", figures.ratio(np.median(ms / ours))]
                for name, ms in times.items()
            ]
        return table(["system", "", "ms a step", "over ours"], rows, left=2)

    def alone(self, system: str, size: str) -> tuple[Workload, pd.Series, pd.Series]:
        """The loss alone, of ours and of eager."""
        found = pd.DataFrame(self.stored["losses"])
        both = found[(found.system == system) & (found["size"] == size)].set_index("formula")
        return Workload(**both.work.iloc[0]), both.loc[OURS], both.loc[EAGER]

    def losses(self) -> str:
        rows = []
        for system in self.systems:
            for size in ("recipe", "large"):
                work, ours, eager = self.alone(system, size)
                times = figures.time(ours.ms / 1e3), figures.ratio(eager.ms / ours.ms)
                peaks = figures.size(ours.peak), figures.size(eager.peak)
                rows.append([PLANS[system].title, shape(work), *times, *peaks])
        return table(["system", "", "time", "eager's", "peak memory", "eager's"], rows, left=2)

    def summary(self) -> str:
        """A row a system for the README: its recipe, command and figures."""
        rows = []
        for system in self.systems:
            plan = PLANS[system]
            right = [
                spread(self.figure(system, plan.main.name, plan.figure, formula), 1)
                for formula in (OURS, EAGER)
            ]
            times = self.timed(system)
            step = np.median(times[EAGER] / times[plan.main.name])
            work, mine, theirs = self.alone(system, "large")
            rows.append(
                [
                    f"[{plan.title}](examples/{system}/__main__.py)",
                    f"`make example-{system}`",
                    f"[{plan.figure}](docs/evidence.md#{plan.title.lower().replace(' ', '-')}): {right[0]} %",
                    f"{right[1]} %",
                    figures.ratio(step),
                    shape(work),
                    figures.ratio(theirs.ms / mine.ms),
                    figures.ratio(theirs.peak / mine.peak),
                ]
            )
        header = [
            "recipe",
            "command",
            "trained with our loss",
            "with eager's",
            "eager's step",
            "the loss alone",
        ]
        return table([*header, "eager's time", "eager's memory"], rows, left=3)

    def claims(self) -> str:
        pairs = [(system, claim) for system in self.systems for claim in PLANS[system].claims]
        tests = [self.test(*pair) for pair in pairs]
        adjusted = holm([test.p for test in tests])
        rows = [self.claim(*x) for x in zip(*zip(*pairs, strict=True), tests, adjusted, strict=True)]
        header = ["system", "claim", "compared by", "difference", "95 % interval", "p", "would be seen"]
        return table([*header, "at this size"], rows, left=3)

    def test(self, system: str, claim: Claim) -> Paired:
        better = self.figure(system, claim.better, claim.figure)
        worse = self.figure(system, claim.worse, claim.other or claim.figure)
        return paired(np.log(better), np.log(worse)) if claim.ratio else paired(better, worse)

    def claim(self, system: str, claim: Claim, test: Paired, p: float) -> list[str]:
        """A row; p is adjusted for the number of claims."""
        sign = "/" if claim.ratio else "−"
        name = self.label(claim.figure)
        if not claim.other:
            compared = f"{name}: {claim.better} {sign} {claim.worse}"
        elif claim.better == claim.worse:
            compared = f"{claim.better}: {claim.figure} {sign} {self.label(claim.other)}"
        else:
            compared = f"{claim.better}'s {claim.figure} {sign} {claim.worse}'s {self.label(claim.other)}"
        write = self.writer(claim)
        verdict = "not decided"
        if p < LEVEL:
            verdict = "shows" if (test.mean < 0) == claim.lower else "**the opposite shows**"
        bounds = f"{write(test.low)} to {write(test.high)}"
        seen = write(test.detectable).lstrip("+")
        return [
            PLANS[system].title,
            claim.text,
            compared,
            write(test.mean),
            bounds,
            f"{p:.3f}",
            seen,
            verdict,
        ]

    def writer(self, claim: Claim) -> Callable[[float], str]:
        if claim.ratio:
            return lambda x: f"× {np.exp(x):.2f}"
        return (lambda x: f"{x:+.3f}") if claim.figure in PLAIN else (lambda x: f"{100 * x:+.2f}")

    def draw(self, path: Path) -> None:
        """Both curves of each system, the mean over the seeds, and the band of all seeds."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(2, 3, figsize=(13, 7))
        for axis, system in zip(axes.flat, self.systems, strict=False):
            for formula, style in ((EAGER, "-"), (OURS, "--")):
                curves = self.curves(system, formula)
                axis.plot(curves.mean(0), style, label=formula, lw=2 if style == "-" else 1.5)
                if formula == EAGER:
                    axis.fill_between(range(curves.shape[1]), curves.min(0), curves.max(0), alpha=0.2)
            plan = PLANS[system]
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
