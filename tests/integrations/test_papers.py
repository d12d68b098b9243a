"""The adapters of the papers' repositories without the repositories: what their authors' code computed, and
what happens where only that code could run."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from groups import in_group
from oracles import Case, Outcome
from processes import run_python
from torch import Tensor

import cl_kernels
from cl_kernels.integrations import dimcl, eztorch, selfcon, solo_learn, supcontrast
from cl_kernels.integrations._registry import LIBRARIES
from cl_kernels.losses._common import CHUNK_LOGITS


def _sce(case: Case) -> Outcome:
    inputs = _named(case, "q", "k", "k_global", "queue")
    keyed = "k_global" in inputs
    rank, world = (case.rank, case.world) if keyed else (0, 1)
    keys, queue = inputs.get("k_global"), inputs.get("queue")
    mask = eztorch.compute_sce_mask(
        len(inputs["q"]), 0 if queue is None else queue.shape[1], keyed, rank, world
    )
    if case.has("mask"):
        assert torch.equal(mask, case.constant("mask").long())
    options = (case.meta["coeff"], case.meta["temp"], case.meta["temp_m"])
    loss = eztorch.compute_sce_loss(inputs["q"], inputs["k"], keys, keyed, queue, mask, *options)
    return Outcome(loss, inputs)


def _ressl(case: Case) -> Outcome:
    inputs, use_keys = _named(case, "q", "k", "k_global", "queue"), case.meta["use_keys"]
    mask = eztorch.compute_ressl_mask(len(inputs["q"]), inputs["queue"].shape[1], use_keys)
    given = (inputs["q"], inputs["k"], inputs.get("k_global"), use_keys, inputs["queue"], mask)
    return Outcome(eztorch.compute_ressl_loss(*given, case.meta["temp"], case.meta["temp_m"]), inputs)


def _moco(case: Case) -> Outcome:
    inputs = _named(case, "q", "k", "k_global", "queue")
    use_keys = case.meta.get("use_keys", "k_global" in inputs)
    given = (inputs["q"], inputs["k"], inputs.get("k_global"), use_keys, inputs.get("queue"))
    return Outcome(eztorch.compute_moco_loss(*given, case.meta["temp"], case.rank), inputs)


def _crops(case: Case) -> Outcome:
    inputs, meta = _named(case, "z", "z_global"), case.meta
    masks = eztorch.compute_simclr_masks(meta["N"], meta["crops"], case.rank, case.world)
    for name, mask in zip(("pos_mask", "neg_mask"), masks, strict=True):
        assert torch.equal(mask, case.constant(name).float())
    return Outcome(eztorch.compute_simclr_loss(*inputs.values(), *masks, meta["temp"]), inputs)


def _tokens(case: Case) -> Outcome:
    inputs = _named(case, "q", "k", "k_global", "queue")
    masks = [case.optional(name) for name in ("mask_sim_q", "mask_sim_k", "mask_prob_q", "mask_log_q")]
    options = (case.meta["coeff"], case.meta["temp"], case.meta["temp_m"])
    given = (inputs["q"], inputs["k"], inputs["k_global"], inputs.get("queue"))
    return Outcome(eztorch.compute_sce_token_loss(*given, *masks, *options), inputs)


def _supcontrast(case: Case) -> Outcome:
    inputs, loss = _named(case, "features"), supcontrast.SupConLoss(**case.meta["ctor"])
    return Outcome(loss(inputs["features"], case.optional("labels"), case.optional("mask")), inputs)


def _selfcon(case: Case) -> Outcome:
    inputs, loss = _named(case, "features"), selfcon.ConLoss(**case.meta["ctor"])
    given = (inputs["features"], case.optional("labels"), case.optional("mask"))
    return Outcome(loss(*given, **case.meta["flags"]), inputs)


def _dimcl(case: Case) -> Outcome:
    inputs, meta = _named(case, "z1", "z2"), case.meta
    options = {"lam_simple": meta["lam_simple"]} if "lam_simple" in meta else {"tau_decor": meta["tau_decor"]}
    indexes = torch.arange(len(inputs["z1"]))
    return Outcome(getattr(dimcl, meta["fn"])(*inputs.values(), indexes, **options), inputs)


def _solo(case: Case) -> Outcome:
    names = {"nn": "nnclr", "queue": "mocov2plus", "key": "mocov3"}
    kind = next(value for key, value in names.items() if case.has(key))
    inputs = _named(case, "nn", "p", "query", "key", "queue")
    loss = getattr(solo_learn, f"{kind}_loss_func")(*inputs.values(), temperature=case.meta["temp"])
    return Outcome(loss, inputs)


ADAPTED: dict[str, Callable[[Case], Outcome]] = {
    "ez_sce": _sce,
    "ez_ressl": _ressl,
    "ez_moco": _moco,
    "ez_simclr": _crops,
    "ez_sce_token": _tokens,
    "supcontrast": _supcontrast,
    "selfcon": _selfcon,
    "dimcl": _dimcl,
    "solo": _solo,
}
STORED = [
    case for case in oracles.cases(oracles.DATA) if case.family in ADAPTED and "method" not in case.meta
]
USED = [
    case for case in STORED if oracles.skip_reason(case) is None and (case.world == 1 or case.file != "dimcl")
]
REFUSED = [case for case in STORED if "error" in case.meta]


def _named(case: Case, *names: str) -> dict[str, Tensor]:
    return {name: case.leaf(name) for name in names if case.has(name)}


@pytest.mark.parametrize("case", USED, ids=lambda case: case.id)
def test_what_their_code_computed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(oracles.FAMILIES, case.family, lambda case, api: ADAPTED[case.family](case))
    found = oracles.errors(case, cl_kernels)
    assert max(found.values()) <= oracles.tolerance(case), found


def test_every_family_is_stored() -> None:
    assert {case.family for case in USED} == set(ADAPTED)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.id)
def test_what_their_code_refuses(case: Case) -> None:
    with pytest.raises((ValueError, TypeError, NotImplementedError)):
        ADAPTED[case.family](case)


def _rank_of_dimcl(rank: int, parts: list[list[Tensor]], tau: float) -> list[Tensor]:
    z1, z2 = (x.clone().requires_grad_() for x in parts[rank])
    loss = dimcl.ours_loss_func_multigpu(z1, z2, torch.arange(len(z1)), tau)
    return [loss.detach(), *torch.autograd.grad(loss, (z1, z2))]


def _rank_of_simclr(rank: int, parts: list[list[Tensor]], tau: float) -> list[Tensor]:
    z = parts[rank][0].clone().requires_grad_()
    loss = solo_learn.simclr_loss_func(z, parts[rank][1], tau)
    return [loss.detach(), *torch.autograd.grad(loss, (z,))]


@pytest.mark.parametrize(
    ("file", "kind", "names", "work"),
    [
        ("dimcl", "multigpu", ("z1", "z2"), _rank_of_dimcl),
        ("extras", "solo_simclr", ("z", "indexes"), _rank_of_simclr),
    ],
)
def test_over_processes(file: str, kind: str, names: Any, work: Any, tmp_path: Path) -> None:
    stored = [case for case in oracles.load(oracles.DATA / f"{file}.npz") if case.world == 2]
    case = next(case for case in stored if kind in case.meta.get("fn", case.meta.get("kind", "")))
    ranks = case.ranks()
    assert len(ranks) == 2
    parts = [[other.constant(name) for name in names] for other in ranks]
    tau = case.meta.get("tau_decor", oracles.UNSTATED_TEMPERATURE)
    for other, found in zip(ranks, in_group(2, work, tmp_path, parts, tau), strict=True):
        assert not isinstance(found, str), found
        wanted = [other.constant("loss"), *(other.constant(f"grad_{x}") for x in names if x != "indexes")]
        for x, y in zip(found, wanted, strict=True):
            torch.testing.assert_close(x, y.to(x), rtol=1e-10, atol=1e-12)


def test_modules_import_without_their_libraries() -> None:
    packages = {known.package for known in LIBRARIES.values()}
    code = [f"import sys; sys.modules.update(dict.fromkeys({packages}))"]  # whose import fails now
    alone = [name for name, known in LIBRARIES.items() if known.distribution is None]
    code += [f"import cl_kernels.integrations.{name}" for name in (*alone, "swift")]
    done = run_python("-c", "\n".join(code))
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(find_spec("eztorch") is not None, reason="eztorch is there")
def test_patch_says_that_a_repository_is_not_there() -> None:
    with pytest.raises(ImportError, match="eztorch"):
        cl_kernels.patch("eztorch", verbose=False)


def test_an_error_of_ours_where_theirs_is_not_there() -> None:
    with pytest.raises(ValueError, match="labels"):
        supcontrast.SupConLoss()(torch.randn(4, 2, 8), torch.zeros(5))
    with pytest.raises(ValueError, match="selfcon_s_FG"):
        selfcon.ConLoss()(torch.randn(4, 2, 8), selfcon_s_FG=True, selfcon_m_FG=True)
    q = torch.randn(4, 8)
    with pytest.raises(NotImplementedError, match="does not have one positive a row"):
        eztorch.compute_sce_loss(q, q, q, True, None, torch.ones(4, 4), 0.5)


def test_masks_are_looked_at_again_after_a_change() -> None:
    q, k = (torch.nn.functional.normalize(torch.randn(4, 8)) for _ in range(2))
    mask = eztorch.compute_sce_mask(4, 0)
    eztorch.compute_sce_loss(q, k, k, True, None, mask, 0.5)
    mask[0, 1] = 1
    with pytest.raises(NotImplementedError):
        eztorch.compute_sce_loss(q, k, k, True, None, mask, 0.5)
    positive, negative = eztorch.compute_simclr_masks(2, 2)
    eztorch.compute_simclr_loss(q, q, positive, negative, 0.1)
    with pytest.raises(NotImplementedError):
        eztorch.compute_simclr_loss(q, q, positive, positive, 0.1)
    negative.zero_()
    with pytest.raises(NotImplementedError):
        eztorch.compute_simclr_loss(q, q, positive, negative, 0.1)


def test_a_second_derivative_of_token_losses_is_right_or_refused() -> None:
    q, k = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    masks = (None, torch.eye(4), torch.eye(4), None)
    loss = eztorch.compute_sce_token_loss(q, k, k, None, *masks, 0.5)
    (gradient,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), q)


@pytest.mark.parametrize("chunk", [20, 2**20])
def test_a_backward_of_token_losses_inside_of_autocast_is_exact(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", chunk)
    q, k = (torch.randn(8, 16, requires_grad=True) for _ in range(2))
    masks = (None, torch.eye(8), torch.eye(8), None)

    def gradient(k: Tensor) -> Tensor:
        return torch.autograd.grad(eztorch.compute_sce_token_loss(q, k, k, None, *masks, 0.5), q)[0]

    for keys in (k, k.detach()):
        wanted = gradient(keys)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(gradient(keys), wanted)


@pytest.mark.parametrize("kind", [supcontrast.SupConLoss, selfcon.ConLoss], ids=lambda kind: kind.__name__)
def test_rows_with_nothing_to_contrast_go_without_a_warning(kind: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", cl_kernels.EmptyContrastWarning)
        kind()(torch.ones(1, 1, 4))
        solo_learn.nnclr_loss_func(torch.ones(1, 4), torch.ones(1, 4))


def test_rows_without_positives() -> None:
    x = torch.nn.functional.normalize(torch.randn(4, 1, 8), dim=2).requires_grad_()
    alone = torch.tensor([0, 0, 1, 2])
    assert supcontrast.SupConLoss()(x, alone).isfinite()
    loss = selfcon.ConLoss()
    assert loss(x, alone).isnan()
    value = loss(x, alone, supcon_s=True)
    pairs = supcontrast.SupConLoss()(x, alone) * 2  # half of the rows count
    torch.testing.assert_close(value, pairs)
    assert torch.autograd.grad(value, x)[0].isfinite().all()
    assert loss(x, torch.arange(4), supcon_s=True).isnan()
    assert solo_learn.simclr_loss_func(x[:, 0], alone) == math.inf


@pytest.mark.parametrize("kind", [supcontrast.SupConLoss, selfcon.ConLoss], ids=lambda kind: kind.__name__)
def test_classes_are_modules_as_theirs(kind: Any) -> None:
    loss = kind(0.1, "one", base_temperature=0.2)
    assert (loss.temperature, loss.contrast_mode, loss.base_temperature) == (0.1, "one", 0.2)
    assert list(inspect.signature(kind.forward).parameters)[:4] == ["self", "features", "labels", "mask"]
    assert loss.state_dict() == {}
    x = torch.nn.functional.normalize(torch.randn(6, 2, 8), dim=2)
    assert torch.equal(copy.deepcopy(loss)(x), loss(x))
    assert cl_kernels.accelerate(loss) is loss
    temperature = torch.nn.Parameter(torch.tensor(0.1))
    kind(temperature)(x, torch.arange(6) % 3).backward()
    assert temperature.grad is not None and temperature.grad.isfinite()
