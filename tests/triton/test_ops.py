"""Every op in every variant by Triton's kernels, against the chunked reference on the same inputs in float64.

On the CPU the kernels run under Triton's interpreter; CL_KERNELS_TEST_DEVICE=cuda runs them on a GPU.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import triton.language as tl
from op_checks import (
    ALL,
    DEVICE,
    DTYPES,
    SIZES,
    TRIPLES,
    assert_close,
    assert_features_are_needed,
    by_reference,
    run,
)
from torch import Tensor

import cl_kernels as clk
from cl_kernels import configs, dispatch, ops, reference
from cl_kernels.problem import Contrast, SoftTarget
from cl_kernels.triton import gradient, gradient_chunks, launch, lse

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")


def by_triton(name: str, *arguments: Any) -> Any:
    return dispatch.triton_op(name)(*arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("op", "variant", "size"), TRIPLES)
def test_every_variant(op: str, variant: str, size: str, dtype: torch.dtype) -> None:
    results = run(op, variant, SIZES[size], dtype, by_triton)
    assert_close(results, run(op, variant, SIZES[size], dtype, by_reference), dtype)


CONTRASTIVE = [variant for op, variant, _ in ALL if op == "contrastive"]


@pytest.mark.parametrize("variant", CONTRASTIVE)
def test_many_blocks_in_a_group(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for huge N: a program walks several rows of tiles and merges what their columns have so far."""
    monkeypatch.setattr(lse, "MOST_GROUPS", 2)
    results = run("contrastive", variant, SIZES["tails"], torch.float32, by_triton)
    assert_close(
        results, run("contrastive", variant, SIZES["tails"], torch.float32, by_reference), torch.float32
    )


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("variant", ["self, labels", "self, among same", "self, among different"])
def test_many_blocks_of_labels(variant: str, safe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision, where a thread adds up positives down a column of tiles; and where logits are too
    large for that."""
    monkeypatch.setattr(lse, "MOST_GROUPS", 2)
    if not safe:
        if DEVICE != "cpu":
            pytest.skip("compiled kernels keep the bound")
        monkeypatch.setattr(lse, "SAFE", tl.constexpr(-1.0))
    results = run("contrastive", variant, SIZES["tails"], torch.bfloat16, by_triton)
    assert_close(
        results, run("contrastive", variant, SIZES["tails"], torch.bfloat16, by_reference), torch.bfloat16
    )


@pytest.mark.parametrize("variant", ["self", "both axes", "self, mask", "keys, bias"])
def test_several_chunks_of_the_gradient(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_chunks, "CHUNK_BYTES", 4000)
    results = run("contrastive", variant, SIZES["wide"], torch.float16, by_triton)
    assert_close(
        results, run("contrastive", variant, SIZES["wide"], torch.float16, by_reference), torch.float16
    )


@pytest.mark.parametrize("variant", ["self", "self, labels", "self, device scale"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_atomic_triangle(variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CL_KERNELS_ATOMICS", "1")
    torch.use_deterministic_algorithms(False)
    seen = []
    rows = gradient.row_gradients
    monkeypatch.setattr(gradient, "row_gradients", lambda *a, **b: (seen.append(b), rows(*a, **b))[1])
    square = configs.Shape(16, 16, 32, 1, 1)
    if DEVICE == "cpu":
        monkeypatch.setattr(configs, "_INTERPRETED", square)
    results = run("contrastive", variant, SIZES["tails"], dtype, by_triton)
    assert_close(results, run("contrastive", variant, SIZES["tails"], dtype, by_reference), dtype)
    assert seen == [{"triangle": True}]


def test_determinism_goes_before_atomics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CL_KERNELS_ATOMICS", "1")
    for deterministic in (True, False):  # the fixture `poisoned` puts it back
        torch.use_deterministic_algorithms(deterministic)
        assert gradient.atomics_allowed() is not deterministic


@pytest.mark.parametrize("op", ["contrastive", "dimcl", "soft_target"])
def test_scale_in_memory(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale on the device stays there."""
    monkeypatch.setattr(launch, "scalar", lambda x: x.to(DEVICE))
    variant = next(variant for name, variant, rank in ALL if name == op and rank == 0)
    results = run(op, variant, SIZES["tails"], torch.float32, by_triton)
    assert_close(results, run(op, variant, SIZES["tails"], torch.float32, by_reference), torch.float32)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_matmul_precision(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        results = run("contrastive", "keys", SIZES["tails"], torch.float32, by_triton)
    finally:
        torch.set_float32_matmul_precision(before)
    truth = run("contrastive", "keys", SIZES["tails"], torch.float32, by_reference)
    error = max(
        float((x.double() - y).abs().max() / y.abs().max()) for x, y in zip(results[:1], truth, strict=False)
    )
    assert error < (1e-2 if precision == "medium" else 1e-3)
    if precision == "medium":  # bfloat16 products: it made a difference
        assert error > 1e-6


@pytest.mark.parametrize("size", [3.0, 30.0, 1000.0])
@pytest.mark.parametrize("both_axes", [False, True])
def test_any_range_of_logits(size: float, both_axes: bool) -> None:
    """Bounds up to 2^100, past it, and so far past that sums of some rows vanish next to others."""
    torch.manual_seed(0)
    q = torch.randn(60, 8) * torch.logspace(-3, 0, 60)[torch.randperm(60)][:, None] * size
    k = None if not both_axes else torch.randn(45, 8) * torch.logspace(-3, 0, 45)[:, None]
    q, k = q.to(DEVICE), None if k is None else k.to(DEVICE)
    arguments = (
        q,
        k,
        torch.tensor(1.0),
        0 if k is None else None,
        None,
        None,
        "all",
        False,
        None,
        None,
        None,
    )
    lse_rows, lse_cols, *_ = by_triton("contrastive_forward", *arguments, both_axes, False)
    expected, expected_cols, *_ = by_reference("contrastive_forward", *arguments, both_axes, False)
    largest = 1e-6 * float(expected.abs().max()) + 1e-5
    torch.testing.assert_close(lse_rows, expected, rtol=0, atol=largest)
    torch.testing.assert_close(lse_cols, expected_cols, rtol=0, atol=largest)


def test_index_at_the_excluded_column_counts() -> None:
    q = torch.nn.functional.normalize(torch.randn(20, 5), dim=1).to(DEVICE)
    own = torch.arange(20, device=DEVICE)
    arguments = (q, None, torch.tensor(5.0), 0, None, None, "all", False, own, None, None, False, False)
    results, truth = (call("contrastive_forward", *arguments) for call in (by_triton, by_reference))
    assert_close(list(results), list(truth), torch.float32)
    assert (results[3] == 1).all()


def test_nan_stays_nan_in_its_rows_only() -> None:
    q, k = torch.randn(40, 5), torch.randn(30, 5)
    q[3] = torch.nan
    arguments = (
        q.to(DEVICE),
        k.to(DEVICE),
        torch.tensor(1.0),
        None,
        None,
        None,
        "all",
        False,
        None,
        None,
        None,
    )
    found = by_triton("contrastive_forward", *arguments, False, False)[0]
    assert found.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("among", ["all", "same", "different"])
@pytest.mark.parametrize("exclude", [None, 0])
def test_a_positive_outside_the_denominators_of_frozen_keys(among: str, exclude: int | None) -> None:
    """Its logit is summed as it is, excluded or of a label that does not count."""
    n, m, d = 21, 40, 5
    q, k = torch.randn(n, d).to(DEVICE), torch.randn(m, d).to(DEVICE)
    labels = [torch.arange(size, device=DEVICE) % 3 for size in (n, m)] if among != "all" else [None] * 2
    for index in (torch.arange(n, device=DEVICE), torch.arange(n, device=DEVICE).flip(0) * 2 - 1):
        arguments = (q, k, torch.tensor(2.0), exclude, *labels, among, False, index, None, None, False, True)
        found = by_triton("contrastive_forward", *arguments)
        assert_close(list(found), list(by_reference("contrastive_forward", *arguments)), torch.float32)


@pytest.mark.parametrize("positives", [True, False])
def test_backwards_from_the_forward_read_the_keys_of_positives_only(positives: bool) -> None:
    """With frozen keys: the positives' keys, gathered, serve as well as all of them; without, none."""
    n, m, d = 21, 19, 5
    q, k, t = (torch.randn(size, d).to(DEVICE) for size in (n, m, n))
    scale, grad = torch.tensor(2.0), torch.randn(n, dtype=torch.float64).to(DEVICE)
    index = (torch.arange(n, device=DEVICE) % (m + 1) - 1) if positives else None  # -1: none
    own = None if index is None else torch.where(index < 0, -1, torch.arange(n, device=DEVICE))
    compact = k[:0] if index is None else k[index.clamp(min=0)]
    of_positive = grad if positives else None

    def contrastive(k: Tensor, index: Tensor | None) -> list[Any]:
        return [q, k, scale, None, None, None, "all", False, index, None, None, False]

    lse, cols, _, _, residual = by_triton("contrastive_forward", *contrastive(k, index), True)
    full, gathered = (
        by_triton(
            "contrastive_backward",
            grad,
            None,
            of_positive,
            *x,
            lse,
            cols,
            residual,
            (True, False, True, False),
        )
        for x in (contrastive(k, index), contrastive(compact, own))
    )
    assert torch.equal(full[0], gathered[0]) and torch.equal(full[2], gathered[2])

    def soft_target(k: list[Tensor], index: Tensor | None) -> list[Any]:
        return [q, k, t, k, scale, scale, index, "exclude"]

    stats = by_triton("soft_target_forward", *soft_target([k[:7], k[7:]], index), True)
    needs = (True, False, False, False)
    full, gathered = (
        by_triton("soft_target_backward", grad, None, grad, of_positive, *x, *stats, needs)
        for x in (soft_target([k[:7], k[7:]], index), soft_target([compact], own))
    )
    assert torch.equal(full[0], gathered[0])
    torch.testing.assert_close(full[4], gathered[4])


@pytest.mark.parametrize("positives", ["labels", "mask", "weights"])
@pytest.mark.parametrize("kind", ["converged", "collapsed"])
def test_sums_over_positives_share_the_rounding_of_the_lse(kind: str, positives: str) -> None:
    """Float32 whose logits cancel: at most twice eager's error, which rounds each logit once for both."""
    classes, views, tau = 64, 2, 0.01
    labels = torch.arange(classes, device=DEVICE) % 3
    rows = torch.randn(3, 1, 40) if kind == "converged" else torch.ones(3, 1, 40)
    rows = torch.nn.functional.normalize(rows, dim=-1).to(DEVICE)
    features = rows[labels].expand(classes, views, 40).contiguous()
    mask = (labels[:, None] == labels).float()
    if positives == "weights":
        mask *= torch.rand_like(mask)

    def plain(features: Tensor) -> Tensor:
        z = torch.cat(features.unbind(1))
        own = torch.eye(len(z), dtype=torch.bool, device=DEVICE)
        logits, weights = z @ z.T / tau, mask.repeat(views, views).masked_fill(own, 0).to(z)
        log_p = logits - logits.masked_fill(own, -torch.inf).logsumexp(1)[:, None]
        return -(log_p * weights).sum(1) / weights.sum(1)

    given = {"labels": labels} if positives == "labels" else {"mask": mask}
    with clk.use_backend("triton"):
        ours = clk.supcon_loss(
            features, **given, temperature=tau, base_temperature=tau, reduction="none"
        )  # fmt: skip
    truth = plain(features.double())
    rounding = torch.finfo(torch.float32).eps * truth.abs().max()
    assert (ours - truth).abs().max() <= 2 * (plain(features) - truth).abs().max() + rounding


# Names of five classes, distinct numbers.
NAMES = {
    "high words": [7 + (i << 32) for i in range(-2, 3)],
    "small and large": [0, 3, 1 << 40, 3 - (1 << 40), (1 << 62) + 3],
    "negative": [-1, -(2**31), -(2**31) - 1, -(2**63), 2**31 - 1],
    # The numbers that stand for the first columns of large labels, and for a label that no column has.
    "at the top": [2**31 - 1, 2**31 - 2, 2**31 - 1 - 37, 2**31, 2**63 - 1],
}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("among", ["all", "same", "different"])
@pytest.mark.parametrize("keys", [False, True])
def test_any_labels_of_64_bits(keys: bool, among: str, names: str) -> None:
    """Statistics and gradient are, bit by bit, those of labels 0 to 4; some labels of rows no column has."""
    n, m, d = 45, 37 if keys else 45, 5
    q, *others = (torch.randn(size, d).to(DEVICE, torch.bfloat16) for size in ((n, m) if keys else (n,)))
    k = others[0] if keys else None
    rows = torch.randint(0, 5, (n,))
    columns = torch.randint(0, 3, (m,)) if keys else rows
    exclude, scale, grads = None if keys else 0, torch.tensor(2.0), torch.rand(2, n, dtype=torch.float64)

    def results(rows: Tensor, columns: Tensor) -> list[Tensor]:
        given = rows = rows.to(DEVICE)
        if keys:
            given = columns.to(DEVICE)
        problem = (q, k, scale, exclude, rows, given, among, True, None, None, None, False)
        lse_rows, lse_cols, *sums, rest = by_triton("contrastive_forward", *problem, False)
        incoming = (grads[0].to(DEVICE), None, grads[1].to(DEVICE))
        saved = (lse_rows, lse_cols, rest)
        found = by_triton("contrastive_backward", *incoming, *problem, *saved, (True, keys, True, False))
        return [lse_rows, *sums, *found]

    named = torch.tensor(NAMES[names])
    expected = results(rows, columns)
    assert all(x.any() for x in expected[:4])
    for order in (torch.arange(5), torch.arange(4, -1, -1)):
        of_rows = named[order][rows]
        found = results(of_rows, named[order][columns] if keys else of_rows)
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)


NAN_SIZES = (35, 19, 3)  # N, M, D: two blocks of each
NAN_PAIRS: dict[str, dict[str, Any]] = {
    "self": {},
    "keys": {"keys": True},
    "keys, frozen": {"keys": True, "frozen": True},
    "both axes": {"keys": True, "both_axes": True},
    "both axes, bias": {"keys": True, "both_axes": True, "bias": True},
    "self, labels": {"positives": "labels"},
    "self, mask": {"positives": "mask"},
    "keys, offset, labels": {"keys": True, "exclude": 1, "positives": "labels"},
    "keys, among different": {"keys": True, "among": "different"},
}


@pytest.mark.parametrize("variant", NAN_PAIRS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_that_takes_part_is_nan(dtype: torch.dtype, variant: str) -> None:
    """In the log-sum-exps of exactly the rows and columns where plain PyTorch has it, at any scale."""
    (n, m, d), options = NAN_SIZES, NAN_PAIRS[variant]
    keys, labelled = options.get("keys"), options.get("positives") == "labels" or "among" in options
    for in_keys, scale in ((False, 2.0), (True, 300.0)):
        q, k = torch.randn(n, d).to(DEVICE, dtype), torch.randn(m, d).to(DEVICE, dtype) if keys else None
        (k if in_keys and k is not None else q)[-1, -1] = torch.nan
        columns = m if keys else n
        row_labels, col_labels = (torch.arange(size, device=DEVICE) % 3 for size in (n, columns))
        if not keys:
            col_labels = row_labels
        mask = torch.rand(n, columns, device=DEVICE) if options.get("positives") == "mask" else None
        arguments = (
            q, k, torch.tensor(scale), options.get("exclude", None if keys else 0),
            row_labels if labelled else None, col_labels if labelled else None,
            options.get("among", "all"), options.get("positives") == "labels", None, mask,
            torch.randn(columns, device=DEVICE) if options.get("bias") else None,
            options.get("both_axes", False),
        )  # fmt: skip
        lse_rows, lse_cols, positive_sum, *_ = by_triton(
            "contrastive_forward", *arguments, options.get("frozen", False)
        )
        truth, truth_cols, truth_sum, _ = reference.contrastive_stats(
            Contrast(q.double(), *_wide(k), *arguments[2:])
        )
        assert torch.equal(lse_rows.isnan(), truth.isnan()) and truth.isnan().any()
        assert torch.equal(lse_cols.isnan(), truth_cols.isnan())
        assert torch.equal(lse_rows.isfinite(), truth.isfinite())
        assert not (positive_sum.isnan() & ~truth_sum.isnan()).any()


def _wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.double() for x in tensors]


@pytest.mark.parametrize("where", ["q", "k", "target_q", "target_k", "own key", "own target key"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_of_student_or_teacher_is_nan(dtype: torch.dtype, where: str) -> None:
    """In exactly the rows where plain PyTorch has it, with mean keys and without, keys shared or not."""
    m, n, d = NAN_SIZES
    in_targets = ("exclude", "zero", "exclude", "none")
    modes = itertools.product((False, True), repeat=2)
    for in_target, (shared, save_gradient) in zip(in_targets, modes, strict=True):
        q, target_q = (torch.randn(n, d).to(DEVICE, dtype) for _ in range(2))
        k = torch.randn(m, d).to(DEVICE, dtype)
        u = k if shared else torch.randn(m, d).to(DEVICE, dtype)
        positive = None if in_target == "none" else torch.arange(n, device=DEVICE)
        spoiled = {"q": q, "k": k, "target_q": target_q, "target_k": u, "own key": k, "own target key": u}
        spoiled[where][0 if where.startswith("own") else -1, 0] = torch.nan
        scales = (torch.tensor(3.0), torch.tensor(2.0))
        rest = (positive, "exclude" if in_target == "none" else in_target)
        stats = by_triton("soft_target_forward", q, [k], target_q, [u], *scales, *rest, save_gradient)
        wide = SoftTarget(*_wide(q), _wide(k), *_wide(target_q), _wide(u), *scales, *rest)
        truth = reference.soft_target_stats(wide)
        for mine, theirs in zip(stats[:2], truth[:2], strict=True):
            assert torch.equal(mine.isnan(), theirs.isnan())
        # The positive's weight of 0 times a NaN is NaN in the formula, and nothing here: the lse has it.
        ours, plain = (x[0].isnan() | x[1].isnan() | x[2].isnan() for x in (stats, truth))
        assert torch.equal(ours, plain)
        if save_gradient:
            assert not stats[5][stats[1].isnan()].isfinite().any()


def test_a_bias_beside_keys_of_zeros() -> None:
    """Whose bound is inf times 0: no sum that overflows is trusted."""
    q, k = torch.randn(20, 5).to(DEVICE), torch.zeros(30, 5, device=DEVICE)
    bias = torch.full((30,), 200.0, device=DEVICE)
    arguments = (q, k, torch.tensor(1.0), None, None, None, "all", False, None, None, bias, True, False)
    results, truth = (call("contrastive_forward", *arguments) for call in (by_triton, by_reference))
    assert_close(list(results[:2]), list(truth[:2]), torch.float32)


def test_two_runs_are_bitwise_equal() -> None:
    def once() -> list[Tensor]:
        return run("contrastive", "self, labels", SIZES["tails"], torch.bfloat16, by_triton)

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_no_features() -> None:
    assert_features_are_needed(by_triton, "contrastive", "soft_target", "dimcl", "similarity")


def test_backend_by_name() -> None:
    q = torch.randn(6, 4).to(DEVICE)
    with clk.use_backend("triton"):
        expected = "interpreter" if DEVICE == "cpu" else "triton"
        assert dispatch.select("contrastive_forward", q) == expected
        with pytest.raises(clk.BackendError, match="float64"):
            clk.contrastive_lse(q.double())
        with pytest.raises(clk.BackendError, match="GPU tensors, not meta"):
            clk.contrastive_lse(q.to("meta"))


def test_backend_says_why_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "GPU tensors, not cpu tensors" in str(dispatch.obstacle("triton", "cpu"))
    monkeypatch.setattr(ops, "has_triton", lambda: False)
    assert "not installed" in str(dispatch.obstacle("triton", "cuda"))
