"""CLIP's loss where several pairs of a batch have one label."""

from __future__ import annotations

import pytest
import torch
from comparisons import Problem, assert_close, assert_parity, clustered, near, unit
from torch import Tensor

import cl_kernels as clk

pytestmark = pytest.mark.usefixtures("backend", "poisoned", "one_thread")

N, D = 12, 7
CLASSES = torch.arange(N) % 5
LABELS = {
    "classes": CLASSES,
    "column": CLASSES[:, None],
    "one class": torch.zeros(N, dtype=torch.int64),
    "singletons": torch.arange(N),
    "long tail": (torch.arange(N) ** 2 // 60),
    "negative": -CLASSES - 2,
    "bool": CLASSES > 2,
    "floats": CLASSES / 2 - 1,
    "half": (CLASSES / 2).half(),
    "NaN": torch.where(CLASSES == 1, torch.nan, CLASSES.double()),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def towers(kind: str, scale: float) -> dict[str, Tensor]:
    first = unit(N, D)
    second = near(first) if kind == "converged" else unit(N, D)
    if kind == "clustered":
        first, second = clustered(CLASSES, 2, D).unbind(1)
    return {"image_features": first, "text_features": second, "logit_scale": torch.tensor(scale)}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", LABELS)
def test_values_and_gradients(kind: str, reduction: str) -> None:
    for scale in (10.0, -3.0, 0.0):
        problem = Problem("clip_loss", {**towers("random", scale), "labels": LABELS[kind]})
        assert_close(problem.with_options(reduction=reduction))
        if scale != 0:  # P is then W, or known to the last digit
            assert_parity(problem.with_options(reduction=reduction))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [14.0, 100.0])
@pytest.mark.parametrize("kind", ["converged", "clustered"])
def test_converged_inputs(kind: str, scale: float, dtype: torch.dtype) -> None:
    """The positives are taken off in the pass that sums the exponentials."""
    for labels in (CLASSES, torch.arange(N)):
        for reduction in ("mean", "none"):
            problem = Problem("clip_loss", {**towers(kind, scale), "labels": labels})
            assert_parity(problem.with_options(reduction=reduction).to(dtype))


@pytest.mark.parametrize("kind", LABELS)
def test_by_hand(kind: str) -> None:
    """The mean over both axes of the mean log-probability of the positives."""
    given, labels = towers("random", 5.0), LABELS[kind].flatten()
    logits = 5.0 * given["image_features"].double() @ given["text_features"].double().T
    positives = (labels[:, None] == labels) | torch.eye(N, dtype=torch.bool)
    expected = torch.zeros(N, dtype=torch.float64)
    for i in range(N):
        own = positives[i].nonzero().flatten()
        expected[i] -= logits.log_softmax(1)[i, own].mean() / 2 + logits.log_softmax(0)[own, i].mean() / 2
    for module in (clk, clk.reference):
        found = module.clip_loss(**given, labels=LABELS[kind], reduction="none")
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        for reduction in ("mean", "sum"):
            found = module.clip_loss(**given, labels=LABELS[kind], reduction=reduction)
            wanted = getattr(expected, reduction)()
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_pairs_of_their_own_labels() -> None:
    """Are pairs without labels, and a label that is NaN is one of its own."""
    given = towers("random", 10.0)
    for reduction in ("mean", "none"):
        expected = clk.clip_loss(**given, reduction=reduction)
        for labels in (torch.arange(N), torch.full((N,), torch.nan)):
            found = clk.clip_loss(**given, labels=labels, reduction=reduction)
            torch.testing.assert_close(found, expected)


def test_one_pair_has_loss_zero() -> None:
    for reduction in ("mean", "none"):
        x, y = (unit(1, D).requires_grad_() for _ in range(2))
        loss = clk.clip_loss(x, y, 20.0, labels=torch.tensor([3]), reduction=reduction)
        loss.sum().backward()
        assert loss == 0
        assert (x.grad == 0).all() and (y.grad == 0).all()


def test_an_image_beside_each_of_its_captions() -> None:
    """An image that stands in the batch once for each of its captions counts in the denominators as often:
    the loss is larger by log(captions) / 2 a direction, and the gradient that of images given once."""
    images, captions, scale = unit(4, D).double().requires_grad_(), unit(12, D).double(), 6.0
    owner = torch.arange(4).repeat_interleave(3)
    loss = clk.clip_loss(images[owner], captions, scale, labels=owner)
    logits = scale * images @ captions.T
    mine = owner == torch.arange(4)[:, None]
    of_images = -(logits.log_softmax(1)[mine]).mean()
    of_captions = -(logits.log_softmax(0)[mine]).mean()
    expected = (of_images + of_captions) / 2 + torch.tensor(3.0).double().log() / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, images)[0] for x in (loss, expected)))


@pytest.mark.parametrize("row", [0, 7])
def test_nan_is_in_every_row(row: int) -> None:
    for name in ("image_features", "text_features"):
        given = towers("random", 4.0)
        given[name][row, 2] = torch.nan
        for module in (clk, clk.reference):
            assert module.clip_loss(**given, labels=CLASSES, reduction="none").isnan().all()
            assert module.clip_loss(**given, labels=CLASSES).isnan()


@pytest.mark.parametrize("seed", range(4))
def test_only_equality_of_labels_matters(seed: int) -> None:
    torch.manual_seed(seed)
    names = torch.randint(-(2**62), 2**62, (5,))
    given = towers("random", 10.0)
    for options in ({}, {"valid": torch.rand(N) > 0.3}):
        expected = clk.clip_loss(**given, labels=CLASSES, **options)
        assert torch.equal(clk.clip_loss(**given, labels=names[CLASSES], **options), expected)
