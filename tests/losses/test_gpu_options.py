"""Keys of their own, padding and labels of pairs on the kernels for GPUs, with converged positives: labels
that leave out what is padding, a bias beside restricted denominators, rectangles of labels and of masks, and
labels on both axes."""

from __future__ import annotations

from collections.abc import Iterator

import op_checks
import pytest
import torch
from comparisons import Problem, assert_parity, clustered, near, unit

import cl_kernels as clk

N, D, TAU = 18, 24, 0.07

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")


@pytest.fixture(params=["triton", *(f"cuda {architecture}" for architecture in op_checks.ARCHITECTURES)])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    backend, _, architecture = request.param.partition(" ")
    if backend == "cuda":
        op_checks.prepare_cuda(architecture, monkeypatch)
    with clk.use_backend(backend):
        yield backend


def keys() -> list[Problem]:
    labels, key_labels = torch.arange(N) % 6, torch.arange(2 * N + 1) % 8
    against = {"keys": near(unit(8, D)[key_labels]), "key_labels": key_labels}
    given = {"features": clustered(labels, 2, D), "labels": labels, **against}
    mask = torch.rand(N, len(key_labels)) * (torch.rand(N, len(key_labels)) > 0.6)
    masked = {"features": given["features"], "keys": against["keys"], "mask": mask}
    return [
        Problem("supcon_loss", given),
        Problem("supcon_loss", given, {"denominator": "only_negatives"}, ("keys",)),
        Problem("supcon_loss", given, {"summation": "in"}),
        Problem("supcon_loss", masked),
    ]


def padded() -> list[Problem]:
    labels, first = torch.arange(N) % 6, unit(N, D)
    valid = {"valid": torch.arange(N) % 4 != 1}
    given = {"features": clustered(labels, 2, D), "labels": labels, **valid}
    mask = torch.rand(N, N) * (torch.rand(N, N) > 0.6)
    return [
        Problem("supcon_loss", given),
        Problem("supcon_loss", given, {"summation": "in"}),
        Problem("supcon_loss", given, {"denominator": "only_negatives", "contrast_mode": "one"}),
        Problem("supcon_loss", {"features": given["features"], "mask": mask, **valid}),
        Problem("supcon_loss", {"features": torch.stack([first, near(first)], 1), **valid}),
        Problem("selfcon_loss", given, {"anchors": "exits"}),
        Problem("nt_xent_loss", {"z0": first, "z1": near(first), **valid}),
    ]


def towers() -> list[Problem]:
    first, valid = unit(N, D), {"valid": torch.arange(N) % 4 != 1}
    pair, queue = {"q": first, "k": near(first)}, {"queue": unit(N + 3, D)}
    gathered = {"k_global": torch.cat([unit(N, D), pair["k"]])}
    labels, scale = torch.arange(N) % 6, {"logit_scale": torch.tensor(1 / TAU)}
    images, texts = clustered(labels, 2, D).unbind(1)
    given = {"image_features": images, "text_features": texts, **scale, "labels": labels}
    return [
        Problem("info_nce_loss", {**pair, **queue}, {"in_batch": True}),
        Problem("info_nce_loss", {**pair, **gathered, **queue}, {"rank": 1}, ("k", "k_global", "queue")),
        Problem("info_nce_loss", {**pair, **valid}),
        Problem("info_nce_loss", {**pair, **queue, **valid}, {"in_batch": True}, ("k", "queue")),
        Problem("dcl_loss", {"z0": first, "z1": pair["k"], **valid}, {"sigma": 0.5}),
        Problem("clip_loss", given),
        Problem("clip_loss", given, {"reduction": "none"}),
        Problem("clip_loss", {**given, **valid}),
        Problem("clip_loss", {"image_features": first, "text_features": pair["k"], **scale, **valid}),
    ]


@pytest.mark.parametrize("what", [keys, padded, towers], ids=lambda x: x.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_exact_as_plain_torch(dtype: torch.dtype, what: type, kernels: str) -> None:
    if kernels == "triton" and dtype == torch.bfloat16 and op_checks.DEVICE == "cpu":
        pytest.skip("Triton's interpreter does not round to bfloat16 as GPUs do")
    for problem in what():
        if problem.function != "clip_loss":
            problem = problem.with_options(temperature=TAU)
        assert_parity(problem.to(dtype))
