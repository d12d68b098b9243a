"""pytorch-metric-learning beside what single values tell: wrappers, state, statistics, errors, processes."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from groups import in_group
from peers.side_by_side import both, ran, runs
from torch import Tensor

import cl_kernels as clk
from cl_kernels import integrations

pytest.importorskip("pytorch_metric_learning")

from pytorch_metric_learning import distances, losses, miners, reducers
from pytorch_metric_learning.utils import distributed
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from cl_kernels import validation
from cl_kernels.integrations import pytorch_metric_learning as ours
from cl_kernels.losses import _pairs
from cl_kernels.losses._common import CHUNK_LOGITS

NAMES = ("SupConLoss", "NTXentLoss")
TARGET = "pytorch_metric_learning.{}"


@pytest.fixture
def patched() -> Iterator[None]:
    with clk.patch("pytorch_metric_learning", verbose=False):
        yield


def fused(name: str, times: int = 1) -> contextlib.AbstractContextManager[None]:
    return runs(TARGET.format(name), times)


def example(rows: int = 24, width: int = 8, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), torch.arange(rows) * 3 % classes


def assert_same(theirs: Callable[..., Tensor], mine: Callable[..., Tensor], *inputs: Tensor) -> None:
    assert max(both(theirs, mine, inputs)) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_classes_are_the_librarys(name: str) -> None:
    kind = getattr(ours, name)
    assert issubclass(kind, getattr(losses, name)) and kind.__name__ == name
    loss = kind(temperature=0.3)
    assert loss.temperature == 0.3 and not loss.state_dict()
    assert type(loss.reducer) is type(getattr(losses, name)().reducer)
    for wrapper in (losses.SelfSupervisedLoss, losses.CrossBatchMemory, ours.CrossBatchMemory):
        wrapper.check_loss_support(type(loss).__name__)
    assert type(copy.deepcopy(loss)) is kind


def wrapped(module: Any, kind: str, name: str) -> Callable[[Tensor, Tensor], Tensor]:
    loss = getattr(module, name)(temperature=0.2)
    if kind == "SelfSupervisedLoss":
        wrapper = losses.SelfSupervisedLoss(loss)
        return lambda x, y: wrapper(x, x.flip(0))
    if kind == "MultipleLosses":
        return losses.MultipleLosses({"a": loss, "b": losses.ContrastiveLoss()})
    memory = module.CrossBatchMemory(loss, 8, memory_size=40)
    return memory if kind == "CrossBatchMemory" else losses.MultipleLosses([memory, loss])


KINDS = ["SelfSupervisedLoss", "MultipleLosses", "CrossBatchMemory", "memory in several"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["import", "patch", "accelerate"])
def test_wrappers_hold_fused_losses(name: str, kind: str, way: str) -> None:
    x, y = example()
    theirs = wrapped(losses, kind, name)
    if way == "accelerate":
        mine = wrapped(losses, kind, name)
        if kind == "SelfSupervisedLoss":
            wrapper = clk.accelerate(losses.SelfSupervisedLoss(getattr(losses, name)(temperature=0.2)))
            mine = lambda x, y: wrapper(x, x.flip(0))  # noqa: E731
        else:
            mine = clk.accelerate(mine)
    else:
        mine = wrapped(ours if way == "import" else losses, kind, name)
    wanted = [theirs(x * (1 + step), y) for step in range(3)]
    patch = (
        clk.patch("pytorch_metric_learning", verbose=False) if way == "patch" else contextlib.nullcontext()
    )
    memories = fused("CrossBatchMemory", 3 if "emory" in kind else 0)
    with patch, memories, fused(name, 6 if kind == "memory in several" else 3):
        found = [mine(x * (1 + step), y) for step in range(3)]
    for one, other in zip(wanted, found, strict=True):
        assert torch.allclose(one, other, rtol=1e-12)
        one, other = (torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (one, other))
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-14)


def test_library_memory_with_our_loss_runs_fused_on_its_pairs() -> None:
    x, y = example()
    for name in NAMES:
        memories = [losses.CrossBatchMemory(getattr(m, name)(), 8, memory_size=50) for m in (losses, ours)]
        with fused(name, 2):
            assert_same(*memories, x, y)
            assert_same(*memories, x, y)


@pytest.mark.parametrize("mask", [False, True])
def test_memory_keeps_the_librarys_state(mask: bool) -> None:
    x, y = example()
    theirs, mine = (m.CrossBatchMemory(m.NTXentLoss(), 8, memory_size=40) for m in (losses, ours))
    chosen = y % 2 == 0 if mask else None
    for step in range(5):
        found = [memory(x.float() + step, y + step, enqueue_mask=chosen) for memory in (theirs, mine)]
        assert torch.allclose(*found, rtol=1e-6)
        for name in ("embedding_memory", "label_memory", "curr_batch_idx"):
            assert torch.equal(getattr(theirs, name), getattr(mine, name))
        assert (theirs.queue_idx, theirs.has_been_filled) == (mine.queue_idx, mine.has_been_filled)
    mine.load_state_dict(theirs.state_dict())
    mine.reset_queue()
    assert mine.queue_idx == 0 and not mine.embedding_memory.any()


def test_memory_with_a_miner_runs_as_the_library_has_it(caplog: pytest.LogCaptureFixture) -> None:
    x, y = example()
    miner = miners.TripletMarginMiner(margin=0.4)
    theirs, mine = (
        m.CrossBatchMemory(m.NTXentLoss(), 8, memory_size=40, miner=miner) for m in (losses, ours)
    )
    integrations._swap._said.clear()
    with caplog.at_level(logging.WARNING, "cl_kernels.integrations"):
        assert_same(theirs, mine, x, y)
    assert "a miner chooses the pairs" in caplog.text


@pytest.mark.parametrize("own", [None, 0, 5, 16])
def test_all_pairs_are_the_librarys_indices(own: int | None) -> None:
    labels, refs = torch.arange(8) % 3, torch.arange(20) % 3
    pairs = ours.AllPairs(labels, refs, own)
    wanted = lmu.get_all_pairs_indices(labels, refs)
    if own is not None:
        wanted = lmu.remove_self_comparisons(wanted, (torch.arange(8) + own) % 20, 20)
    assert len(pairs) == 4
    for found, want in zip(pairs, wanted, strict=True):
        assert torch.equal(found, want)
    assert torch.equal(pairs[1], wanted[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [1, 50])
def test_chunks_are_computed_again(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_pairs.SIZES, "cpu", _pairs.Sizes(rows=7, columns=11, chunk=chunk))
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", chunk)
    x, y = example(classes=4)
    y[:3] = 9  # three in a class, between others
    for options in ({}, {"reducer": reducers.PerAnchorReducer()}):
        theirs, mine = (getattr(m, name)(**options) for m in (losses, ours))
        with fused(name, 2):
            assert_same(theirs, mine, x, y)
            pairs = [part[::5] for part in lmu.get_all_pairs_indices(y)]
            assert_same(lambda x: theirs(x, None, pairs), lambda x: mine(x, None, pairs), x)  # noqa: B023


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [30, 2**20])
def test_second_derivatives(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_pairs.SIZES, "cpu", _pairs.Sizes(rows=4, columns=4, chunk=chunk))
    x, y = example(rows=9, width=3, classes=2)
    grads = []
    for module in (losses, ours):
        loss = getattr(module, name)(temperature=0.5, reducer=reducers.SumReducer())
        (grad,) = torch.autograd.grad(loss(x, y), x, create_graph=True)
        grads.append(torch.autograd.grad((grad**2).sum(), x)[0])
    assert torch.allclose(*grads, rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [30, 2**20])
def test_a_learned_temperature_gets_its_gradient(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_pairs.SIZES, "cpu", _pairs.Sizes(rows=7, columns=11, chunk=chunk))
    x, y = example()
    found = []
    for module in (losses, ours):
        tau = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        loss = getattr(module, name)(temperature=tau)(x, y)
        found.append(torch.autograd.grad(loss, tau)[0])
    assert torch.allclose(*found, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_references_without_gradient_and_gradients_of_references_alone(name: str) -> None:
    (x, y), (refs, _) = example(), example(30, seed=1)
    theirs, mine = (getattr(m, name)() for m in (losses, ours))

    def of(loss: Any) -> Callable[..., Tensor]:
        return lambda x, refs: loss(x, y, ref_emb=refs, ref_labels=torch.arange(30) % 4)

    with fused(name, 2):
        assert_same(of(theirs), of(mine), x, refs.detach())
        assert_same(of(theirs), of(mine), x.detach(), refs)
    with torch.no_grad():
        assert not mine(x, y).requires_grad


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("labels", [torch.arange(6), torch.zeros(6, dtype=torch.int64)], ids=["none", "all"])
def test_without_positives_or_negatives(
    name: str, readable: bool, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`readable` False: as on a GPU, which is not asked where the reducer cannot tell."""
    monkeypatch.setattr(validation, "readable", lambda x: readable)
    x, _ = example(6)
    for reducer in (reducers.MeanReducer(), reducers.ThresholdReducer(high=9.0), None):
        loss = getattr(ours, name)(reducer=reducer)
        assert_same(getattr(losses, name)(reducer=reducer), loss, x, labels)
        assert loss(x, labels) == 0
    found = getattr(ours, name)(reducer=reducers.DoNothingReducer())(x, labels)
    assert found == {"loss": {"losses": 0, "indices": None, "reduction_type": "already_reduced"}}


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_recorded(name: str) -> None:
    x, y = example()
    seen = []
    for module in (losses, ours):
        loss = getattr(module, name)(
            distance=distances.CosineSimilarity(collect_stats=True),
            reducer=reducers.AvgNonZeroReducer(collect_stats=True),
            collect_stats=True,
        )
        loss(x, y)
        of_distance = [loss.distance.initial_avg_query_norm, loss.distance.final_avg_ref_norm]
        reducer = loss.reducer
        seen.append([*of_distance, reducer.losses_size, reducer.num_past_filter, reducer.num_above_low])
        mean = getattr(module, name)(reducer=reducers.MeanReducer(collect_stats=True))
        mean(x, y)
        seen[-1].append(mean.reducer.losses_size)
    assert seen[0] == seen[1] and all(seen[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_inputs_and_autocast(name: str, dtype: torch.dtype, autocast: bool) -> None:
    x, y = example()
    exact = getattr(losses, name)(temperature=0.3)(x, y)
    x = x.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), fused(name):
        theirs, mine = (getattr(m, name)(temperature=0.3)(x, y) for m in (losses, ours))
    assert mine.dtype == theirs.dtype
    assert abs(mine - exact) <= max(2 * abs(theirs - exact), 8e-3 * exact)
    mine.backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()


def test_errors_are_the_librarys(patched: None) -> None:
    x, y = example()
    for name in NAMES:
        loss = getattr(losses, name)()
        with pytest.raises(ValueError, match="cannot both be None"):
            loss(x)
        with pytest.raises(ValueError, match="must equal number of labels"):
            loss(x, y[1:])
        with pytest.raises(ValueError, match="2D tensor"):
            loss(x[:, None], y)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            loss(x, y, ref_emb=x[:, 1:], ref_labels=y)
    with pytest.raises(Exception, match="not supported for TripletMarginLosses"):
        losses.CrossBatchMemory.check_loss_support("TripletMarginLosses")


def test_pairs_that_are_both_positive_and_negative_are_left_to_the_library() -> None:
    x, _ = example()
    index = torch.arange(4)
    both_ways = (index, index + 1, index, index + 1)
    if hasattr(losses.SupConLoss, "_assert_either_pos_or_neg"):  # from 2.9 on
        with pytest.raises(AssertionError, match="positive or negative"):
            ours.SupConLoss()(x, None, both_ways)
    else:
        theirs, mine = losses.SupConLoss(), ours.SupConLoss()
        assert_same(lambda x: theirs(x, None, both_ways), lambda x: mine(x, None, both_ways), x)


class Doubled(losses.SupConLoss):
    def _compute_loss(self, mat: Tensor, pos_mask: Tensor, neg_mask: Tensor) -> Any:
        return super()._compute_loss(mat * 2, pos_mask, neg_mask)


class Other(distances.CosineSimilarity):
    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return super().compute_mat(query_emb, ref_emb) - 1


def test_what_is_not_fused_says_why(patched: None, caplog: pytest.LogCaptureFixture) -> None:
    x, y = example()
    integrations._swap._said.clear()
    cases = {
        "Doubled has a _compute_loss of its own": (Doubled(), x, y),
        "the distance is Other": (losses.SupConLoss(distance=Other()), x, y),
        "LpDistance is a dot product for p=2 and power=2 only": (
            losses.NTXentLoss(distance=distances.LpDistance()), x, y,
        ),
        "labels are not integers": (losses.NTXentLoss(), x, y.double()),
        "temperature must be": (losses.SupConLoss(temperature=-0.1), x, y),
    }  # fmt: skip
    before = {name: ran(TARGET.format(name)) for name in NAMES}
    with caplog.at_level(logging.WARNING, "cl_kernels.integrations"):
        for loss, *inputs in cases.values():
            assert loss(*inputs).isfinite()
    for reason in cases:
        assert reason in caplog.text
    after = {name: ran(TARGET.format(name)) for name in NAMES}
    assert sum(after[name].fallback - before[name].fallback for name in NAMES) == len(cases)
    assert all(after[name].fused == before[name].fused for name in NAMES)


def test_unpatch_leaves_the_classes_as_they_were() -> None:
    kinds = (
        losses.SupConLoss,
        losses.NTXentLoss,
        losses.CrossBatchMemory,
        distributed.DistributedLossWrapper,
    )
    before = [dict(vars(kind)) for kind in kinds]
    with clk.patch("pytorch_metric_learning", verbose=False) as patch:
        assert len(patch.swapped) == 4
        assert "compute_loss" in vars(losses.SupConLoss)
    assert [dict(vars(kind)) for kind in kinds] == before


def _wrapper(module: Any, name: str, kind: str) -> Any:
    loss = getattr(module, name)(temperature=0.3)
    if kind == "memory":
        loss = module.CrossBatchMemory(loss, 8, memory_size=40)
    made = ours if module is ours else distributed
    return made.DistributedLossWrapper(loss, efficient=kind.startswith("efficient"))


REFERENCES = ("whole, references", "efficient, references")
DISTRIBUTED = ("whole", "efficient", "efficient, one row", "memory", *REFERENCES)


def _steps(rank: int) -> dict[tuple[str, str], list[list[Tensor]]]:
    return {(name, kind): _both(rank, name, kind) for name in NAMES for kind in DISTRIBUTED}


def _both(rank: int, name: str, kind: str) -> list[list[Tensor]]:
    """Losses and gradients of three steps, theirs and ours."""
    found = []
    with fused(name, 3):
        for module in (losses, ours):
            wrapper, values = _wrapper(module, name, kind), []
            for step in range(3):
                x, labels = example(10, seed=rank + 2 * step)
                refs, ref_labels = example(10, seed=100 + rank)
                args = [refs, ref_labels] if kind.endswith("references") else []
                if kind.endswith("one row"):
                    x, labels = x[:1].detach().requires_grad_(), labels[:1]
                loss = wrapper(x, labels, None, *args)
                loss.backward()
                values += [loss.detach(), x.grad]
            found.append(values)
    dist.barrier()
    return found


def test_over_processes(tmp_path: Path) -> None:
    for result in in_group(2, _steps, tmp_path):
        assert isinstance(result, dict), result
        for case, (theirs, mine) in result.items():
            for one, other in zip(theirs, mine, strict=True):
                assert torch.allclose(one, other, rtol=1e-10, atol=1e-14), case
