"""What is compared: the runs of each system, the losses alone, and the papers' claims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cl_kernels.bench.workloads import Workload


@dataclass(frozen=True)
class Variant:
    """A method of a recipe, with settings that differ from the preset's."""

    method: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return ", ".join([self.method, *(f"{k} {v}" for k, v in self.changes.items())])


@dataclass(frozen=True)
class Claim:
    """A figure of `better` is above that of `worse` (which may be `other`), or, `lower`, below it; times and
    sizes as ratios."""

    text: str
    better: str
    worse: str
    figure: str
    other: str | None = None
    lower: bool = False
    ratio: bool = False


@dataclass(frozen=True)
class Plan:
    """A system: `main` is trained with our loss and with the eager formula, `others` with ours; `figure` is
    what accuracy means; `recipe` and `paper` are the loss alone, of the cpu preset and of the paper."""

    title: str
    main: Variant
    others: tuple[Variant, ...]
    figure: str
    recipe: Workload
    paper: Workload
    claims: tuple[Claim, ...]

    @property
    def variants(self) -> tuple[Variant, ...]:
        return (self.main, *self.others)


PLANS = {
    "supcon": Plan(
        "SupCon",
        Variant("supcon"),
        (Variant("supcon-in"), Variant("simclr"), Variant("cross-entropy")),
        "linear probe",
        Workload("supcon", 500, 500, 128),
        Workload("supcon", 2048, 2048, 128),
        (
            Claim("SupCon over cross-entropy", "supcon", "cross-entropy", "linear probe"),
            Claim("the same under corruptions", "supcon", "cross-entropy", "corrupted"),
            Claim("labels over none (SimCLR)", "supcon", "simclr", "linear probe"),
            Claim('"out" over "in"', "supcon", "supcon-in", "linear probe"),
        ),
    ),
}
