"""lightly's losses, beside the comparisons of values: state, errors, what falls back, dtypes, processes."""

from __future__ import annotations

import copy
import inspect
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from groups import in_group
from peers.side_by_side import assert_same_class, gradients, pair, ran, runs
from torch import Tensor, nn

import cl_kernels as clk
from cl_kernels import integrations

pytest.importorskip("lightly")

from lightly import loss as library
from lightly.models.modules.memory_bank import MemoryBankModule

from cl_kernels.integrations import lightly as ours

LOSSES = ("NTXentLoss", "DirectCLRLoss", "DCLLoss", "DCLWLoss", "MACLLoss")
BANK = {"memory_bank_size": (20, 8)}


def _views(rows: int = 6, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for _ in range(2)
    ]


_both = partial(pair, library, ours)


def _runs(loss: str, fused: int = 0, fallback: int = 0) -> AbstractContextManager[None]:
    return runs(f"lightly.{loss}", fused, fallback)


@pytest.mark.parametrize("loss", LOSSES)
def test_classes_are_lightlys_but_for_forward(loss: str) -> None:
    assert_same_class(library, ours, loss)


def test_bank_moves_as_theirs() -> None:
    theirs, mine = _both("NTXentLoss", **BANK)
    for step in range(6):
        x, y = _views(rows=7, seed=step)
        if step == 3:  # what gets no gradient is not remembered
            x = x.detach()
        assert mine(x, y).item() == pytest.approx(theirs(x, y).item(), rel=1e-6)
        assert torch.equal(mine.memory_bank.bank, theirs.memory_bank.bank)
        assert torch.equal(mine.memory_bank.bank_ptr, theirs.memory_bank.bank_ptr)


def test_bank_stays_without_gradients() -> None:
    _, mine = _both("NTXentLoss", **BANK)
    before = mine.memory_bank.bank.clone()
    with torch.no_grad():
        mine(*_views())
    assert torch.equal(mine.memory_bank.bank, before)


