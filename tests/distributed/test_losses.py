"""Every loss over a group of processes is the loss of one process on all rows: value and gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from groups import in_group
from torch import Tensor

import cl_kernels as clk
from cl_kernels import reference

UNEVEN = (3, 5, 8, 1)
WIDTH = 6


class Case(NamedTuple):
    """A loss of tensors whose rows are split among the ranks, and of others that all have."""

    loss: str
    split: tuple[str, ...]  # of _tensors; those of floating point get a gradient
    options: dict[str, Any] = {}  # noqa: RUF012
    whole: tuple[str, ...] = ()  # of _tensors, by name: rows are split, but a queue is everywhere
    learned: tuple[str, ...] = ("temperature",)
    positional: int = 9


def _tensors(n: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(x, dim=-1)

    labels = torch.randint(0, max(n // 3, 1), (n,), generator=generator)
    mask = torch.rand(n, n, generator=generator, dtype=torch.float64) * (
        torch.rand(n, n, generator=generator) < 0.4
    )
    return {
        "features": unit(n, 2, WIDTH), "three": unit(n, 3, WIDTH), "deep": unit(n, 2, WIDTH + 3),
        "single": unit(n, 1, WIDTH), "rows": unit(n, WIDTH), "q": unit(n, WIDTH), "k": unit(n, WIDTH),
        "queue": unit(7, WIDTH), "labels": labels,
        "floats": torch.where(labels == 0, torch.nan, labels * 0.5), "mask": mask, "bool_mask": mask != 0,
        "positive_mask": torch.rand(2 * WIDTH, 2 * WIDTH, generator=generator) < 0.2,
        **_keys_and_padding(n, unit, generator),
    }  # fmt: skip


def _keys_and_padding(n: int, unit: Callable[..., Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Two keys to a row, and rows of which some, all of the last rank's if it has one, are padding."""
    valid = torch.rand(n, generator=generator) < 0.7
    valid[-1] = False
    padded, first, second = unit(n, 3, WIDTH), unit(n, WIDTH), unit(n, WIDTH)
    for x in (padded, first, second):
        x[~valid] = torch.nan
    return {
        "keys": unit(2 * n, WIDTH),
        "key_labels": torch.randint(0, max(n // 3, 2), (2 * n,), generator=generator),
        "key_mask": torch.rand(n, 2 * n, generator=generator, dtype=torch.float64),
        "valid": valid, "padded": padded, "padded_q": first, "padded_k": second,
    }  # fmt: skip


CASES = {
    "supcon simclr": Case("supcon_loss", ("features",)),
    "supcon three views": Case("supcon_loss", ("three",)),
    "supcon labels": Case("supcon_loss", ("features", "labels"), learned=("temperature", "base_temperature")),
    "supcon float labels": Case("supcon_loss", ("features", "floats")),
    "supcon mask": Case("supcon_loss", ("three",), whole=("mask",)),
    "supcon bool mask, drop": Case("supcon_loss", ("single",), {"no_positive": "drop"}, ("bool_mask",)),
    "supcon one": Case("supcon_loss", ("three", "labels"), {"contrast_mode": "one"}),
    "supcon in": Case("supcon_loss", ("three", "labels"), {"summation": "in"}),
    "supcon only negatives": Case("supcon_loss", ("three", "labels"), {"denominator": "only_negatives"}),
    "supcon one positive": Case("supcon_loss", ("three", "labels"), {"denominator": "one_positive"}),
    "supcon cap": Case("supcon_loss", ("features", "labels"), {"positives_cap": 2}),
    "supcon in, mask": Case("supcon_loss", ("features",), {"summation": "in"}, ("mask",)),
    "supcon negatives, mask": Case("supcon_loss", ("three",), {"denominator": "only_negatives"}, ("mask",)),
    "supcon cap, mask": Case("supcon_loss", ("features",), {"positives_cap": 4}, ("mask",)),
    "supcon one positive, mask": Case(
        "supcon_loss", ("features",), {"denominator": "one_positive"}, ("mask",)
    ),
    "supcon drop": Case("supcon_loss", ("single", "labels"), {"no_positive": "drop"}),
    "supcon keys": Case("supcon_loss", ("three", "labels", "keys", "key_labels")),
    "supcon keys, one": Case(
        "supcon_loss", ("three", "labels", "keys", "key_labels"),
        {"contrast_mode": "one", "no_positive": "drop", "denominator": "only_negatives"},
    ),
    "supcon keys, in": Case("supcon_loss", ("single", "labels", "keys", "key_labels"), {"summation": "in"}),
    "supcon keys, one positive": Case(
        "supcon_loss", ("three", "labels", "keys", "key_labels"), {"denominator": "one_positive"}
    ),
    "supcon keys, mask": Case("supcon_loss", ("three", "keys"), whole=("key_mask",)),
    "supcon keys, in, mask": Case("supcon_loss", ("three", "keys"), {"summation": "in"}, ("key_mask",)),
    "supcon padded": Case("supcon_loss", ("padded", "valid")),
    "supcon padded labels": Case("supcon_loss", ("padded", "labels", "valid"), {"no_positive": "drop"}),
    "supcon padded floats": Case("supcon_loss", ("padded", "floats", "valid"), {"contrast_mode": "one"}),
    "supcon padded, in": Case("supcon_loss", ("padded", "labels", "valid"), {"summation": "in"}),
    "supcon padded, only negatives": Case(
        "supcon_loss", ("padded", "labels", "valid"), {"denominator": "only_negatives"}
    ),
    "supcon padded mask": Case("supcon_loss", ("padded", "valid"), whole=("mask",)),
    "supcon padded cap, mask": Case(
        "supcon_loss", ("padded", "valid"), {"positives_cap": 3, "summation": "in"}, ("mask",)
    ),
    "supcon padded cap": Case("supcon_loss", ("padded", "labels", "valid"), {"positives_cap": 3}),
    "supcon padded anchors": Case("supcon_loss", ("padded", "labels", "valid", "keys", "key_labels")),
    "selfcon padded": Case("selfcon_loss", ("padded", "labels", "valid"), {"anchors": "exits"}),
    "nt_xent padded": Case("nt_xent_loss", ("padded_q", "padded_k", "valid")),
    "selfcon exits": Case("selfcon_loss", ("three", "labels"), {"anchors": "exits"}),
    "selfcon unsupervised": Case("selfcon_loss", ("three",)),
    "nt_xent": Case("nt_xent_loss", ("q", "k")),
    "info_nce": Case("info_nce_loss", ("q", "k")),
    "info_nce queue": Case("info_nce_loss", ("q", "k"), whole=("queue",)),
    "info_nce in batch": Case("info_nce_loss", ("q", "k"), {"in_batch": True}, ("queue",)),
    "info_nce padded": Case("info_nce_loss", ("padded_q", "padded_k"), whole=("valid",)),
    "info_nce padded queue": Case("info_nce_loss", ("padded_q", "padded_k"), whole=("queue", "valid")),
    "info_nce padded, in batch": Case(
        "info_nce_loss", ("padded_q", "padded_k"), {"in_batch": True}, ("queue", "valid")
    ),
    "dcl": Case("dcl_loss", ("q", "k")),
    "dclw": Case("dcl_loss", ("q", "k"), {"sigma": 0.5}),
    "dclw padded": Case("dcl_loss", ("padded_q", "padded_k"), {"sigma": 0.5}, ("valid",)),
    "clip": Case("clip_loss", ("q", "k"), learned=("logit_scale",)),
    "clip labels": Case("clip_loss", ("q", "k"), whole=("labels",), learned=("logit_scale",)),
    "clip float labels": Case("clip_loss", ("q", "k"), whole=("floats",), learned=("logit_scale",)),
    "clip padded": Case(
        "clip_loss", ("padded_q", "padded_k"), whole=("valid",), learned=("logit_scale",)
    ),
    "clip padded labels": Case(
        "clip_loss", ("padded_q", "padded_k"), whole=("floats", "valid"), learned=("logit_scale",)
    ),
    "sce": Case("sce_loss", ("q", "k"), learned=("temperature", "target_temperature", "coeff")),
    "sce queue": Case("sce_loss", ("q", "k"), {"positive_in_target": "zero"}, ("queue",)),
    "dimcl": Case("dimcl_loss", ("q", "k")),
    "dimcl mask": Case("dimcl_loss", ("q", "k"), whole=("positive_mask",)),
    "stablerep": Case("stablerep_loss", ("rows", "labels")),
    "multilevel": Case("multilevel_loss", ("features", "deep", "labels"), {"weights": [1.0, 0.5]}),
}  # fmt: skip

KEYWORDS = {"queue": "queue", "mask": "mask", "bool_mask": "mask", "positive_mask": "positive_mask",
            "keys": "keys", "key_labels": "key_labels", "key_mask": "mask", "valid": "valid"}  # fmt: skip
BY_NAME = {**KEYWORDS, "labels": "labels", "floats": "labels"}  # where they are given so
NO_FEATURES = ("labels", "floats", "key_labels", "valid")
SCALARS = {"temperature": 0.2, "base_temperature": 0.1, "target_temperature": 0.3, "coeff": 0.4,
           "logit_scale": 3.0}  # fmt: skip


def _call(case: Case, given: dict[str, Tensor], scalars: dict[str, Tensor], **options: Any) -> Tensor:
    """By the public function, or on the union by the reference."""
    module = clk if "group" in options else reference
    function = getattr(module, case.loss)
    split = [given[name] for name in case.split if name not in KEYWORDS]
    by_name = (*(name for name in case.split if name in KEYWORDS), *case.whole)
    keywords = {BY_NAME[name]: given[name] for name in by_name}
    if case.loss == "multilevel_loss":
        split = [split[:2], split[2]]
    if case.loss == "clip_loss":
        split, scalars = [*split, scalars["logit_scale"]], {}
    if case.loss == "sce_loss" and module is reference and "queue" in keywords:
        keywords["k_global"] = split[1]
    return function(*split, **keywords, **scalars, **case.options, **options)


def _leaves(case: Case, given: dict[str, Tensor]) -> list[Tensor]:
    names = [name for name in case.split if name not in NO_FEATURES]
    return [given[name].requires_grad_() for name in names]


def _scalars(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: torch.tensor([SCALARS[name]], dtype=dtype, requires_grad=True) for name in case.learned}


def _own(x: Tensor, name: str, rank: int, sizes: tuple[int, ...]) -> Tensor:
    if name in ("queue", "positive_mask"):
        return x.detach().clone()
    return _split(x.detach(), sizes)[rank].clone()


def _split(x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The rows of each rank, one or more to a sample."""
    return x.split([size * (x.shape[0] // sum(sizes)) for size in sizes])


def _by_rank(case: Case, rows: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """The losses of the rows of one process, view-major, as the ranks have them."""
    if case.loss == "dimcl_loss":
        world, columns = len(sizes), rows.view(2, -1)
        ends = [columns.shape[1] * i // world for i in range(world + 1)]
        return [columns[:, a:b].flatten() for a, b in itertools.pairwise(ends)]
    views = rows.view(-1, sum(sizes))
    return [part.flatten() for part in views.split(sizes, 1)]


def _error(found: Tensor, wanted: Tensor) -> float:
    """Over the largest number wanted, or 0.1: gradients of scalars may cancel; 0 for nothing."""
    if found.numel() == 0 and wanted.numel() == 0:
        return 0.0
    scale = wanted.abs().max().clamp(min=0.1)
    return ((found - wanted).abs().max() / scale).item()


def compare(
    rank: int, name: str, sizes: tuple[int, ...], exchange: str, dtype: torch.dtype, frozen: bool = False
) -> tuple[float, float]:
    """The largest relative error of value and of gradient, on this rank."""
    case, group = CASES[name], dist.group.WORLD
    world = len(sizes)
    everything = _tensors(sum(sizes))
    whole_scalars = _scalars(case, torch.float64)
    whole_leaves = _leaves(case, everything)
    if frozen:
        whole_leaves.pop().requires_grad_(False)
    wanted = _call(case, everything, whole_scalars)
    wanted_grads = torch.autograd.grad(wanted, [*whole_leaves, *whole_scalars.values()])
    wanted_rows = _call(case, everything, whole_scalars, reduction="none").detach()

    def localised(x: Tensor, key: str) -> Tensor:
        x = _own(x, key, rank, sizes)
        return x.to(dtype) if x.is_floating_point() and key not in ("floats",) else x

    given = {key: localised(everything[key], key) for key in (*case.split, *case.whole)}
    scalars = _scalars(case, dtype)
    leaves = _leaves(case, given)
    if frozen:
        leaves.pop().requires_grad_(False)
    with torch.autocast("cpu", enabled=dtype == torch.float32):
        loss = _call(case, given, scalars, group=group, exchange=exchange)
        rows = _call(case, given, scalars, group=group, exchange=exchange, reduction="none")
        total = _call(case, given, scalars, group=group, exchange=exchange, reduction="sum")
    grads = torch.autograd.grad(loss, [*leaves, *scalars.values()])

    average = loss.detach().double() / world
    dist.all_reduce(average)
    value = _error(average, wanted.detach())
    own_rows = _by_rank(case, wanted_rows, sizes)[rank]
    value = max(value, _error(rows.detach().double(), own_rows))
    value = max(value, _error(total.detach().double(), own_rows.sum()))
    gradient = 0.0
    for found, right in zip(grads[: len(leaves)], wanted_grads, strict=False):
        gradient = max(gradient, _error(found.double() / world, _split(right, sizes)[rank]))
    for found, right in zip(grads[len(leaves) :], wanted_grads[len(leaves) :], strict=True):
        found = found.double() / world
        dist.all_reduce(found)
        gradient = max(gradient, _error(found, right))
    return value, gradient


def every_case(rank: int, world: int) -> dict[tuple[Any, ...], float]:
    """The largest error of each case in proportion to what its dtype is allowed."""
    found = {}
    for sizes, exchange, dtype, name in itertools.product(
        ((4,) * world, UNEVEN[:world]), ("gather", "ring"), BOUNDS, CASES
    ):
        for frozen in (False, True) if name in FROZEN else (False,):
            errors = compare(rank, name, sizes, exchange, dtype, frozen)
            found[name, exchange, sizes, dtype, frozen] = max(errors) / BOUNDS[dtype]
    return found


# Whose keys may be a momentum encoder's.
FROZEN = ("sce", "sce queue", "info_nce", "info_nce in batch", "info_nce padded")
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6}


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_loss(world: int, tmp_path: Path) -> None:
    for rank, report in enumerate(in_group(world, every_case, tmp_path, world)):
        assert isinstance(report, dict), f"rank {rank}: {report}"
        assert not {key: error for key, error in report.items() if not error < 1}, f"rank {rank}"
