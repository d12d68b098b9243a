"""Every loss on the kernels for GPUs, Triton's and CUDA C++: at most twice the error of plain torch in the
same dtype."""

from __future__ import annotations

from collections.abc import Iterator

import comparisons
import op_checks
import pytest
import torch
from comparisons import Problem, assert_parity, unit

import cl_kernels as clk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("kernels", "poisoned", "one_thread")


@pytest.fixture(params=["triton", *(f"cuda {architecture}" for architecture in op_checks.ARCHITECTURES)])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    backend, _, architecture = request.param.partition(" ")
    if backend == "cuda":
        op_checks.prepare_cuda(architecture, monkeypatch)
    with clk.use_backend(backend):
        yield


def every(kind: str, n: int, d: int, tau: float) -> list[Problem]:
    tempered = [comparisons.tempered(problem, tau) for problem in comparisons.problems(kind, n, d)]
    return [*tempered, comparisons.clip_problem(kind, n, d, 1 / tau)]


def some(kind: str, n: int, d: int, tau: float) -> list[Problem]:
    """One of each path: positives by index, labels and mask, frozen and other keys, SCE, DimCL, both axes."""
    first, second = comparisons.two_views(kind, n, d)
    views = torch.stack([first, second], dim=1)
    labels = {"labels": torch.arange(n) % max(1, n // 3)}
    if kind == "converged":
        views = comparisons.clustered(labels["labels"], 2, d)
    pair, queue = {"q": first, "k": second}, {"queue": unit(2 * n, d)}
    found = [
        Problem("supcon_loss", {"features": torch.stack([first, second], dim=1)}),
        Problem("supcon_loss", {"features": views, **labels}),
        Problem("supcon_loss", {"features": views, "mask": torch.rand(n, n) * (torch.rand(n, n) > 0.6)}),
        Problem("info_nce_loss", pair),
        Problem("info_nce_loss", {**pair, **queue}, frozen=("k", "queue")),
        Problem("sce_loss", {**pair, **queue}, {"coeff": 0.3}, frozen=("k", "queue")),
        Problem("sce_loss", pair, {"coeff": 0.3}),
        Problem("dimcl_loss", {"z0": first, "z1": second}),
    ]
    images, texts = {"image_features": first}, {"text_features": second}
    clip = Problem("clip_loss", {**images, **texts}, {"logit_scale": 1 / tau})
    return [*(comparisons.tempered(problem, tau) for problem in found), clip]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", [0.5, 0.1, 0.07, 0.01])
@pytest.mark.parametrize("kind", ["random", "converged"])
def test_temperatures(kind: str, tau: float, dtype: torch.dtype) -> None:
    for problem in some(kind, 18, 24, tau):
        assert_parity(problem.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_logit_scale(dtype: torch.dtype) -> None:
    """In half precision it is a sum over G as rounded for the features' gradient."""
    problem = comparisons.clip_problem("random", 30, 24, 10.0).to(dtype)
    truth, found = (
        which(problem)["gradient of logit_scale"] for which in (comparisons.exact, comparisons.ours)
    )
    eps = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert comparisons.error(found, truth) <= eps * max(float(truth.abs()), 0.1)  # 0.1: a logit's derivative


def test_every_loss() -> None:
    for problem in every("random", 14, 20, 0.1):
        assert_parity(problem)


@pytest.mark.parametrize("kind", ["duplicates", "zero rows", "norm 30", "identical"])
def test_awkward_features(kind: str) -> None:
    for problem in some(kind, 14, 16, 0.1):
        assert_parity(problem)


@pytest.mark.parametrize(("n", "d"), [(2, 127), (45, 3), (11, 300)])
def test_shapes(n: int, d: int) -> None:
    for problem in some("random", n, d, 0.1):
        assert_parity(problem)


@pytest.mark.parametrize(
    "options",
    [
        {"contrast_mode": "one", "summation": "in"},
        {"denominator": "only_negatives", "summation": "in"},
        {"no_positive": "drop", "reduction": "sum"},
        {"reduction": "none", "base_temperature": 0.2},
    ],
    ids=str,
)
def test_options_of_supcon(options: dict[str, str]) -> None:
    inputs = {"features": unit(17, 3, 11), "labels": torch.randint(0, 4, (17,))}
    for dtype in (torch.float32, torch.bfloat16):
        assert_parity(Problem("supcon_loss", inputs, options).to(dtype))


def test_learnable_temperature_and_weights() -> None:
    first, second = unit(18, 9), unit(18, 9)
    assert_parity(Problem("nt_xent_loss", {"z0": first, "z1": second, "temperature": torch.tensor(0.2)}))
    levels = [unit(9, 2, 5), unit(9, 2, 21)]
    assert_parity(Problem("multilevel_loss", {"levels": levels, "weights": torch.tensor([0.3, 1.0])}))


def test_transposed_queue_and_dimcl_mask() -> None:
    queue = unit(40, 12).T.contiguous().T
    inputs = {"q": unit(16, 12), "k": unit(16, 12), "queue": queue}
    assert_parity(Problem("sce_loss", inputs, {"coeff": 0.2}, frozen=("k", "queue")))
    assert_parity(Problem("info_nce_loss", inputs, frozen=("k", "queue")))
    mask = torch.rand(22, 22) > 0.7
    assert_parity(Problem("dimcl_loss", {"z0": unit(13, 11), "z1": unit(13, 11), "positive_mask": mask}))
