"""open_clip's losses, beside the comparisons of values: caches, errors, what falls back, processes."""

from __future__ import annotations

import copy
import inspect
import itertools
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from groups import in_group
from peers.side_by_side import assert_same_class, gradients, pair, ran, runs
from torch import Tensor, nn
from torch.nn.functional import normalize

import cl_kernels as clk
from cl_kernels import integrations

pytest.importorskip("open_clip")

from open_clip import loss as library

from cl_kernels.integrations import open_clip as ours

LOSSES = {
    "ClipLoss": {},
    "CoCaLoss": {"caption_loss_weight": 2.0, "clip_loss_weight": 1.0},
    "DistillClipLoss": {},
}


def _pairs(rows: int = 6, dtype: torch.dtype = torch.float32, seed: int = 0, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)
        .to(dtype)
        .requires_grad_()
        for _ in range(2)
    ]


def _scale(dtype: torch.dtype = torch.float32, value: float = 10.0) -> Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def _arguments(loss: str, rows: int = 6, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Those of a call."""
    images, texts, scale = *_pairs(rows, dtype, seed), _scale(dtype)
    if loss == "CoCaLoss":
        labels = torch.arange(rows * 4).view(rows, 4) % 5
        logits = torch.randn(rows, 4, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)
        return [images, texts, logits.requires_grad_(), labels, scale]
    teacher = [*_pairs(rows, dtype, seed + 100, 5), _scale(dtype, 15.0)] if loss == "DistillClipLoss" else []
    return [images, texts, scale, *teacher]


def _both(loss: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    return pair(library, ours, loss, **{**LOSSES[loss], **options})


def _runs(loss: str, fused: int = 0, fallback: int = 0) -> AbstractContextManager[None]:
    return runs(f"open_clip.{loss}", fused, fallback)


def _total(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else sum(found)


@pytest.mark.parametrize("loss", LOSSES)
def test_classes_are_open_clips_but_for_forward(loss: str) -> None:
    assert_same_class(library, ours, loss, **LOSSES[loss])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("cached", [False, True])
def test_labels_are_cached_as_theirs(loss: str, cached: bool) -> None:
    theirs, mine = _both(loss, cache_labels=cached)
    for rows in (6, 6, 4):
        for criterion in (theirs, mine):
            criterion(*_arguments(loss, rows))
        assert mine.prev_num_logits == theirs.prev_num_logits
        assert mine.labels.keys() == theirs.labels.keys()
        assert all(torch.equal(mine.labels[key], theirs.labels[key]) for key in theirs.labels)


@pytest.mark.parametrize(
    ("loss", "names"),
    [
        ("ClipLoss", ["contrastive_loss"]),
        ("CoCaLoss", ["contrastive_loss", "caption_loss"]),
        ("DistillClipLoss", ["contrastive_loss", "distill_loss"]),
    ],
)
def test_output_dict(loss: str, names: list[str]) -> None:
    _, mine = _both(loss)
    found = mine(*_arguments(loss), output_dict=True)
    assert list(found) == names
    plain = mine(*_arguments(loss))
    values = [plain] if isinstance(plain, Tensor) else list(plain)
    assert all(torch.equal(x, y) for x, y in zip(found.values(), values, strict=True))


def test_bias_gets_a_gradient_of_0() -> None:
    theirs, mine = _both("ClipLoss")
    arguments = [*_arguments("ClipLoss"), _scale(value=-10.0)]
    assert torch.autograd.grad(mine(*arguments), arguments[-1])[0].item() == 0
    assert abs(torch.autograd.grad(theirs(*arguments), arguments[-1])[0].item()) < 1e-6


@pytest.mark.parametrize(
    "shapes", [((4, 8), (5, 8)), ((4, 8), (4, 7)), ((8,), (8,)), ((5, 8), (4, 8))], ids=str
)
def test_errors_are_open_clips(shapes: tuple[tuple[int, ...], ...]) -> None:
    theirs, mine = _both("ClipLoss")
    arguments = [*(torch.randn(*shape) for shape in shapes), 10.0]
    with pytest.raises(Exception) as wanted:
        theirs(*arguments)
    with pytest.raises(type(wanted.value)) as found:
        mine(*arguments)
    assert str(found.value) == str(wanted.value)


def test_features_of_two_dtypes_are_open_clips_error() -> None:
    for criterion in _both("ClipLoss"):
        with pytest.raises(RuntimeError):
            criterion(torch.randn(4, 8), torch.randn(4, 8).double(), 10.0)
        with pytest.raises(RuntimeError):
            criterion(*_pairs(dtype=torch.bfloat16), torch.full((1,), 10.0))


class _Shifted(library.ClipLoss):
    """A loss with logits of its own."""

    def get_logits(self, *args: Any, **options: Any) -> Any:
        images, texts = super().get_logits(*args, **options)
        return images.clamp(max=5), texts


def _sharper(kind: type[nn.Module]) -> type[nn.Module]:
    class Sharper(kind):  # type: ignore[misc, valid-type]
        def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
            return super().dist_loss(2 * teacher_logits, student_logits)

    return Sharper


def test_what_falls_back_has_open_clips_value(caplog: pytest.LogCaptureFixture) -> None:
    integrations._swap._said.clear()
    clip, distill = _arguments("ClipLoss"), _arguments("DistillClipLoss")
    bias = torch.arange(6.0)
    cases = {
        "logit_bias has more": (library.ClipLoss, ours.ClipLoss, [*clip, bias]),
        "dist_loss of its own": (*map(_sharper, (library.DistillClipLoss, ours.DistillClipLoss)), distill),
    }
    for reason, (theirs, mine, arguments) in cases.items():
        found, wanted = mine()(*arguments), theirs()(*arguments)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert reason in caplog.text
    if "use_horovod" in inspect.signature(library.ClipLoss).parameters:  # until 3.3.0
        with pytest.raises(AssertionError, match="horovod"):
            ours.ClipLoss(use_horovod=True, world_size=2)(*clip)
    with clk.patch("open_clip", verbose=False), _runs("ClipLoss", fallback=1):
        found = _Shifted()(*clip)
    assert torch.equal(found, _Shifted()(*clip))
    assert "get_logits of its own" in caplog.text


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(loss: str, dtype: torch.dtype) -> None:
    theirs, mine = _both(loss)
    arguments = _arguments(loss, rows=12, dtype=dtype)
    arguments[-1 if loss == "CoCaLoss" else 2] = _scale()  # a parameter of float32
    found, wanted = mine(*arguments), theirs(*arguments)
    exact = theirs(*(x.double() if x.is_floating_point() else x for x in arguments))
    for x, y, z in zip(*([a] if isinstance(a, Tensor) else a for a in (found, wanted, exact)), strict=True):
        assert x.dtype == y.dtype == dtype
        assert abs(x.item() - z.item()) <= abs(y.item() - z.item()) + abs(z.item()) * 2**-8


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast(loss: str, dtype: torch.dtype) -> None:
    theirs, mine = _both(loss)
    arguments = _arguments(loss, rows=12, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16), _runs(loss, fused=1):
        found, wanted = mine(*arguments), theirs(*arguments)
    for x, y in zip(*([a] if isinstance(a, Tensor) else a for a in (found, wanted)), strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=3e-2, atol=3e-2)


def test_teacher_of_another_dtype() -> None:
    theirs, mine = _both("DistillClipLoss")
    arguments = _arguments("DistillClipLoss")
    arguments[3:] = [x.detach().double() for x in arguments[3:]]
    found, wanted = mine(*arguments), theirs(*arguments)
    assert [x.dtype for x in found] == [x.dtype for x in wanted]
    torch.testing.assert_close(_total(found), _total(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_copies(loss: str) -> None:
    _, mine = _both(loss)
    arguments = _arguments(loss)
    torch.testing.assert_close(copy.deepcopy(mine)(*arguments), mine(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_accelerate(loss: str) -> None:
    theirs, _ = _both(loss)
    twin = clk.accelerate(theirs)
    assert type(twin) is getattr(ours, loss)
    arguments = _arguments(loss)
    with _runs(loss, fused=1):
        torch.testing.assert_close(twin(*arguments), theirs(*arguments), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_patch(loss: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind = getattr(library, loss)
    before, signature = vars(kind)["forward"], inspect.signature(kind.forward)
    theirs, arguments = _both(loss)[0], _arguments(loss)
    wanted = theirs(*arguments)
    with clk.patch("open_clip"), _runs(loss, fused=1):
        assert inspect.signature(kind.forward) == signature
        torch.testing.assert_close(theirs(*arguments), wanted, rtol=1e-5, atol=1e-6)
    assert vars(kind)["forward"] is before
    assert f"{loss}.forward" in capsys.readouterr().out


def test_compiled() -> None:
    theirs, mine = _both("ClipLoss")
    arguments = _arguments("ClipLoss")
    found = torch.compile(mine, backend="eager", fullgraph=True)(*arguments)
    wanted = theirs(*arguments)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        gradients(found, arguments), gradients(wanted, arguments), rtol=1e-4, atol=1e-6
    )


def _gathered(rank: int) -> dict[str, Any]:
    """By loss and options, the relative differences of loss and gradients on this process, and what ran."""
    found: dict[str, Any] = {}
    for loss, local, with_grad in itertools.product(LOSSES, (False, True), (False, True)):
        options = {"local_loss": local, "gather_with_grad": with_grad, "cache_labels": True}
        theirs, mine = _both(loss, rank=rank, world_size=2, **options)
        arguments = _arguments(loss, rows=4, dtype=torch.float64, seed=rank)
        before, results = ran(f"open_clip.{loss}").fused, []
        for criterion in (theirs, mine):
            values = criterion(*arguments)
            results.append((_total(values).detach()[None], gradients(_total(values), arguments)))
        apart = max(float((x - y).norm() / y.norm().clamp(min=1e-12)) for y, x in zip(*results, strict=True))
        same_labels = torch.equal(*(next(iter(each.labels.values())) for each in (theirs, mine)))
        fused = ran(f"open_clip.{loss}").fused - before
        found[f"{loss} {local} {with_grad}"] = (apart, fused, same_labels)
    return found


def _averaged(rank: int) -> list[tuple[float, Tensor, Tensor]]:
    """With and without gathers that keep gradients: the factor expected, what DDP makes of the gradient of
    weights that all rows pass through, and that of the whole batch."""
    rows = [_pairs(4, torch.float64, seed=each) for each in range(2)]
    weights = torch.eye(8, dtype=torch.float64).requires_grad_()
    images, texts = (torch.cat(sides).detach() @ weights for sides in zip(*rows, strict=True))
    (whole,) = torch.autograd.grad(clk.clip_loss(images, texts, 10.0), weights)
    found = []
    for kept, factor in ((False, 0.5), (True, 1.0)):
        criterion = ours.ClipLoss(local_loss=kept, gather_with_grad=kept, rank=rank, world_size=2)
        loss = criterion(*(x.detach() @ weights for x in rows[rank]), _scale(torch.float64))
        (gradient,) = torch.autograd.grad(loss, weights)
        dist.all_reduce(gradient)
        found.append((factor, gradient / 2, whole))
    return found


def _on_two(rank: int) -> tuple[dict[str, Any], list[Any]]:
    return _gathered(rank), _averaged(rank)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The reports of two processes."""
    found = in_group(2, _on_two, tmp_path_factory.mktemp("group"))
    assert all(isinstance(one, tuple) for one in found), found
    return found


def test_gathers_of_two_processes(on_two: list[Any]) -> None:
    for found, _ in on_two:
        assert all(fused == 1 and labels for _, fused, labels in found.values()), found
        assert all(apart < 1e-12 for apart, _, _ in found.values()), found


def test_gradient_factor_of_the_default(on_two: list[Any]) -> None:
    """Gathered without gradients, and not local: half of the true gradient in two processes."""
    for _, found in on_two:
        for factor, gradient, whole in found:
            torch.testing.assert_close(gradient, factor * whole)
