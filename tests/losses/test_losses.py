"""Every loss against the float64 reference and against plain torch in the same dtype."""

from __future__ import annotations

import itertools
from typing import Any

import comparisons
import pytest
import torch
from comparisons import Problem, assert_close, assert_parity, two_views, unit

import cl_kernels as clk
from cl_kernels import autograd
from cl_kernels.losses._common import at_least_zero
from cl_kernels.problem import Contrast

TEMPERATURES = (0.5, 0.1, 0.07, 0.01, 0.005)
SHAPES = [(1, 1), (1, 3), (2, 1), (2, 127), (3, 3), (17, 127), (67, 1), (131, 33)]
HALF = {torch.bfloat16: 0.015, torch.float16: 0.004}  # how far gradients may be off

pytestmark = pytest.mark.usefixtures("backend", "poisoned", "one_thread")


@pytest.mark.parametrize("kind", ["random", "converged"])
@pytest.mark.parametrize("tau", TEMPERATURES)
def test_temperatures(tau: float, kind: str) -> None:
    for problem in comparisons.problems(kind, 37, 24):
        assert_parity(comparisons.tempered(problem, tau))
    assert_parity(comparisons.clip_problem(kind, 37, 24, 1 / tau))


@pytest.mark.parametrize("kind", ["duplicates", "zero rows", "norm 30", "identical"])
def test_awkward_features(kind: str) -> None:
    for problem in comparisons.problems(kind, 22, 16):
        assert_parity(problem)
        if kind != "identical":  # P is 1 / N, known to the rounding of a logarithm as large as the logits
            assert_parity(comparisons.tempered(problem, 0.005))
    assert_parity(comparisons.clip_problem(kind, 22, 16, 20.0))


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_shapes(n: int, d: int) -> None:
    for problem in comparisons.problems("random", n, d):
        assert_parity(problem)
        assert_close(problem)
    assert_parity(comparisons.clip_problem("random", n, d, 10.0))


def test_plain_torch_stays_in_its_dtype() -> None:
    for problem in comparisons.problems("random", 6, 4):
        results = comparisons.plain(problem.to(torch.bfloat16))
        assert all(x.dtype == torch.bfloat16 for x in results.values())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", ["random", "converged"])
def test_half_parity(kind: str, dtype: torch.dtype) -> None:
    for problem in comparisons.problems(kind, 45, 40):
        assert_parity(problem.to(dtype))
    assert_parity(comparisons.clip_problem(kind, 45, 40, 14.0).to(dtype))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", ["random", "converged"])
def test_half_is_as_good_as_its_inputs(kind: str, dtype: torch.dtype) -> None:
    """Sums are float32; a gradient is rounded in its tile and at the end, and not lost in a converged
    model."""
    every = [*comparisons.problems(kind, 45, 40), comparisons.clip_problem(kind, 45, 40, 14.0)]
    for problem in [p.to(dtype) for p in every if p.function not in comparisons.NORMALISING]:
        truth, mine = comparisons.exact(problem), comparisons.ours(problem)
        assert mine["loss"].dtype == torch.float32
        for name, expected in truth.items():
            bound = 1e-6 * (1 + problem.logits) if name == "loss" else HALF[dtype]
            bound *= max(float(expected.abs().max()), 1.0 if name == "loss" else torch.finfo(dtype).tiny)
            assert comparisons.error(mine[name], expected) <= bound, f"{problem}: {name}"


# Options


def labels_of(kind: str, n: int) -> torch.Tensor:
    if kind == "singletons":
        return torch.arange(n)
    if kind == "one class":
        return torch.zeros(n, dtype=torch.int64)
    if kind == "long tail":
        return (torch.rand(n) ** 4 * n).long()
    return torch.randint(0, 4, (n,))


