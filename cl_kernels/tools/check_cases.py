"""The cases of `python -m cl_kernels check`: every loss and primitive with each of its options."""

from __future__ import annotations

import functools
import inspect
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .parity import PACKAGE, Problem, clustered, near, unit

INPUTS = ("random", "converged")


class _drawn(functools.cached_property[Any]):
    """A cached property of `Data` whose random numbers depend on the seed and on its own name alone."""

    def __init__(self, make: Callable[[Data], Any]) -> None:
        @functools.wraps(make)
        def seeded(data: Data) -> Any:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(data.seed + zlib.crc32(make.__name__.encode()))
                return make(data)

        super().__init__(seeded)


@dataclass(frozen=True)
class Data:
    """Tensors by name, made when they are asked for. The inputs are "random", or those of a "converged"
    model: positives at a cosine of 0.99."""

    rows: int
    width: int
    inputs: str
    tau: float
    seed: int = 0

    @_drawn
    def first(self) -> Tensor:
        return unit(self.rows, self.width)

    @_drawn
    def second(self) -> Tensor:
        return near(self.first) if self.inputs == "converged" else unit(self.rows, self.width)

    @_drawn
    def queue(self) -> Tensor:
        """More keys than rows, some of them near the rows'."""
        return torch.cat([unit(self.rows + 3, self.width), near(self.second, 0.8)])

    @_drawn
    def transposed_queue(self) -> Tensor:
        """A view of a buffer [D, K]."""
        return self.queue.T.contiguous().T

    @_drawn
    def gathered(self) -> Tensor:
        """The keys of three processes, `second` those of rank 1."""
        return torch.cat([unit(self.rows, self.width), self.second, unit(self.rows, self.width)])

    @_drawn
    def labels(self) -> Tensor:
        return torch.arange(self.rows) % max(1, self.rows // 3)

    @_drawn
    def some_alone(self) -> Tensor:
        """Labels of which every fourth occurs once."""
        own = torch.arange(self.rows)
        return torch.where(own % 4 == 0, self.rows + own, self.labels)

    @_drawn
    def two_views(self) -> Tensor:
        return torch.stack([self.first, self.second], dim=1)

    @_drawn
    def features(self) -> Tensor:
        """Two views for `labels`."""
        return self._views(self.labels, 2)

    @_drawn
    def one_view(self) -> Tensor:
        return self._views(self.some_alone, 1)

    @_drawn
    def three_views(self) -> Tensor:
        return self._views(self.labels, 3)

    @_drawn
    def augmented(self) -> Tensor:
        """Two augmentations of half of the samples, in three views."""
        half = self.labels[: (self.rows + 1) // 2]
        return torch.cat([self._views(half, 3), self._views(half, 3)])

    @_drawn
    def half_labels(self) -> Tensor:
        return self.labels[: (self.rows + 1) // 2]

    def _views(self, labels: Tensor, views: int) -> Tensor:
        if self.inputs == "converged":
            return clustered(labels, views, self.width)
        return unit(self.rows if len(labels) == self.rows else len(labels), views, self.width)

    @_drawn
    def levels(self) -> list[Tensor]:
        return [self.features, torch.cat([self.features, self.features.flip(1)], dim=2)]

    @_drawn
    def level_weights(self) -> Tensor:
        return torch.tensor([1.0, 0.5])

    @_drawn
    def bool_mask(self) -> Tensor:
        return torch.rand(self.rows, self.rows) > 0.8

    @_drawn
    def weights(self) -> Tensor:
        return torch.rand(self.rows, self.rows) * self.bool_mask

    @_drawn
    def column_mask(self) -> Tensor:
        return torch.rand(2 * self.width, 2 * self.width) > 0.9

    @_drawn
    def segments(self) -> list[Tensor]:
        """Keys of a batch and of a queue."""
        return [self.second, self.transposed_queue]

    @_drawn
    def keys(self) -> Tensor:
        return torch.cat(self.segments)

    @_drawn
    def teacher(self) -> Tensor:
        """The target's queries, wider than the queries."""
        return unit(self.rows, self.width + 1)

    @_drawn
    def teacher_keys(self) -> Tensor:
        return unit(len(self.keys), self.width + 1)

    @_drawn
    def teacher_segments(self) -> list[Tensor]:
        return list(self.teacher_keys.split([len(part) for part in self.segments]))

    @_drawn
    def positive(self) -> Tensor:
        """The column of each row's positive; every fifth row has none."""
        own = torch.arange(self.rows)
        return torch.where(own % 5 == 4, -1, own)

    @_drawn
    def valid(self) -> Tensor:
        """Rows of which some are padding."""
        return torch.rand(self.rows) > 0.2

    @_drawn
    def key_weights(self) -> Tensor:
        """A mask of positives among the keys."""
        return torch.rand(self.rows, len(self.keys)) * (torch.rand(self.rows, len(self.keys)) > 0.8)

    @_drawn
    def logits(self) -> Tensor:
        return (self.first.double() @ self.keys.double().T / self.tau).float()

    @_drawn
    def included(self) -> Tensor:
        """A mask of the logits that leaves a row with nothing."""
        mask = torch.rand(self.rows, len(self.keys)) > 0.3
        mask[0] = False
        return mask

    @_drawn
    def key_labels(self) -> Tensor:
        return torch.arange(len(self.keys)) % max(1, self.rows // 3)

    @_drawn
    def memory(self) -> list[Tensor]:
        """Keys of the classes of `labels` and of others, with their labels."""
        stored = near(self.features[:, 0]) if self.inputs == "converged" else unit(self.rows, self.width)
        others = torch.arange(self.rows // 2 + 1) + self.rows
        return [torch.cat([stored, unit(len(others), self.width)]), torch.cat([self.labels, others])]

    @_drawn
    def key_bias(self) -> Tensor:
        """Log-weights, and one key dropped."""
        bias = torch.randn(len(self.keys))
        bias[-1] = -torch.inf
        return bias

    @property
    def scalars(self) -> dict[str, float]:
        """The values of scalar arguments, learnt or not, where a case does not say."""
        return {
            "temperature": self.tau,
            "target_temperature": 0.7 * self.tau,
            "logit_scale": 1 / self.tau,
            "scale": 1 / self.tau,
            "target_scale": 1 / (0.7 * self.tau),
        }

    def named(self, name: str) -> Any:
        """A tensor by its name; a number stands for a learnable scalar."""
        if name in self.scalars:
            return torch.tensor(self.scalars[name])
        try:
            return torch.tensor(float(name))
        except ValueError:
            return getattr(self, name)


@dataclass(frozen=True)
class Case:
    """A function, its tensors and its options.

    `inputs` names the tensors: `argument=name in Data`, or one word where the two are the same. A number is a
    learnable scalar, as is a temperature or a scale that is named.
    """

    function: str
    inputs: str
    options: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    shared_targets: bool = False  # the targets of SCE made first, by `sce_targets`

    @property
    def loss(self) -> str:
        return short(self.function)

    @property
    def named_inputs(self) -> dict[str, str]:
        pairs = (word.partition("=") for word in self.inputs.split())
        return {argument: name or argument for argument, _, name in pairs}

    @property
    def arguments(self) -> set[str]:
        """The arguments that the case gives."""
        targets = {"targets"} if self.shared_targets else set()
        return {*self.named_inputs, *self.options, *targets}

    def __str__(self) -> str:
        """The options and inputs that distinguish the case among those of its function."""
        required = _required(self.function)
        words = []
        for argument, name in self.named_inputs.items():
            if argument in LEARNT:
                words.append(f"learnt {argument}")
            elif argument not in required:
                words.append(argument if name == argument else f"{argument}={name}")
            elif name not in (argument, *PLAIN):
                words.append(name)
        words += [f"{name}={value}" for name, value in self.options.items()]
        frozen = [name for name in self.frozen if name in self.named_inputs]
        words += ["frozen " + "+".join(frozen)] if frozen else []
        words += ["shared targets"] if self.shared_targets else []
        return ", ".join(words) or "defaults"

    def problem(self, data: Data) -> Problem:
        inputs = {argument: data.named(name) for argument, name in self.named_inputs.items()}
        parameters = inspect.signature(getattr(PACKAGE, self.function)).parameters
        scalars = {name: value for name, value in data.scalars.items() if name in parameters}
        options = {**scalars, **self.options}
        return Problem(
            self.function, inputs, {k: v for k, v in options.items() if k not in inputs}, self.frozen
        )

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Our function."""
        if self.shared_targets:
            kwargs["targets"] = _shared_targets(kwargs)
        return getattr(PACKAGE, self.function)(*args, **kwargs)


LEARNT = ("temperature", "base_temperature", "target_temperature", "logit_scale", "scale", "target_scale",
          "coeff", "sigma")  # fmt: skip
PLAIN = ("first", "second", "keys", "teacher", "teacher_keys", "teacher_segments")


def short(function: str) -> str:
    return function.removesuffix("_loss")


def _required(function: str) -> set[str]:
    parameters = inspect.signature(getattr(PACKAGE, function)).parameters.values()
    return {p.name for p in parameters if p.default is p.empty}


def _shared_targets(arguments: dict[str, Any]) -> Any:
    parameters = inspect.signature(PACKAGE.sce_targets).parameters
    return PACKAGE.sce_targets(**{name: x for name, x in arguments.items() if name in parameters})


LABELLED = "features labels"
EXITS = "features=three_views labels"
ALONE = "features=one_view labels=some_alone"
LEVELS = "levels labels"
VIEWS = "z0=first z1=second"
PAIR = "q=first k=second"
QUEUE = PAIR + " queue"
TOWERS = "image_features=first text_features=second"
GATHERED = PAIR + " k_global=gathered"
TARGET = "q=first k=segments target_q=teacher target_k=teacher_segments"
WHOLE_TARGET = "q=first k=keys target_q=teacher target_k=teacher_keys"
SELF = "q=first"
KEYS = "q=first k=keys"
BOTH_TEMPERATURES = " temperature base_temperature=0.2"
MOMENTUM = ("k", "k_global", "queue")
FROZEN_TARGET = ("k", "target_q", "target_k")

CASES = [
    Case("supcon_loss", "features=two_views"),
    Case("supcon_loss", "features=three_views"),
    Case("supcon_loss", LABELLED),
    Case("supcon_loss", "features mask=bool_mask"),
    Case("supcon_loss", "features mask=weights"),
    Case("supcon_loss", LABELLED, {"contrast_mode": "one"}),
    Case("supcon_loss", "features mask=weights", {"contrast_mode": "one"}),
    Case("supcon_loss", LABELLED, {"summation": "in"}),
    Case("supcon_loss", "features mask=weights", {"summation": "in"}),
    Case("supcon_loss", LABELLED, {"denominator": "only_negatives"}),
    Case("supcon_loss", LABELLED, {"denominator": "only_negatives", "summation": "in"}),
    Case("supcon_loss", LABELLED, {"denominator": "one_positive"}),
    Case("supcon_loss", LABELLED, {"denominator": "one_positive", "summation": "in"}),
    Case("supcon_loss", LABELLED, {"positives_cap": 4}),
    Case("supcon_loss", LABELLED, {"base_temperature": 0.2}),
    Case("supcon_loss", ALONE, {"no_positive": "zero"}),
    Case("supcon_loss", ALONE, {"no_positive": "drop"}),
    Case("supcon_loss", LABELLED + " memory"),
    Case("supcon_loss", LABELLED + " memory", {"contrast_mode": "one"}, ("memory",)),
    Case("supcon_loss", LABELLED + " memory", {"summation": "in"}, ("memory",)),
    Case("supcon_loss", LABELLED + " memory", {"denominator": "only_negatives"}),
    Case("supcon_loss", ALONE + " memory temperature"),
    Case("supcon_loss", LABELLED + " keys key_labels"),
    Case("supcon_loss", LABELLED + " keys key_labels", {"denominator": "only_negatives"}, ("keys",)),
    Case("supcon_loss", "features keys mask=key_weights temperature"),
    Case("supcon_loss", "features valid"),
    Case("supcon_loss", LABELLED + " valid"),
    Case("supcon_loss", LABELLED + " valid", {"summation": "in"}),
    Case("supcon_loss", "features mask=weights valid"),
    Case("supcon_loss", ALONE + " memory valid temperature", {"no_positive": "drop"}),
    Case("supcon_loss", LABELLED, {"reduction": "sum"}),
    Case("supcon_loss", LABELLED, {"reduction": "none"}),
    Case("supcon_loss", LABELLED + BOTH_TEMPERATURES),
    Case("selfcon_loss", "features=three_views"),
    Case("selfcon_loss", EXITS),
    Case("selfcon_loss", "features=three_views mask=weights"),
    Case("selfcon_loss", EXITS, {"anchors": "exits"}),
    Case("selfcon_loss", EXITS, {"anchors": "first"}),
    Case("selfcon_loss", "features=augmented", {"augmentations": 2}),
    Case("selfcon_loss", "features=augmented labels=half_labels", {"augmentations": 2, "anchors": "exits"}),
    Case("selfcon_loss", EXITS, {"base_temperature": 0.2}),
    Case("selfcon_loss", ALONE, {"no_positive": "drop"}),
    Case("selfcon_loss", EXITS + " valid", {"anchors": "exits"}),
    Case("selfcon_loss", EXITS, {"reduction": "sum"}),
    Case("selfcon_loss", EXITS, {"reduction": "none"}),
    Case("selfcon_loss", EXITS + BOTH_TEMPERATURES),
    Case("stablerep_loss", "features=first labels"),
    Case("stablerep_loss", "features=first labels=some_alone temperature"),
    Case("stablerep_loss", "features=first labels", {"reduction": "sum"}),
    Case("stablerep_loss", "features=first labels", {"reduction": "none"}),
    Case("sce_loss", PAIR),
    Case("sce_loss", PAIR, {"coeff": 0.3}, ("k",)),
    Case("sce_loss", PAIR, {"coeff": 0.0}),
    Case("sce_loss", PAIR, {"positive_in_target": "zero"}),
    Case("sce_loss", QUEUE),
    Case("sce_loss", QUEUE, {"positive_in_target": "zero"}, MOMENTUM),
    Case("sce_loss", PAIR + " queue=transposed_queue"),
    Case("sce_loss", PAIR + " queue=transposed_queue", frozen=MOMENTUM),
    Case("sce_loss", GATHERED, {"rank": 1}),
    Case("sce_loss", GATHERED, {"rank": 1, "positive_in_target": "zero"}, MOMENTUM),
    Case("sce_loss", GATHERED + " queue", {"rank": 1}),
    Case("sce_loss", GATHERED + " queue=transposed_queue", {"rank": 1}, MOMENTUM),
    Case("sce_loss", PAIR, {"reduction": "sum"}),
    Case("sce_loss", PAIR, {"reduction": "none"}),
    Case("sce_loss", PAIR + " temperature target_temperature coeff=0.4"),
    Case("sce_loss", PAIR, frozen=MOMENTUM, shared_targets=True),
    Case("sce_loss", QUEUE, frozen=MOMENTUM, shared_targets=True),
    Case("sce_loss", GATHERED + " queue", {"rank": 1, "positive_in_target": "zero"}, MOMENTUM, True),
    Case("dimcl_loss", VIEWS),
    Case("dimcl_loss", VIEWS + " positive_mask=column_mask"),
    Case("dimcl_loss", VIEWS, {"reduction": "sum"}),
    Case("dimcl_loss", VIEWS, {"reduction": "none"}),
    Case("dimcl_loss", VIEWS + " temperature"),
    Case("multilevel_loss", "levels"),
    Case("multilevel_loss", LEVELS),
    Case("multilevel_loss", LEVELS, {"weights": [1.0, 0.5]}),
    Case("multilevel_loss", LEVELS + " weights=level_weights"),
    Case("multilevel_loss", LEVELS, {"base_temperature": 0.2}),
    Case("multilevel_loss", LEVELS, {"reduction": "sum"}),
    Case("multilevel_loss", LEVELS, {"reduction": "none"}),
    Case("multilevel_loss", LEVELS + BOTH_TEMPERATURES),
    Case("nt_xent_loss", VIEWS),
    Case("nt_xent_loss", VIEWS + " valid temperature"),
    Case("nt_xent_loss", VIEWS, {"reduction": "sum"}),
    Case("nt_xent_loss", VIEWS, {"reduction": "none"}),
    Case("nt_xent_loss", VIEWS + " temperature"),
    Case("info_nce_loss", PAIR),
    Case("info_nce_loss", PAIR, frozen=("k",)),
    Case("info_nce_loss", QUEUE),
    Case("info_nce_loss", QUEUE, frozen=MOMENTUM),
    Case("info_nce_loss", PAIR + " queue=transposed_queue", frozen=MOMENTUM),
    Case("info_nce_loss", QUEUE, {"in_batch": True}),
    Case("info_nce_loss", PAIR + " queue=transposed_queue", {"in_batch": True}, MOMENTUM),
    Case("info_nce_loss", GATHERED, {"rank": 1}, ("k",)),
    Case("info_nce_loss", GATHERED + " queue", {"rank": 1}, MOMENTUM),
    Case("info_nce_loss", PAIR + " valid"),
    Case("info_nce_loss", QUEUE + " valid"),
    Case("info_nce_loss", QUEUE + " valid", {"in_batch": True}, MOMENTUM),
    Case("info_nce_loss", PAIR, {"reduction": "sum"}),
    Case("info_nce_loss", QUEUE, {"reduction": "none"}),
    Case("info_nce_loss", QUEUE + " temperature"),
    Case("clip_loss", TOWERS),
    Case("clip_loss", TOWERS + " labels"),
    Case("clip_loss", TOWERS + " labels logit_scale", {"reduction": "none"}),
    Case("clip_loss", TOWERS + " valid"),
    Case("clip_loss", TOWERS + " labels=some_alone valid"),
    Case("clip_loss", TOWERS + " labels valid", {"reduction": "none"}),
    Case("clip_loss", TOWERS, {"reduction": "sum"}),
    Case("clip_loss", TOWERS, {"reduction": "none"}),
    Case("clip_loss", TOWERS + " logit_scale"),
    Case("dcl_loss", VIEWS),
    Case("dcl_loss", VIEWS, {"sigma": 0.5}),
    Case("dcl_loss", VIEWS + " valid"),
    Case("dcl_loss", VIEWS + " valid", {"sigma": 0.5}),
    Case("dcl_loss", VIEWS, {"reduction": "sum"}),
    Case("dcl_loss", VIEWS, {"sigma": 0.5, "reduction": "none"}),
    Case("dcl_loss", VIEWS + " temperature"),
    Case("dcl_loss", VIEWS + " temperature sigma=0.5"),
    Case("similarity", SELF),
    Case("similarity", KEYS),
    Case("similarity", SELF, {"normalize": True}),
    Case("similarity", KEYS, {"normalize": True}),
    Case("similarity", KEYS + " scale"),
    Case("masked_log_softmax", "logits"),
    Case("masked_log_softmax", "logits mask=included"),
    Case("soft_target_cross_entropy", WHOLE_TARGET),
    Case("soft_target_cross_entropy", TARGET),
    Case("soft_target_cross_entropy", TARGET, frozen=FROZEN_TARGET),
    Case("soft_target_cross_entropy", TARGET + " positive", {"coeff": 0.3}),
    Case("soft_target_cross_entropy", TARGET + " positive", {"coeff": 0.3}, FROZEN_TARGET),
    Case("soft_target_cross_entropy", TARGET + " positive", {"coeff": 0.3, "positive_in_target": "zero"}),
    Case("soft_target_cross_entropy", TARGET, {"reduction": "sum"}),
    Case("soft_target_cross_entropy", TARGET, {"reduction": "none"}),
    Case("soft_target_cross_entropy", TARGET + " positive scale target_scale coeff=0.4"),
    Case("contrastive_lse", SELF),
    Case("contrastive_lse", SELF, {"exclude": None}),
    Case("contrastive_lse", SELF, {"exclude": 1}),
    Case("contrastive_lse", KEYS, {"exclude": None}),
    Case("contrastive_lse", KEYS, {"exclude": None}, ("k",)),
    Case("contrastive_lse", SELF + " row_labels=labels", {"among": "same"}),
    Case("contrastive_lse", SELF + " row_labels=some_alone", {"among": "same"}),
    Case("contrastive_lse", SELF + " row_labels=labels", {"among": "different"}),
    Case("contrastive_lse", KEYS + " row_labels=labels col_labels=key_labels", {"among": "same"}),
    Case("contrastive_lse", KEYS + " row_labels=labels col_labels=key_labels", {"among": "different"}),
    Case("contrastive_lse", KEYS + " key_bias", {"exclude": None}),
    Case("contrastive_lse", KEYS, {"exclude": None, "both_axes": True}),
    Case("contrastive_lse", SELF, {"both_axes": True}),
    Case("contrastive_lse", KEYS + " scale", {"exclude": None}),
]  # fmt: skip

LOSSES = tuple(dict.fromkeys(case.loss for case in CASES))
