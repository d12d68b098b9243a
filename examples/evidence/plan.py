"""Comparisons: the runs of each system, the losses alone, and the papers' claims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cl_kernels.bench.workloads import Workload


@dataclass(frozen=True)
class Variant:
    """A method of a recipe, with settings that differ from the preset's, and perhaps a name of its own."""

    method: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or ", ".join([self.method, *(f"{k} {v}" for k, v in self.changes.items())])


@dataclass(frozen=True)
class Claim:
    """That the variant `better` has a higher `figure` than `worse` (of which `other` is taken, if given).

    lower: that it has a lower one. ratio: compared by their ratio, not their difference.
    """

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
    what accuracy means; `recipe` and `large` are the loss alone, of the cpu preset and of the paper."""

    title: str
    main: Variant
    others: tuple[Variant, ...]
    figure: str
    recipe: Workload
    large: Workload
    claims: tuple[Claim, ...]
    timed: tuple[Variant, ...] = ()  # whose steps are timed beside the main one's

    @property
    def variants(self) -> tuple[Variant, ...]:
        return (self.main, *self.others)


OURS, EAGER = "cl_kernels", "eager"  # whose loss
UNTRAINED = {"epochs": 0}
TWO_VIEWS = {"views": 2}

PLANS = {
    "supcon": Plan(
        "SupCon",
        Variant("supcon"),
        (
            Variant("supcon-in"),
            Variant("simclr"),
            Variant("cross-entropy"),
            Variant("cross-entropy", TWO_VIEWS),
            Variant("supcon", UNTRAINED, "untrained"),
        ),
        "linear probe",
        Workload("supcon", 500, 500, 128),
        Workload("supcon", 2048, 2048, 128),
        (
            Claim("SupCon over cross-entropy", "supcon", "cross-entropy, views 2", "linear probe"),
            Claim("the same under corruptions", "supcon", "cross-entropy, views 2", "corrupted"),
            Claim("labels over none (SimCLR)", "supcon", "simclr", "linear probe"),
            Claim('"out" over "in"', "supcon", "supcon-in", "linear probe"),
        ),
    ),
    "selfcon": Plan(
        "SelfCon",
        Variant("selfcon-s"),
        (
            Variant("selfcon-m"),
            Variant("selfcon-sa"),
            Variant("selfcon-su"),
            Variant("supcon"),
            Variant("cross-entropy"),
        ),
        "linear probe",
        Workload("selfcon", 500, 500, 128),
        Workload("selfcon", 2048, 2048, 128),
        (
            Claim("one view and an exit over two views", "selfcon-s", "supcon", "linear probe"),
            Claim("over cross-entropy", "selfcon-s", "cross-entropy", "linear probe"),
            Claim("exits and backbone over backbone", "selfcon-s", "selfcon-s", "ensemble", "linear probe"),
            Claim(
                "less memory a step than two views", "selfcon-s", "supcon", "saved MB", lower=True, ratio=True
            ),
        ),
        (Variant("selfcon-m"), Variant("supcon"), Variant("cross-entropy")),
    ),
    "sce": Plan(
        "SCE",
        Variant("sce"),
        (
            Variant("moco"),
            Variant("ressl"),
            Variant("sce", {"target_temperature": 0.1}),
            Variant("sce", UNTRAINED, "untrained"),
        ),
        "linear probe",
        Workload("sce", 250, 1025, 128),
        Workload("sce", 512, 65537, 256),
        (
            Claim("λ = 0.5 over λ = 1 (MoCo)", "sce", "moco", "linear probe"),
            Claim("λ = 0.5 over λ = 0 (ReSSL)", "sce", "ressl", "linear probe"),
            Claim("a sharper target over τ_m = τ", "sce", "sce, target_temperature 0.1", "linear probe"),
        ),
    ),
    "dimcl": Plan(
        "DimCL",
        Variant("byol+dimcl"),
        (
            Variant("byol"),
            Variant("simsiam"),
            Variant("simsiam+dimcl"),
            Variant("simclr"),
            Variant("simclr+dimcl"),
            Variant("barlow"),
            Variant("barlow+dimcl"),
            Variant("byol+dimcl", {"weight": 1.0}, "dimcl alone"),
            Variant("byol+dimcl", {"temperature": 0.05}),
            Variant("byol+dimcl", {"temperature": 0.3}),
            Variant("byol+dimcl", {"temperature": 1.0}),
            Variant("byol+dimcl", UNTRAINED, "untrained"),
        ),
        "linear probe",
        Workload("dimcl", 256, 256, 250),
        Workload("dimcl", 4096, 4096, 256),
        (
            Claim("BYOL with DimCL over without", "byol+dimcl", "byol", "linear probe"),
            Claim("and over DimCL alone", "byol+dimcl", "dimcl alone", "linear probe"),
            Claim("SimSiam with DimCL over without", "simsiam+dimcl", "simsiam", "linear probe"),
            Claim("SimCLR with DimCL over without", "simclr+dimcl", "simclr", "linear probe"),
            Claim("Barlow Twins with DimCL over without", "barlow+dimcl", "barlow", "linear probe"),
            Claim("more diverse features (BYOL)", "byol+dimcl", "byol", "corr. z", lower=True),
            Claim("more diverse features (SimSiam)", "simsiam+dimcl", "simsiam", "corr. z", lower=True),
            Claim(
                "hardness-aware: τ = 0.1 over 1", "byol+dimcl", "byol+dimcl, temperature 1.0", "linear probe"
            ),
        ),
    ),
    "multilevel": Plan(
        "Multi-level",
        Variant("multi-level"),
        (
            Variant("last-level"),
            Variant("multi-level", {"places": 1}),
            Variant("multi-level", UNTRAINED, "untrained"),
        ),
        "1-shot",
        Workload("multilevel", 500, 500, 128),
        Workload("multilevel", 2048, 2048, 512),
        (
            Claim(
                "ensemble of levels over its last", "multi-level", "multi-level", "1-shot", "1-shot level 4"
            ),
            Claim("over a last level trained alone", "multi-level", "last-level", "1-shot", "1-shot level 4"),
            Claim("over the ensemble of that network", "multi-level", "last-level", "1-shot"),
            Claim("over its best inner level", "multi-level", "multi-level", "1-shot", "1-shot level 3"),
        ),
    ),
    "towers": Plan(
        "Two towers",
        Variant("clip"),
        (Variant("supcon"),),
        "en to es at 1",
        Workload("clip", 250, 250, 128),
        Workload("clip", 8192, 8192, 512),
        (),
    ),
}