@pytest.mark.parametrize("labelling", ["singletons", "one class", "long tail", "some"])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_labels(labelling: str, views: int) -> None:
    features = unit(29, views, 11)
    for options in (
        {},
        {"contrast_mode": "one"},
        {"summation": "in"},
        {"denominator": "only_negatives"},
        {"summation": "in", "denominator": "only_negatives"},
        {"no_positive": "drop"},
    ):
        assert_parity(
            Problem("supcon_loss", {"features": features, "labels": labels_of(labelling, 29)}, options)
        )
        assert_close(
            Problem("supcon_loss", {"features": features, "labels": labels_of(labelling, 29)}, options)
        )


def supervision(kind: str, n: int) -> dict[str, Any]:
    upper = torch.triu(torch.ones(n, n)) * (torch.rand(n, n) > 0.5)
    return {
        "none": {},
        "labels": {"labels": torch.randint(0, 3, (n,))},
        "bool mask": {"mask": upper.bool()},
        "weights": {"mask": upper * torch.rand(n, n)},
        "tiny weights": {"mask": upper * 1e-8},
    }[kind]


SUPERVISION = ("none", "labels", "bool mask", "weights", "tiny weights")


@pytest.mark.parametrize("kind", SUPERVISION)
@pytest.mark.parametrize("denominator", ["all", "one_positive", "only_negatives"])
@pytest.mark.parametrize("summation", ["out", "in"])
def test_supcon_options(summation: str, denominator: str, kind: str) -> None:
    for mode, cap, alone, views in itertools.product(
        ("all", "one"), (None, 0, 6), ("zero", "drop"), (1, 2, 3)
    ):
        options = {
            "contrast_mode": mode, "summation": summation, "denominator": denominator, "positives_cap": cap,
            "no_positive": alone, "temperature": 0.2, "base_temperature": 0.1,
        }  # fmt: skip
        assert_close(Problem("supcon_loss", {"features": unit(8, views, 5), **supervision(kind, 8)}, options))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", SUPERVISION)
@pytest.mark.parametrize("anchors", ["all", "exits", "first"])
def test_selfcon_options(anchors: str, kind: str, reduction: str) -> None:
    for augmentations, views, alone in itertools.product((1, 2), (2, 3), ("zero", "drop")):
        options = {
            "anchors": anchors, "augmentations": augmentations, "no_positive": alone, "reduction": reduction,
            "temperature": 0.1,
        }  # fmt: skip
        features = unit(7 * augmentations, views, 5)
        assert_close(Problem("selfcon_loss", {"features": features, **supervision(kind, 7)}, options))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction: str) -> None:
    for problem in [*comparisons.problems("random", 9, 6), comparisons.clip_problem("random", 9, 6, 10.0)]:
        assert_close(problem.with_options(reduction=reduction))
        assert_parity(problem.with_options(reduction=reduction))


@pytest.mark.parametrize("positive_in_target", ["exclude", "zero"])
@pytest.mark.parametrize("coeff", [0.0, 0.4, 1.0])
def test_sce_options(coeff: float, positive_in_target: str) -> None:
    n, d = 6, 5
    q, k = two_views("converged", n, d)
    everything = unit(3 * n, d)
    everything[2 * n :] = k
    for keys in (
        {},
        {"queue": unit(13, d)},
        {"k_global": everything},
        {"k_global": everything, "queue": unit(13, d)},
    ):
        rank = 2 if "k_global" in keys else 0
        options = {"coeff": coeff, "positive_in_target": positive_in_target, "rank": rank}
        for frozen in ((), ("k", "k_global", "queue")):
            assert_close(Problem("sce_loss", {"q": q, "k": k, **keys}, options, frozen))


@pytest.mark.parametrize("positive_in_target", ["exclude", "zero"])
def test_sce_with_one_key_is_zero(positive_in_target: str) -> None:
    q, k = unit(1, 4).requires_grad_(), unit(1, 4)
    loss = clk.sce_loss(q, k, positive_in_target=positive_in_target, coeff=0.2)
    loss.backward()
    assert loss == 0
    assert (q.grad.abs() < 1e-6).all()  # 1 - coeff - (1 - coeff), each rounded


