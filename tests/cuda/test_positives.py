"""Float32 sums over positives by the CUDA C++ kernels: added up where the tiles have the logits, so that they
are rounded as the log-sum-exps are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparisons import Problem, clustered, error, exact, near, ours, plain, tempered, unit
from op_checks import ARCHITECTURES, by_reference, prepare_cuda
from torch import Tensor

import cl_kernels as clk

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread", "kernels")


@pytest.fixture(params=ARCHITECTURES[:1])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 runs on the portable kernels."""
    prepare_cuda(request.param, monkeypatch)


@pytest.fixture(params=["tiles", "one launch"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "one launch":
        monkeypatch.setenv("CL_KERNELS_EMULATED_SMALL", "1")


def positives(kind: str, n: int, m: int, own: bool) -> tuple[Any, ...]:
    """(row_labels, col_labels, by label, index, mask)."""
    if kind == "labels":
        cols = torch.randint(4, (m,))
        return (cols if own else torch.randint(-1, 4, (n,)), cols, True, None, None)
    if kind == "index":
        return (None, None, False, torch.randint(-1, m, (n,)), None)
    rows, columns = (n + 1) // 2, (m + 2) // 3
    mask = torch.rand(rows, columns) > 0.7
    return (None, None, False, None, mask if kind == "bool mask" else torch.randn(rows, columns) * mask)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("kind", ["labels", "index", "bool mask", "mask"])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_sums(kind: str, precision: str) -> None:
    """Sums over several tiles either way, mirrored and not, with any excluded column."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for n, m, exclude, among, both_axes in [
            (300, None, 0, "all", False), (300, None, 0, "different", False), (140, None, 5, "all", False),
            (140, 270, None, "all", True), (70, 333, -3, "all", False), (1, 1, 0, "all", False),
        ]:  # fmt: skip
            if among != "all" and kind != "labels":
                continue
            q = unit(n, 19)
            k = None if m is None else unit(m, 19)
            rows, cols, by_label, index, mask = positives(kind, n, m or n, m is None)
            bias = torch.randn(m) if m is not None and not both_axes else None
            arguments = (
                q, k, torch.tensor(20.0), exclude, rows, cols, among, by_label, index, mask, bias, both_axes,
                False,
            )  # fmt: skip
            found = torch.ops.cl_kernels_cuda.contrastive_forward(*arguments)
            truth = by_reference("contrastive_forward", *arguments)
            size = max(float(truth[3].abs().max()), 1.0) * 20
            assert error(found[3], truth[3]) <= 1e-12 * size
            assert error(found[2], truth[2]) <= (3e-7 if precision == "highest" else 1e-3) * size
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("kind", ["converged", "collapsed", "classes", "one class"])
@pytest.mark.parametrize("weights", ["labels", "mask", "none"])
def test_converged_classes(kind: str, weights: str) -> None:
    """Errors of rows' losses at tau 0.01: at most twice those of plain torch, which is exact where
    nothing but the positive counts."""
    labels = torch.arange(64) // {"classes": 8, "one class": 64}.get(kind, 1)
    if kind == "collapsed":
        features = torch.nn.functional.normalize(torch.ones(64, 2, 768), dim=-1)
    else:
        features = unit(64, 128)[labels][:, None].expand(64, 2, 128).contiguous()
    given: dict[str, Tensor] = {"labels": labels} if weights == "labels" else {}
    if weights == "mask":
        given = {"mask": (labels[:, None] == labels).float() * 0.7}
    if weights == "none" and kind in ("classes", "one class"):
        pytest.skip("without labels classes are not positives")
    options = {"reduction": "none", "base_temperature": 0.01}
    problem = tempered(Problem("supcon_loss", {"features": features, **given}, options), 0.01)
    with clk.use_backend("cuda"):
        found = ours(problem)["loss"]
    truth, eager = exact(problem)["loss"], plain(problem)["loss"]
    assert error(found, truth) <= 2 * error(eager, truth) + 4e-7


@pytest.mark.usefixtures("launches")
def test_rows_of_different_norms() -> None:
    """Rows whose logits are far below the largest are summed as exactly, and so where their log-sum-exps are
    computed again."""
    labels = torch.arange(60) // 4
    features = unit(15, 24)[labels] * torch.logspace(-1, 1, 60)[:, None]
    arguments = (
        features, None, torch.tensor(10.0), 0, labels, labels, "same", True, None, None, None, False, False,
    )  # fmt: skip
    lse, _, total, count, _ = torch.ops.cl_kernels_cuda.contrastive_forward(*arguments)
    exact_lse, _, exact_total, _, _ = by_reference("contrastive_forward", *arguments)
    terms = (10 * features @ features.T).abs().amax(1)
    assert ((lse - exact_lse).abs() <= 4e-7 * terms + 4e-7).all()
    assert ((total - exact_total).abs() / count <= 4e-7 * terms + 4e-7).all()


def test_near_rows() -> None:
    """Classes that have nearly converged."""
    labels = torch.arange(30) // 3
    views = torch.stack([clustered(labels, 2, 24), clustered(labels, 2, 24)], 1).flatten(1, 2)[:, :3]
    views[:, 2] = near(views[:, 0], 0.99)
    problem = tempered(Problem("supcon_loss", {"features": views, "labels": labels}), 0.01)
    with clk.use_backend("cuda"):
        found = ours(problem)["loss"]
    truth, eager = exact(problem)["loss"], plain(problem)["loss"]
    assert error(found, truth) <= 2 * error(eager, truth) + 1e-6 * float(truth.abs())