def test_gradient_is_of_the_bank_before_the_step() -> None:
    theirs, mine = _both("NTXentLoss", **BANK)
    inputs = _views()
    losses = [criterion(*inputs) for criterion in (theirs, mine)]
    for criterion in (theirs, mine):
        criterion(*_views(seed=1))
    found = [gradients(loss, inputs) for loss in losses]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("loss", "shapes"),
    [
        ("NTXentLoss", ((4, 8), (5, 8))),
        ("NTXentLoss", ((4, 8), (4, 7))),
        ("NTXentLoss", ((8,), (8,))),
        ("DCLLoss", ((4, 8), (5, 8))),
        ("DCLWLoss", ((4, 8), (4, 7))),
        ("MACLLoss", ((4, 8), (4, 7))),
    ],
)
def test_errors_are_lightlys(loss: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    theirs, mine = _both(loss)
    inputs = [torch.randn(*shape) for shape in shapes]
    with pytest.raises(Exception) as wanted:
        theirs(*inputs)
    with pytest.raises(type(wanted.value)) as found:
        mine(*inputs)
    assert str(found.value) == str(wanted.value)


def test_bank_of_another_width_is_lightlys_error() -> None:
    theirs, mine = _both("NTXentLoss", memory_bank_size=(20, 5))
    x, y = (x.detach() for x in _views())
    with pytest.raises(RuntimeError) as wanted:
        theirs(x, y)
    with pytest.raises(RuntimeError) as found:
        mine(x, y)
    assert str(found.value) == str(wanted.value)


def test_errors_of_constructors_stay() -> None:
    with pytest.raises(ValueError, match="Illegal temperature"):
        ours.NTXentLoss(temperature=1e-9)
    with pytest.raises(ValueError, match="A_0"):
        ours.MACLLoss(A_0=2.0)


def _smoothed(criterion: Any) -> None:
    criterion.cross_entropy = nn.CrossEntropyLoss(label_smoothing=0.1)


def _rows(criterion: Any) -> None:
    criterion.cross_entropy = nn.CrossEntropyLoss(reduction="none")


def _other_bank(criterion: Any) -> None:
    class Reversed(MemoryBankModule):
        def forward(self, output: Tensor, labels: Any = None, update: bool = False) -> Any:
            output, bank = super().forward(output, labels, update)
            return output, bank.flip(0)

    torch.manual_seed(1)
    criterion.memory_bank = Reversed((20, 8))


@pytest.mark.parametrize(
    ("change", "reason"),
    [(_smoothed, "its cross_entropy"), (_rows, "its cross_entropy"), (_other_bank, "its memory_bank")],
)
def test_what_falls_back_has_lightlys_value(
    change: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    integrations._swap._said.clear()
    theirs, mine = _both("NTXentLoss")
    for criterion in (theirs, mine):
        change(criterion)
    inputs = _views()
    with _runs("NTXentLoss", fallback=1):
        assert torch.equal(mine(*inputs), theirs(*inputs))
    assert reason in caplog.text


def test_infinite_loss_of_dcl_without_negatives() -> None:
    theirs, mine = _both("DCLLoss")
    inputs = _views(rows=1)
    losses = [criterion(*inputs) for criterion in (theirs, mine)]
    assert losses[0].item() == losses[1].item() == -torch.inf
    torch.testing.assert_close(gradients(losses[1], inputs), gradients(losses[0], inputs))


def test_temperature_of_0_is_lightlys() -> None:
    theirs, mine = _both("DCLLoss", temperature=0.0)
    inputs = _views()
    with _runs("DCLLoss", fallback=1):
        torch.testing.assert_close(mine(*inputs), theirs(*inputs), equal_nan=True)


def test_subclass_with_its_own_part_is_not_fused() -> None:
    class Doubled(ours.DCLLoss):
        def _loss(self, *args: Tensor) -> Tensor:
            return 2 * super()._loss(*args)

    x, y = _views()
    with _runs("DCLLoss", fallback=1):
        torch.testing.assert_close(Doubled()(x, y), 2 * library.DCLLoss()(x, y))


def test_one_pair_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    assert ours.NTXentLoss()(*_views(rows=1)).item() == 0
    assert not recwarn.list


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(loss: str, dtype: torch.dtype) -> None:
    theirs, mine = _both(loss)
    inputs = _views(rows=12, dtype=dtype)
    found, wanted = mine(*inputs), theirs(*inputs)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    exact = theirs(*(x.double() for x in inputs)).item()
    assert abs(found.item() - exact) <= abs(wanted.item() - exact) + abs(exact) * 2**-8


@pytest.mark.parametrize("options", [{}, BANK], ids=["batch", "bank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast(options: dict[str, Any], dtype: torch.dtype) -> None:
    if options and dtype == torch.float64:
        pytest.skip("lightly's bank is of float32, and autocast leaves float64 alone")
    theirs, mine = _both("NTXentLoss", **options)
    inputs = _views(rows=12, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16), _runs("NTXentLoss", fused=1):
        found, wanted = mine(*inputs), theirs(*inputs)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    assert torch.equal(mine.memory_bank.bank, theirs.memory_bank.bank)


@pytest.mark.parametrize("loss", ["DCLLoss", "DCLWLoss", "MACLLoss"])
def test_autocast_elsewhere(loss: str) -> None:
    theirs, mine = _both(loss)
    inputs = _views(rows=12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = mine(*inputs), theirs(*inputs)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=3e-2, atol=3e-2)


def test_bank_and_views_of_two_dtypes_are_lightlys_error() -> None:
    theirs, mine = _both("NTXentLoss", **BANK)
    inputs = [x.detach() for x in _views(dtype=torch.float64)]
    for criterion in (theirs, mine):
        with pytest.raises(RuntimeError):
            criterion(*inputs)


def test_temperature_that_raises_the_dtype() -> None:
    theirs, mine = _both("NTXentLoss")
    for criterion in (theirs, mine):
        criterion.temperature = torch.full((1,), 0.3, requires_grad=True)
    inputs = _views(dtype=torch.bfloat16)
    found, wanted = mine(*inputs), theirs(*inputs)
    assert found.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("loss", LOSSES)
def test_copies(loss: str) -> None:
    _, mine = _both(loss)
    inputs = _views()
    assert torch.equal(copy.deepcopy(mine)(*inputs), mine(*inputs))


@pytest.mark.parametrize("loss", LOSSES)
def test_accelerate(loss: str) -> None:
    theirs, _ = _both(loss)
    twin = clk.accelerate(theirs)
    assert type(twin) is getattr(ours, loss)
    inputs = _views()
    with _runs(loss, fused=1):
        torch.testing.assert_close(twin(*inputs), theirs(*inputs), rtol=1e-5, atol=1e-6)


def test_accelerate_shares_the_bank() -> None:
    theirs, _ = _both("NTXentLoss", **BANK)
    clk.accelerate(theirs)(*_views())
    assert theirs.memory_bank.bank_ptr.item() == 6


@pytest.mark.parametrize("loss", LOSSES)
def test_patch(loss: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind = getattr(library, loss)
    before, signature = vars(kind).get("forward"), inspect.signature(kind.forward)
    theirs, inputs = kind(), _views()
    wanted = theirs(*inputs)
    with clk.patch("lightly"), _runs(loss, fused=1):
        assert inspect.signature(kind.forward) == signature
        torch.testing.assert_close(theirs(*inputs), wanted, rtol=1e-5, atol=1e-6)
    assert vars(kind).get("forward") is before
    assert f"{loss}.forward" in capsys.readouterr().out


@pytest.mark.parametrize("loss", LOSSES)
def test_compiled(loss: str) -> None:
    theirs, mine = _both(loss)
    inputs = _views()
    found = torch.compile(mine, backend="eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(found, theirs(*inputs), rtol=1e-5, atol=1e-6)
    wanted = gradients(theirs(*inputs), inputs)
    torch.testing.assert_close(gradients(found, inputs), wanted, rtol=1e-4, atol=1e-6)


GATHERED = {
    "NTXentLoss": {},
    "NTXentLoss at 0.1": {"temperature": 0.1},
    "NTXentLoss with a bank": {"memory_bank_size": (11, 8)},
    "DirectCLRLoss": {"loss_dim": 5},
    "DCLLoss": {},
    "DCLWLoss": {"sigma": 0.3},
}


def _gathered(rank: int) -> dict[str, Any]:
    """By loss, the relative differences of loss, gradient and bank on this process, and what ran."""
    found: dict[str, Any] = {}
    for case, options in GATHERED.items():
        loss = case.partition(" ")[0]
        theirs, mine = _both(loss, gather_distributed=True, **options)
        inputs = _views(rows=4, dtype=torch.float64, seed=rank)
        temperature = torch.tensor(theirs.temperature, dtype=torch.float64, requires_grad=True)
        results = []
        before = ran(f"lightly.{loss}")
        for criterion in (theirs, mine):
            criterion.double().temperature = temperature
            criterion(*_views(rows=4, dtype=torch.float64, seed=7 + rank))
            value = criterion(*inputs)
            bank = criterion.memory_bank.bank if loss == "NTXentLoss" else torch.zeros(0)
            results.append((value.detach(), gradients(value, [*inputs, temperature]), bank))
        apart = [float((x - y).norm() / y.norm().clamp(min=1e-12)) for y, x in zip(*results, strict=True)]
        found[case] = (max(apart), ran(f"lightly.{loss}").fused - before.fused)
    return found


def test_gathers_of_two_processes(tmp_path: Path) -> None:
    for found in in_group(2, _gathered, tmp_path):
        assert isinstance(found, dict), found
        assert all(fused == 2 for _, fused in found.values()), found
        assert all(apart < 1e-12 for apart, _ in found.values()), found