def test_dimcl_positive_mask() -> None:
    z0, z1 = two_views("converged", 12, 7)
    mask = torch.rand(14, 14) > 0.7
    assert_close(Problem("dimcl_loss", {"z0": z0, "z1": z1}, {"positive_mask": mask}))
    z0[:, 3] = 2.5
    assert_close(Problem("dimcl_loss", {"z0": z0, "z1": z1}, {"positive_mask": mask | mask.T}))
    assert_parity(Problem("dimcl_loss", {"z0": 1000 + z0, "z1": z1}))


@pytest.mark.parametrize("weights", [None, [0.5, 2.0], torch.tensor([0.5, 2.0], dtype=torch.float64)])
def test_multilevel_weights(weights: Any) -> None:
    levels = [unit(5, 2, 6), unit(5, 2, 9)]
    learnt = isinstance(weights, torch.Tensor)
    inputs = {
        "levels": levels,
        "labels": torch.tensor([0, 1, 1, 2, 0]),
        **({"weights": weights} if learnt else {}),
    }
    assert_close(Problem("multilevel_loss", inputs, {} if learnt else {"weights": weights}))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_learnt_scalars(shape: tuple[int, ...]) -> None:
    """Temperatures and coefficients as tensors of one element get their gradients, in their own shape."""

    def scalar(x: float) -> torch.Tensor:
        return torch.full(shape, x, dtype=torch.float64)

    clip = comparisons.clip_problem("random", 8, 5, 10.0)
    for problem in [*comparisons.problems("random", 8, 5), clip]:
        if problem is clip:
            assert_close(Problem("clip_loss", {**clip.inputs, "logit_scale": scalar(10.0)}))
            continue
        extra = {"temperature": scalar(0.2)}
        if problem.function in ("supcon_loss", "selfcon_loss", "multilevel_loss"):
            extra["base_temperature"] = scalar(0.3)
        if problem.function == "sce_loss":
            extra |= {"target_temperature": scalar(0.1), "coeff": scalar(0.4)}
        if "sigma" in problem.options:
            extra["sigma"] = scalar(0.5)
        options = {key: x for key, x in problem.options.items() if key not in extra}
        assert_close(Problem(problem.function, {**problem.inputs, **extra}, options, problem.frozen))


# Layouts and dtypes


def test_transposed_queue() -> None:
    q, k = two_views("random", 9, 12)
    stored = unit(12, 40).contiguous()
    queue = stored.T
    assert not queue.is_contiguous()
    for problem in (
        Problem("sce_loss", {"q": q, "k": k, "queue": queue}, {"coeff": 0.3}, frozen=("k", "queue")),
        Problem("sce_loss", {"q": q, "k": k, "k_global": k, "queue": queue}, {"coeff": 0.3}),
        Problem("info_nce_loss", {"q": q, "k": k, "queue": queue}),
    ):
        copied = Problem(
            problem.function, {**problem.inputs, "queue": queue.contiguous()}, problem.options, problem.frozen
        )
        assert_parity(problem)
        for name, result in comparisons.ours(problem).items():
            torch.testing.assert_close(result, comparisons.ours(copied)[name], rtol=1e-5, atol=1e-6, msg=name)


def test_non_contiguous_inputs() -> None:
    wide = unit(14, 3, 20)
    strided = {"features": wide[:, ::2, ::2], "labels": torch.arange(28)[::2] % 5}
    assert not strided["features"].is_contiguous()
    assert_parity(Problem("supcon_loss", strided))
    assert_parity(Problem("selfcon_loss", {"features": wide.transpose(0, 1).contiguous().transpose(0, 1)}))
    q, k = unit(20, 14).T, unit(14, 40)[:, 1::2]
    for function in ("nt_xent_loss", "dcl_loss", "dimcl_loss"):
        assert_parity(Problem(function, {"z0": q, "z1": k}))
    for function in ("info_nce_loss", "sce_loss"):
        assert_parity(Problem(function, {"q": q, "k": k}))
    assert_parity(Problem("clip_loss", {"image_features": q, "text_features": k}, {"logit_scale": 10.0}))
    expanded = unit(1, 20).expand(14, 20)
    assert_parity(Problem("info_nce_loss", {"q": q, "k": expanded}))


