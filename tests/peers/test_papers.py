"""The papers' repositories and our adapters of them: copies, patches, dtypes and processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from groups import in_group
from peers import dimcl_cases, eztorch_cases, selfcon_cases, solo_learn_cases, supcontrast_cases
from peers.cases import PeerCase
from peers.repositories import COMMITS, clone, load, load_file, load_solo, of_commit, only_here, solo_utils
from peers.side_by_side import both, gradients, runs
from torch import Tensor

import cl_kernels

pytestmark = pytest.mark.skipif(
    any(clone(name) is None for name in COMMITS), reason="no clones: set CL_KERNELS_REPOSITORIES"
)
MODULES = (supcontrast_cases, selfcon_cases, eztorch_cases, dimcl_cases, solo_learn_cases)


def one_of_each() -> list[PeerCase]:
    """The first case of each loss."""
    found: dict[str, PeerCase] = {}
    for module in MODULES:
        for case in module.cases():
            found.setdefault(case.loss, case)
    return list(found.values())


@pytest.fixture
def in_place() -> Iterator[dict[str, ModuleType]]:
    """sys.modules, as it was afterwards; and nothing patched."""
    with only_here("solo", "losses") as modules:
        yield modules
        cl_kernels.unpatch()


@pytest.mark.parametrize("setting", ["bfloat16", "autocast", "autocast of bfloat16"])
@pytest.mark.parametrize("case", one_of_each(), ids=lambda case: case.id)
def test_dtypes_are_theirs(case: PeerCase, setting: str) -> None:
    dtype = torch.bfloat16 if "bfloat16" in setting else torch.float32
    inputs = case.example(24, dtype)
    with torch.autocast("cpu", enabled="autocast" in setting):
        loss, gradient = both(case.theirs(), case.ours(), inputs)
    assert loss < 0.1 and gradient < 0.2, (loss, gradient)


@pytest.mark.parametrize("file", ["losses.py", "my_losses.py"])
def test_copies_of_a_class_are_known_by_their_source(file: str, tmp_path: Path) -> None:
    source = (clone("SupContrast") / "losses.py").read_text()
    (tmp_path / file).write_text(source + "\n\nMORE = 1\n")
    copied = load_file(tmp_path / file, "project.vendored")
    loss = cl_kernels.accelerate(copied.SupConLoss(temperature=0.1))
    x = torch.nn.functional.normalize(torch.randn(6, 2, 8), dim=2)
    with runs("supcontrast.SupConLoss", fused=1):
        torch.testing.assert_close(loss(x), copied.SupConLoss(temperature=0.1)(x))
    assert isinstance(loss, copied.SupConLoss)

    (tmp_path / file).write_text(source.replace("< 1e-6", "< 1e-5"))
    changed = load_file(tmp_path / file, "project.changed").SupConLoss()
    assert cl_kernels.accelerate(changed) is changed


def test_a_copy_of_2020_turns_nan_as_it_did(tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text(of_commit("SupContrast", "2728c67", "losses.py"))
    old = load_file(tmp_path / "old.py", "project.old").SupConLoss
    x = torch.nn.functional.normalize(torch.randn(6, 2, 8, dtype=torch.float64), dim=2).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 2, 3])
    for mode in ("all", "one"):
        theirs, ours = old(0.1, mode), cl_kernels.accelerate(old(0.1, mode))
        assert max(both(theirs, ours, [x, labels])) < 1e-12
        one_view = x[:, :1].detach().requires_grad_()
        assert max(both(theirs, ours, [one_view, labels % 2])) < 1e-12
        assert theirs(one_view, labels).isnan() and ours(one_view, labels).isnan()
    newer = load("SupContrast", "losses.py").SupConLoss()
    assert cl_kernels.accelerate(newer)(one_view, labels).isfinite()


def test_patch_of_classes(in_place: dict[str, ModuleType]) -> None:
    in_place["losses"] = load("SupContrast", "losses.py", "losses")
    kind = in_place["losses"].SupConLoss
    existing, original = kind(), kind.forward
    x = torch.nn.functional.normalize(torch.randn(6, 2, 8), dim=2)
    wanted = existing(x)
    with cl_kernels.patch("supcontrast", verbose=False) as patched:
        assert patched.swapped == ["losses:SupConLoss.forward"]
        with runs("supcontrast.SupConLoss", fused=1):
            torch.testing.assert_close(existing(x), wanted)
    assert kind.forward is original


def test_patch_of_functions(in_place: dict[str, ModuleType]) -> None:
    with solo_utils("solo-learn"):
        for name in solo_learn_cases.FILES:
            file = load("solo-learn", f"solo/losses/{name}.py", f"solo.losses.{name}")
            in_place[file.__name__] = file
        user = in_place["solo.methods.simclr"] = ModuleType("solo.methods.simclr")
        original = in_place["solo.losses.simclr"].simclr_loss_func
        user.imported = original
        z, indexes = torch.randn(8, 16), torch.arange(4).repeat(2)
        wanted = original(z, indexes)
        with cl_kernels.patch("solo_learn", verbose=False) as patched:
            assert len(patched.swapped) == 5
            assert user.imported is not original
            with runs("solo_learn.simclr_loss_func", fused=1):
                torch.testing.assert_close(user.imported(z, indexes), wanted)
        assert user.imported is original


def test_patch_refuses_a_fork_with_another_loss(in_place: dict[str, ModuleType]) -> None:
    with solo_utils("DimCL"):
        in_place["solo.losses.nnclr"] = load("DimCL", "solo/losses/nnclr.py", "solo.losses.nnclr")
        with pytest.raises(RuntimeError, match="another source"):
            cl_kernels.patch("solo_learn", verbose=False)
        in_place["solo.losses.oursloss"] = load("DimCL", "solo/losses/oursloss.py", "solo.losses.oursloss")
        with cl_kernels.patch("dimcl", verbose=False) as patched:
            assert len(patched.swapped) == 3


def test_what_falls_back_has_their_value_or_error() -> None:
    file = load("eztorch", "eztorch/losses/sce_loss.py")
    fused = cl_kernels.accelerate(file.compute_sce_loss)
    q, k = (torch.nn.functional.normalize(torch.randn(4, 8)) for _ in range(2))
    given = (q, k, k, True, None, torch.rand(4, 4), 0.5)
    with runs("eztorch.compute_sce_loss", fallback=1):
        torch.testing.assert_close(fused(*given), file.compute_sce_loss(*given))
    loss = cl_kernels.accelerate(load("SupContrast", "losses.py").SupConLoss())
    with pytest.raises(ValueError, match="at least 3 dimensions"):
        loss(q)
    with pytest.raises(ValueError, match="Num of labels"):
        loss(torch.randn(4, 2, 8), torch.zeros(5))
    con = cl_kernels.accelerate(load("self-contrastive-learning", "losses/losses.py").ConLoss())
    with pytest.raises(RuntimeError):
        con(torch.randn(4, 2, 8), supcon_s=True)
    ours = load_solo("DimCL", ("oursloss",))["oursloss"].ours_loss_func
    z, extra = torch.randn(8, 4), torch.eye(8, dtype=torch.bool)
    torch.testing.assert_close(
        cl_kernels.accelerate(ours)(z, z, None, extra_pos_mask=extra), ours(z, z, None, extra_pos_mask=extra)
    )


OVER_PROCESSES = (
    ("solo-learn", "simclr", "simclr_loss_func", True),
    ("solo-learn", "nnclr", "nnclr_loss_func", True),
    ("solo-learn", "mocov3", "mocov3_loss_func", True),
    ("DimCL", "simclr", "simclr_loss_func", False),
    ("DimCL", "oursloss", "ours_loss_func_multigpu", True),
)
COUNTED = {"oursloss": "dimcl"}  # the others by solo_learn, of which they are


def _two_views(file: str, rank: int) -> list[Tensor]:
    x, y = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    if file == "simclr":
        return [x.requires_grad_(), torch.arange(6).repeat(2) + 6 * rank]
    return [x.requires_grad_(), y.requires_grad_(), *([torch.arange(12)] if file == "oursloss" else [])]


def _over_processes(rank: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Value and gradient of each, theirs and ours."""
    torch.set_default_dtype(torch.float64)
    reports = []
    for repository, file, name, fused in OVER_PROCESSES:
        with solo_utils(repository):
            original = getattr(load(repository, f"solo/losses/{file}.py"), name)
            inputs, found = _two_views(file, rank), []
            with runs(f"{COUNTED.get(file, 'solo_learn')}.{name}", fused, not fused):
                for function in (original, cl_kernels.accelerate(original)):
                    loss = function(*inputs)
                    found.append((loss.detach(), gradients(loss, inputs)))
        reports.append(found)
    return reports


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The reports of two processes."""
    return in_group(2, _over_processes, tmp_path_factory.mktemp("group"))


@pytest.mark.parametrize(
    "which", range(len(OVER_PROCESSES)), ids=["-".join(map(str, x)) for x in OVER_PROCESSES]
)
def test_over_processes(which: int, on_two: list[Any]) -> None:
    for report in on_two:
        assert isinstance(report, list), report
        theirs, ours = report[which]
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