@pytest.mark.parametrize("pair", [(torch.bfloat16, torch.float32), (torch.float16, torch.float64)], ids=str)
def test_mixed_dtypes(pair: tuple[torch.dtype, torch.dtype]) -> None:
    """Inputs are promoted, gradients come back in each input's dtype."""
    narrow, wide = pair
    first, second = two_views("random", 12, 10)
    first, second, queue = first.to(narrow), second.to(wide), unit(7, 10).to(narrow)
    for problem in (
        Problem("nt_xent_loss", {"z0": first, "z1": second}),
        Problem("dcl_loss", {"z0": second, "z1": first}),
        Problem("dimcl_loss", {"z0": first, "z1": second}),
        Problem("info_nce_loss", {"q": second, "k": first, "queue": queue}),
        Problem("sce_loss", {"q": first, "k": second, "queue": queue}),
        Problem("clip_loss", {"image_features": first, "text_features": second}, {"logit_scale": 10.0}),
    ):
        results, truth = comparisons.ours(problem), comparisons.exact(problem)
        assert results["loss"].dtype == wide
        for name, expected in truth.items():
            if name != "loss":
                assert results[name].dtype == problem.inputs[name.removeprefix("gradient of ")].dtype
            bound = 4 * torch.finfo(results[name].dtype).eps * (1 + problem.logits)
            assert comparisons.error(results[name], expected) <= bound * max(
                1, float(expected.abs().max())
            ), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    for problem in [
        p.to(dtype)
        for p in [*comparisons.problems("random", 8, 6), comparisons.clip_problem("random", 8, 6, 9.0)]
    ]:
        expected = comparisons.ours(problem)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = comparisons.ours(problem)
        for name, result in results.items():
            assert result.dtype == expected[name].dtype
            assert torch.equal(result, expected[name]), f"{problem}: {name}"


@pytest.mark.parametrize(
    "labels", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.float16], ids=str
)
def test_label_dtypes(labels: torch.dtype) -> None:
    features, classes = unit(6, 2, 4), torch.tensor([0, 1, 0, 1, 1, 0])
    expected = clk.supcon_loss(features, classes)
    assert torch.equal(clk.supcon_loss(features, classes.to(labels)), expected)
    assert torch.equal(clk.supcon_loss(features, classes.to(labels)[:, None]), expected)


def test_negative_zero_and_fractions_are_labels() -> None:
    features = unit(4, 2, 4)
    expected = clk.supcon_loss(features, torch.tensor([0, 0, 1, 2]))
    assert torch.equal(clk.supcon_loss(features, torch.tensor([0.0, -0.0, 0.25, 0.5])), expected)


def test_trailing_dimensions_are_flattened() -> None:
    features = unit(5, 2, 12)
    assert torch.equal(clk.supcon_loss(features.view(5, 2, 3, 4)), clk.supcon_loss(features))
    assert torch.equal(clk.selfcon_loss(features.view(5, 2, 3, 2, 2)), clk.selfcon_loss(features))


# Degenerate rows


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


def test_unnormalised_features_at_low_temperature_stay_finite() -> None:
    """A diagonal that dwarfs the other columns must not underflow them."""
    features = (30 * unit(32, 2, 16)).requires_grad_()
    loss = clk.supcon_loss(features, torch.arange(32) % 5, temperature=0.005)
    loss.backward()
    assert loss.isfinite()
    assert features.grad.isfinite().all()


LABELS = torch.tensor([0, 0, 1, 1, 2, 3])  # the last two alone, in one view
NAN = float("nan")


def with_nan(x: torch.Tensor, row: int) -> torch.Tensor:
    x = x.clone()
    x[row, ..., 1] = NAN
    return x


MODULES = pytest.mark.parametrize("module", [clk, clk.reference], ids=["ours", "reference"])


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


# Values that cannot be negative


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
    below = torch.tensor([-1e-6, 2.0, NAN, -3.0], requires_grad=True)
    rows = at_least_zero(below * 1)
    assert rows[[0, 1, 3]].tolist() == [0.0, 2.0, 0.0]
    assert rows[2].isnan()
    assert torch.equal(torch.autograd.grad(rows.sum(), below)[0], torch.ones(4))
    features, weights = unit(6, 2, 4), -torch.rand(6, 6)
    assert_close(Problem("supcon_loss", {"features": features, "mask": weights}, {"reduction": "none"}))
    assert (clk.supcon_loss(features, mask=weights, reduction="none") < 0).any()
    assert clk.dcl_loss(features[:, 0], features[:, 0]) < 0
    assert clk.supcon_loss(features[:, :1].expand(-1, 2, -1), denominator="only_negatives") < 0


# Labels


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


# Chunks, determinism, memory


def test_rare_options_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks give what one gives, to the second derivative."""
    features, labels = unit(9, 2, 5).double(), torch.randint(0, 3, (9,))
    options = {"summation": "in", "denominator": "one_positive", "positives_cap": 2, "reduction": "none"}

    def derivatives() -> list[torch.Tensor]:
        x, tau = features.clone().requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        loss = clk.supcon_loss(x, labels, temperature=tau, **options)
        first = torch.autograd.grad((loss**2).sum(), [x, tau], create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), [x, tau])
        return [loss, *first, *second]

    whole = derivatives()
    monkeypatch.setattr("cl_kernels.losses.supcon.CHUNK_LOGITS", 5 * 18)
    for expected, result in zip(whole, derivatives(), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("summation", ["out", "in"])
def test_nan_among_positives_without_negatives(summation: str) -> None:
    features, labels = unit(3, 2, 5), torch.ones(3)
    features[0, 1, 2] = torch.nan
    loss = clk.supcon_loss(
        features, labels, summation=summation, denominator="one_positive", reduction="none"
    )  # fmt: skip
    assert loss.isnan().all()


def test_two_runs_are_bitwise_equal(backend: str) -> None:
    if backend == "cpu":
        torch.set_num_threads(2)
    for problem in [
        *comparisons.problems("random", 150, 33),
        comparisons.clip_problem("random", 150, 33, 10.0),
    ]:
        first, second = comparisons.ours(problem), comparisons.ours(problem)
        for name, result in first.items():
            assert torch.equal(result, second[name]), f"{problem}: {name}"


def test_inputs_are_left_alone() -> None:
    for problem in comparisons.problems("random", 7, 5):
        before = [x.clone() for x in problem.tensors.values()]
        comparisons.ours(problem)
        assert all(torch.equal(x, y) for x, y in zip(before, problem.tensors.values(), strict=True))


def test_gradients_only_where_asked() -> None:
    q, k = two_views("random", 6, 4)
    queue = unit(9, 4)
    for call in (
        lambda: clk.info_nce_loss(q, k, queue),
        lambda: clk.sce_loss(q, k, queue=queue),
        lambda: clk.nt_xent_loss(q, k),
        lambda: clk.clip_loss(q, k, 10.0),
    ):
        assert not call().requires_grad
        q.requires_grad_()
        loss = call()
        with torch.no_grad():
            assert not call().requires_grad
        loss.backward()
        assert k.grad is None
        assert queue.grad is None
        assert q.grad is not None
        q.grad = None
        q.requires_grad_(False)


def test_named_backends_refuse_rare_options() -> None:
    if clk.dispatch.extension.cpu.module is None:
        pytest.skip("no CPU kernels")
    with clk.use_backend("cpu"), pytest.raises(clk.BackendError, match="positives_cap"):
        clk.supcon_loss(unit(4, 2, 3), torch.tensor([0, 0, 1, 1]), positives_cap=2)
