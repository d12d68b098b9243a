"""KeyQueue, and the losses that take it: its rows that count, and no others."""

from __future__ import annotations

import collections
import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparisons import unit
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import cl_kernels as clk
from cl_kernels import reference
from cl_kernels.losses._common import CHUNK_LOGITS

pytestmark = pytest.mark.usefixtures("backend", "one_thread")

D, SIZE = 5, 8
LEVELS = {"filling": (3, 2), "full": (5, 3), "in mid-wrap": (3, 5, 6)}  # batches before


def numbered(first: int, n: int) -> tuple[Tensor, Tensor]:
    """Keys and labels that tell which rows they are."""
    labels = torch.arange(first, first + n)
    return labels[:, None].expand(n, D).float(), labels


def filled(level: str, dtype: torch.dtype = torch.float64, **options: Any) -> clk.KeyQueue:
    """A queue with labels, whose rows that do not count are NaN."""
    queue = clk.KeyQueue(SIZE, D, labels=True, dtype=dtype, **options)
    queue.keys.fill_(torch.nan)
    for n in LEVELS.get(level, ()):
        queue.enqueue(unit(n, D), torch.randint(0, 4, (n,)))
    return queue


def assert_same_state(queue: clk.KeyQueue, other: clk.KeyQueue) -> None:
    assert len(queue) == len(other)
    for name, buffer in queue.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name)), name


# The queue


@pytest.mark.parametrize(
    "batches",
    [(3, 3, 3, 3, 2, 3), (4, 4, 4, 4), (8, 1, 8), (3, 0, 20, 1, 9), (17,), (1,) * 19],
    ids=str,
)
def test_the_last_rows_count(batches: tuple[int, ...]) -> None:
    queue = clk.KeyQueue(SIZE, D, labels=True)
    wanted: collections.deque[int] = collections.deque(maxlen=SIZE)
    for n in batches:
        keys, labels = numbered(100 * len(wanted) + 1, n)
        queue.enqueue(keys, labels)
        wanted.extend(labels.tolist())
        assert len(queue) == len(wanted) == queue.filled.shape[0]
        assert queue.filled_labels is not None
        assert sorted(queue.filled_labels.tolist()) == sorted(wanted)
        assert (queue.filled == queue.filled_labels[:, None]).all()
        assert (queue.filled.data_ptr(), queue.filled.stride()) == (queue.keys.data_ptr(), (D, 1))
        if len(wanted) == SIZE:
            assert queue.filled_labels[queue.position] == wanted[0]


def test_batches_in_pieces() -> None:
    pieces, whole = (clk.KeyQueue(SIZE, D, labels=True) for _ in range(2))
    for first, sizes in ((1, (2, 3)), (6, (1, 20, 4)), (31, (8,)), (39, (3, 3, 3))):
        whole.enqueue(*numbered(first, sum(sizes)))
        for n in sizes:
            pieces.enqueue(*numbered(first, n))
            first += n
        assert_same_state(pieces, whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keys_are_copies_without_gradient_in_the_dtype_of_the_queue(dtype: torch.dtype) -> None:
    queue = clk.KeyQueue(SIZE, D, dtype=dtype)
    keys = unit(D, 3).T.requires_grad_()  # not contiguous
    with torch.no_grad():
        keys[1, 2] = torch.nan
    queue.enqueue(keys)
    expected = keys.detach().to(dtype, copy=True)
    with torch.no_grad():
        keys.zero_()
    assert not queue.filled.requires_grad
    assert torch.equal(queue.filled.nan_to_num(9), expected.nan_to_num(9))
    assert queue.filled.isnan().sum() == 1


def test_labels_of_any_integers() -> None:
    queue = clk.KeyQueue(SIZE, D, labels=True)
    queue.enqueue(unit(2, D), torch.tensor([[True], [False]]))
    queue.enqueue(unit(2, D), torch.tensor([7, 2**31 - 1], dtype=torch.int32))
    assert queue.filled_labels is not None and queue.filled_labels.tolist() == [1, 0, 7, 2**31 - 1]


def test_dtype_and_device_follow_the_module() -> None:
    queue = nn.ModuleDict({"queue": filled("in mid-wrap")}).half()["queue"]
    assert isinstance(queue, clk.KeyQueue)
    assert queue.keys.dtype == torch.float16
    assert queue.labels is not None and queue.labels.dtype == torch.int64
    assert repr(queue) == "KeyQueue(8, 5, labels=True, dtype=torch.float16)"
    assert clk.KeyQueue(2, 3).keys.dtype == torch.float32
    assert [len(queue), queue.position.item()] == [SIZE, 6]
    on_meta = clk.KeyQueue(SIZE, D, device="meta")
    on_meta.enqueue(torch.ones(3, D, device="meta"))
    assert on_meta.filled.shape == (3, D) and on_meta.filled.is_meta
    on_meta.reset()
    empty = on_meta.to_empty(device="cpu")
    empty.enqueue(*numbered(1, 9)[:1])
    assert sorted(empty.filled[:, 0].tolist()) == list(range(2, 10))


def test_reset() -> None:
    queue, fresh = filled("in mid-wrap"), clk.KeyQueue(SIZE, D, labels=True, dtype=torch.float64)
    queue.reset()
    assert len(queue) == 0 and queue.filled.shape == (0, D)
    for x in (queue, fresh):
        x.enqueue(*numbered(1, 3))
    assert torch.equal(queue.filled, fresh.filled) and torch.equal(queue.position, fresh.position)


@pytest.mark.parametrize("level", ["", *LEVELS])
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle", "assigned"])
def test_it_goes_on_as_if_it_had_not_been_interrupted(level: str, how: str) -> None:
    queue = filled(level)
    if how == "deepcopy":
        other = copy.deepcopy(queue)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(queue))
    else:
        file = io.BytesIO()
        torch.save(nn.ModuleList([queue]).state_dict(), file)
        file.seek(0)
        other = clk.KeyQueue(SIZE, D, labels=True, dtype=torch.float64)
        other.enqueue(unit(7, D), torch.arange(7))
        nn.ModuleList([other]).load_state_dict(torch.load(file), assign=how == "assigned")
    assert queue.keys.data_ptr() != other.keys.data_ptr()
    for n in (0, 4, 3, 11, 2):
        if n:
            batch = unit(n, D), torch.arange(n)
            queue.enqueue(*batch)
            other.enqueue(*batch)
        assert len(queue) == len(other)
        for x, y in zip(queue.buffers(), other.buffers(), strict=True):
            assert torch.equal(x.nan_to_num(9), y.nan_to_num(9))


def test_states_that_do_not_fit() -> None:
    state = filled("filling").state_dict()
    for wrong in (clk.KeyQueue(SIZE + 1, D, labels=True), clk.KeyQueue(SIZE, D + 1, labels=True)):
        with pytest.raises(RuntimeError, match="size mismatch for keys"):
            wrong.load_state_dict(state)
        assert len(wrong) == 0
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"labels"'):
        clk.KeyQueue(SIZE, D).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Missing key.*"labels"'):
        clk.KeyQueue(SIZE, D, labels=True).load_state_dict(clk.KeyQueue(SIZE, D).state_dict())


@pytest.mark.parametrize(
    ("error", "match", "make"),
    [
        (TypeError, "size must be an integer", lambda: clk.KeyQueue(8.0, 2)),
        (ValueError, "size must be an integer of at least 1", lambda: clk.KeyQueue(0, 2)),
        (ValueError, "width must be an integer of at least 1", lambda: clk.KeyQueue(8, -1)),
        (TypeError, "labels must be True or False", lambda: clk.KeyQueue(8, 2, labels=torch.zeros(8))),
        (TypeError, "dtype must be float16, .*int32", lambda: clk.KeyQueue(8, 2, dtype=torch.int32)),
        (TypeError, "group must be None or a .*ProcessGroup", lambda: clk.KeyQueue(8, 2, group="world")),
    ],
)  # fmt: skip
def test_constructor(error: type[Exception], match: str, make: Callable[[], Any]) -> None:
    with pytest.raises(error, match=match):
        make()


KEYS, LABELS = torch.ones(3, D), torch.arange(3)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "keys must be a torch.Tensor, got list", ([[1.0]], LABELS)),
        (TypeError, "keys must be float16, .* got torch.int64", (KEYS.long(), LABELS)),
        (ValueError, r"keys must have shape \[N, D\], got \(5,\)", (KEYS[0], LABELS)),
        (ValueError, r"keys must have as many features as queue \(5\)", (KEYS[:, :4], LABELS)),
        (ValueError, r"keys must be on the device of queue \(cpu\)", (KEYS.to("meta"), LABELS)),
        (ValueError, "labels must be given for a KeyQueue with labels", (KEYS,)),
        (TypeError, "labels must be a torch.Tensor, got list", (KEYS, [0, 1, 2])),
        (TypeError, "labels must be integers or booleans, got torch.float32", (KEYS, LABELS.float())),
        (ValueError, r"labels must have shape \[3\]", (KEYS, LABELS[:2])),
        (ValueError, "labels must be on the device of queue", (KEYS, LABELS.to("meta"))),
    ],
)
def test_wrong_batches_change_nothing(error: type[Exception], match: str, arguments: tuple[Any, ...]) -> None:
    queue = filled("in mid-wrap")
    before = copy.deepcopy(queue)
    with pytest.raises(error, match=match):
        queue.enqueue(*arguments)
    assert_same_state(queue, before)


def test_labels_of_a_queue_without() -> None:
    queue = clk.KeyQueue(SIZE, D)
    with pytest.raises(ValueError, match="labels must be None for a KeyQueue without labels"):
        queue.enqueue(KEYS, LABELS)
    assert len(queue) == 0 and queue.filled_labels is None


# The losses


def plain_info_nce(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ rows.T], 1) / 0.2
    return F.cross_entropy(logits, torch.zeros(q.shape[0], dtype=torch.int64))


def plain_sce(q: Tensor, k: Tensor, rows: Tensor, everyone: bool = False) -> Tensor:
    """Also with the keys of the batch beside the rows."""
    keys = [torch.cat([k if everyone else k[i : i + 1], rows]) for i in range(len(q))]
    positive = torch.arange(len(q)) if everyone else torch.zeros(len(q), dtype=torch.int64)
    student = torch.stack([u @ x for u, x in zip(keys, q, strict=True)]) / 0.2
    teacher = torch.stack([u @ x for u, x in zip(keys, k, strict=True)]) / 0.1
    onehot = F.one_hot(positive, student.shape[1]).to(q)
    target = teacher.masked_fill(onehot.bool(), -torch.inf).softmax(1)
    weights = 0.4 * onehot + 0.6 * target if student.shape[1] > 1 else onehot
    return -(weights * student.log_softmax(1)).sum(1).mean()


def plain_supcon(
    features: Tensor, labels: Tensor, rows: Tensor, row_labels: Tensor, summation: str, denominator: str
) -> Tensor:
    z, own = features.transpose(0, 1).flatten(0, 1), labels.repeat(features.shape[1])
    columns, marks = torch.cat([z, rows]), torch.cat([own, row_labels])
    losses = []
    for i, anchor in enumerate(z):
        others = torch.arange(len(columns)) != i
        positive = others & (marks == own[i])
        logits, terms = columns @ anchor / 0.2, []
        for p in positive.nonzero().flatten():
            included = others & ~positive if denominator != "all" else others.clone()
            if denominator == "one_positive":
                included[p] = True
            if included.any():
                terms.append(logits[p] - logits[included].logsumexp(0))
        if not terms:
            losses.append(0 * anchor.sum())
        elif summation == "out":
            losses.append(-torch.stack(terms).mean())
        else:
            losses.append(math.log(len(terms)) - torch.stack(terms).logsumexp(0))
    return torch.stack(losses).mean() * (0.2 / 0.07)


SOFT = {"temperature": 0.2, "target_temperature": 0.1, "coeff": 0.4}


def assert_equal_gradients(ours: Tensor, plain: Tensor, leaves: list[Tensor], rtol: float = 1e-11) -> None:
    grads, expected = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (ours, plain))
    for found, wanted in ((ours, plain), *zip(grads, expected, strict=True)):
        torch.testing.assert_close(found, wanted.to(found), rtol=rtol, atol=rtol)


def double(*shape: int) -> Tensor:
    return unit(*shape, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("level", ["", *LEVELS])
def test_info_nce(level: str) -> None:
    q, k, queue = double(4, D), double(4, D), filled(level)
    loss = clk.info_nce_loss(q, k, queue, temperature=0.2)
    assert_equal_gradients(loss, plain_info_nce(q, k, queue.filled), [q, k])
    assert torch.equal(clk.InfoNCELoss(0.2)(q, k, queue), loss)
    assert_equal_gradients(reference.info_nce_loss(q, k, queue, temperature=0.2), loss, [q, k])


@pytest.mark.parametrize("everyone", [False, True])
@pytest.mark.parametrize("level", ["", *LEVELS])
def test_sce(level: str, everyone: bool) -> None:
    q, k, queue = double(4, D), double(4, D), filled(level)
    gathered = k if everyone else None
    loss = clk.sce_loss(q, k, gathered, queue, **SOFT)
    assert_equal_gradients(loss, plain_sce(q, k, queue.filled, everyone), [q, k])
    assert torch.equal(clk.SCELoss(*SOFT.values())(q, k, gathered, queue), loss)
    assert_equal_gradients(reference.sce_loss(q, k, gathered, queue, **SOFT), loss, [q, k])
    k = k.detach()
    gathered = k if everyone else None
    targets = clk.sce_targets(k, gathered, queue, target_temperature=0.1)
    shared = clk.sce_loss(q, k, gathered, queue, temperature=0.2, coeff=0.4, targets=targets)
    assert_equal_gradients(shared, loss, [q])


@pytest.mark.parametrize("level", ["", *LEVELS])
@pytest.mark.parametrize("denominator", ["all", "only_negatives", "one_positive"])
@pytest.mark.parametrize("summation", ["out", "in"])
def test_supcon(summation: str, denominator: str, level: str) -> None:
    features, labels, queue = double(4, 2, D), torch.tensor([0, 1, 0, 5]), filled(level)
    options = {"temperature": 0.2, "summation": summation, "denominator": denominator}
    assert queue.filled_labels is not None
    plain = plain_supcon(features, labels, queue.filled, queue.filled_labels, summation, denominator)
    loss = clk.supcon_loss(features, labels, memory=queue, **options)
    assert_equal_gradients(loss, plain, [features])
    assert torch.equal(clk.SupConLoss(**options)(features, labels, None, queue), loss)
    assert_equal_gradients(reference.supcon_loss(features, labels, memory=queue, **options), loss, [features])
    if not level:
        assert torch.equal(loss, clk.supcon_loss(features, labels, **options))
        return
    keys = queue.filled.clone().requires_grad_()
    plain = plain_supcon(features, labels, keys, queue.filled_labels, summation, denominator)
    for module in (clk, reference):
        loss = module.supcon_loss(features, labels, memory=(keys, queue.filled_labels), **options)
        assert_equal_gradients(loss, plain, [features, keys])


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("denominator", ["all", "only_negatives", "one_positive"])
@pytest.mark.parametrize("summation", ["out", "in"])
def test_supcon_with_nothing_in_the_batch_or_in_the_memory(
    summation: str, denominator: str, samples: int
) -> None:
    """No other row, no positives, or no negatives in one of the two or in both."""
    features = double(samples, 1, D)
    options = {"temperature": 0.2, "summation": summation, "denominator": denominator}
    for labels, marks in itertools.product(([0, 0, 0], [0, 1, 2]), ([0], [1], [5], [0, 0, 1], [5, 6, 7])):
        own, other, keys = torch.tensor(labels[:samples]), torch.tensor(marks), double(len(marks), D)
        plain = plain_supcon(features, own, keys, other, summation, denominator)
        loss = clk.supcon_loss(features, own, memory=[keys, other], **options)
        assert_equal_gradients(loss, plain + 0 * keys.sum(), [features, keys])


@pytest.mark.parametrize(
    "options", [{"contrast_mode": "one"}, {"no_positive": "drop"}, {"reduction": "none"}]
)
def test_supcon_options(options: dict[str, Any]) -> None:
    features, labels, queue = double(4, 2, D)[:, :1], torch.tensor([0, 1, 0, 5]), filled("filling")
    if "contrast_mode" in options:
        features = double(4, 3, D)
    loss = clk.supcon_loss(features, labels, memory=queue, **options)
    torch.testing.assert_close(loss, reference.supcon_loss(features, labels, memory=queue, **options))
    if "contrast_mode" in options:
        first, rest = features[:, :1], features[:, 1:].transpose(0, 1).flatten(0, 1)
        both = torch.cat([rest, queue.filled]), torch.cat([labels, labels, queue.filled_labels])
        torch.testing.assert_close(loss, clk.supcon_loss(first, labels, memory=both))


@pytest.mark.parametrize("marks", [torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [torch.int32, torch.float32, torch.float64])
def test_labels_of_several_kinds(kind: torch.dtype, marks: torch.dtype) -> None:
    features, labels, keys = unit(4, 2, D), torch.tensor([0, 1, 0, 5]), unit(5, D)
    key_labels = torch.tensor([1, 5, 0, 2, 1])
    expected = clk.supcon_loss(features, labels, memory=(keys, key_labels))
    assert torch.equal(
        clk.supcon_loss(features, labels.to(kind), memory=(keys, key_labels.to(marks))), expected
    )
    if kind.is_floating_point and marks.is_floating_point:
        labels, key_labels = labels.to(kind), key_labels.to(marks)
        labels[1] = key_labels[0] = torch.nan  # equal to nothing, not to each other
        loss = clk.supcon_loss(features, labels, memory=(keys, key_labels))
        torch.testing.assert_close(loss, reference.supcon_loss(features, labels, memory=(keys, key_labels)))
        labels[1], key_labels[0] = 77, 78
        single = features[:, :1]
        torch.testing.assert_close(
            clk.supcon_loss(single, labels.masked_fill(labels == 77, torch.nan), memory=(keys, key_labels)),
            clk.supcon_loss(single, labels, memory=(keys, key_labels)),
        )


@pytest.mark.parametrize("place", ["positive", "negative"])
@pytest.mark.parametrize("denominator", ["all", "only_negatives", "one_positive"])
@pytest.mark.parametrize("summation", ["out", "in"])
def test_nan_in_a_memory(summation: str, denominator: str, place: str) -> None:
    """It is NaN in the rows that it takes part in."""
    features, labels, keys = unit(4, 1, D), torch.tensor([0, 1, 0, 5]), unit(3, D)
    keys[1, 2] = torch.nan
    memory = keys, torch.tensor([0, 1 if place == "positive" else 8, 0])
    options = {"summation": summation, "denominator": denominator, "reduction": "none"}
    loss = clk.supcon_loss(features, labels, memory=memory, **options)
    expected = reference.supcon_loss(features, labels, memory=memory, **options)
    assert torch.equal(loss.isnan(), expected.isnan())
    assert loss[1].isnan() if place == "positive" else loss[0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, stored: torch.dtype) -> None:
    """The queue's rows as they were rounded, in the common dtype of all."""
    q, k, queue = unit(6, D, dtype=dtype), unit(6, D, dtype=dtype), filled("in mid-wrap", stored)
    labels = torch.arange(6) % 3
    rows, marks = queue.filled.double(), queue.filled_labels
    assert marks is not None
    tolerance = (
        {"rtol": 2e-2, "atol": 2e-2} if torch.float32 != dtype == stored else {"rtol": 1e-5, "atol": 1e-5}
    )
    for loss, plain in (
        (clk.info_nce_loss(q, k, queue, temperature=0.2), plain_info_nce(q.double(), k.double(), rows)),
        (clk.sce_loss(q, k, queue=queue, **SOFT), plain_sce(q.double(), k.double(), rows)),
        (
            clk.supcon_loss(q[:, None], labels, memory=queue, temperature=0.2),
            plain_supcon(q[:, None].double(), labels, rows, marks, "out", "all"),
        ),
    ):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), plain, **tolerance)


def test_beside_an_empty_queue_the_loss_is_0_in_the_graph() -> None:
    q, k = unit(4, D).requires_grad_(), unit(4, D).requires_grad_()
    tau, target_tau, coeff = (torch.tensor(x, requires_grad=True) for x in (0.1, 0.2, 0.3))
    queue = clk.KeyQueue(SIZE, D)
    options = {"temperature": tau, "reduction": "none"}
    soft = {**options, "target_temperature": target_tau, "coeff": coeff}
    for loss, leaves in (
        (clk.info_nce_loss(q, k, queue, **options), [q, k, tau]),
        (clk.sce_loss(q, k, queue=queue, **soft), [q, k, tau, target_tau, coeff]),
    ):
        assert torch.equal(loss, torch.zeros(4))
        assert all((x == 0).all() for x in torch.autograd.grad(loss.sum(), leaves))
    frozen = k.detach()
    targets = clk.sce_targets(frozen, queue=queue)
    assert targets.lse.tolist() == [-torch.inf] * 4 and targets.mean.eq(0).all()
    loss = clk.sce_loss(q, frozen, queue=queue, temperature=tau, coeff=coeff, targets=targets)
    assert all((x == 0).all() for x in (loss, *torch.autograd.grad(loss, [q, tau, coeff])))
    q = q.detach().clone()
    q[1] = torch.nan
    assert clk.info_nce_loss(q, k, queue, reduction="none").isnan().tolist() == [False, True, False, False]
    assert clk.sce_loss(q, k, queue=queue, reduction="none").isnan().tolist() == [False, True, False, False]


def info_nce(q: Tensor, k: Tensor, queue: clk.KeyQueue) -> Tensor:
    return clk.info_nce_loss(q, k, queue)


def sce(q: Tensor, k: Tensor, queue: clk.KeyQueue) -> Tensor:
    return clk.sce_loss(q, k, queue=queue)


def gathered_sce(q: Tensor, k: Tensor, queue: clk.KeyQueue) -> Tensor:
    return clk.sce_loss(q, k, k, queue)


def shared_targets(q: Tensor, k: Tensor, queue: clk.KeyQueue) -> Tensor:
    return clk.sce_loss(q, k, queue=queue, targets=clk.sce_targets(k, queue=queue))


def supcon(q: Tensor, k: Tensor, queue: clk.KeyQueue) -> Tensor:
    return clk.supcon_loss(torch.stack([q, k], 1), torch.arange(len(q)) % 3, memory=queue)


def supcon_in(q: Tensor, k: Tensor, queue: clk.KeyQueue) -> Tensor:
    return clk.supcon_loss(q[:, None], torch.arange(len(q)) % 3, memory=queue, summation="in")


def supcon_in_chunks(q: Tensor, k: Tensor, queue: clk.KeyQueue) -> Tensor:
    labels = torch.arange(len(q)) % 3
    return clk.supcon_loss(q[:, None], labels, memory=queue, denominator="one_positive")


TAKERS = (info_nce, sce, gathered_sce, shared_targets, supcon, supcon_in, supcon_in_chunks)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss", TAKERS)
def test_an_enqueue_between_forward_and_backward_changes_nothing(
    loss: Callable[..., Tensor], level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", 40)
    results = []
    queue = filled(level, torch.float32)
    q, k = unit(6, D).requires_grad_(), unit(6, D)
    for enqueue in (False, True):
        value = loss(q, k, queue)
        if enqueue:
            queue.enqueue(k, torch.arange(6))
            k.zero_()
        results.append([value.detach(), *torch.autograd.grad(value, q)])
    assert all(map(torch.equal, *results))


def test_supcon_in_chunks_of_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, queue = double(6, D), double(6, D), filled("in mid-wrap")
    whole = supcon_in_chunks(q, k, queue)
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", 40)
    assert_equal_gradients(supcon_in_chunks(q, k, queue), whole, [q])


def test_derivatives_of_a_memory() -> None:
    features, keys = double(3, 2, D), double(4, D)
    labels, key_labels = torch.tensor([0, 1, 0]), torch.tensor([1, 0, 2, 2])

    def loss(features: Tensor, keys: Tensor) -> Tensor:
        return clk.supcon_loss(features, labels, memory=(keys, key_labels), temperature=0.5)

    assert torch.autograd.gradcheck(loss, (features, keys))
    assert torch.autograd.gradgradcheck(loss, (features, keys))
    found = torch.func.grad(loss, argnums=(0, 1))(features, keys)
    for x, y in zip(found, torch.autograd.grad(loss(features, keys), (features, keys)), strict=True):
        torch.testing.assert_close(x, y)


# Compiled


@pytest.mark.parametrize("loss", TAKERS)
def test_losses_under_compile(loss: Callable[..., Tensor], backend: str) -> None:
    """As the queue fills, and when it is full, from which on nothing is compiled."""
    if backend == "reference" and loss is not info_nce:
        pytest.skip("the losses are traced alike on every backend")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    queue = filled("", torch.float32)
    q, k = unit(4, D).requires_grad_(), unit(4, D)
    graphs = []
    for n in (2, 3, 3, 5, 3):
        values = compiled(q, k, queue), loss(q, k, queue)
        grads = [torch.autograd.grad(value, q)[0] for value in values]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*grads)
        queue.enqueue(unit(n, D), torch.arange(n))
        graphs.append(counter.frame_count)
    assert graphs[3:] == [graphs[3]] * 2


def test_filling_compiles_one_graph_for_any_number_of_rows(backend: str) -> None:
    if backend == "reference":
        pytest.skip("chunks of another size are another graph")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(info_nce, fullgraph=True, backend=counter)
    queue = clk.KeyQueue(40, D)
    q, k = unit(4, D).requires_grad_(), unit(4, D)
    for _ in range(16):
        torch.testing.assert_close(compiled(q, k, queue), info_nce(q, k, queue))
        queue.enqueue(unit(3, D))
    assert counter.frame_count <= 4  # no rows, the first ones, any number of them, all


@pytest.mark.parametrize("labels", [False, True])
def test_enqueue_under_compile(labels: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda queue, *batch: queue.enqueue(*batch), fullgraph=True, backend=counter)
    queue, eager = (clk.KeyQueue(16, D, labels=labels) for _ in range(2))
    graphs = []
    for i in range(30):
        batch = (unit(3, D), torch.arange(3) + i)[: 1 + labels]
        compiled(queue, *batch)
        eager.enqueue(*batch)
        assert_same_state(queue, eager)
        graphs.append(counter.frame_count)
    assert graphs[-1] <= 3 and graphs[6] == graphs[-1]  # 16 rows are full after 6
    full = copy.deepcopy(eager)
    torch._dynamo.reset()
    counter.clear()
    for i in range(5):
        compiled(full, *(unit(3, D), torch.arange(3) + i)[: 1 + labels])
    assert counter.frame_count == 1


def test_a_step_under_compile() -> None:
    """The loss, and the enqueue before its backward."""
    torch._dynamo.reset()
    q, k = unit(4, D).requires_grad_(), unit(4, D)

    def step(queue: clk.KeyQueue, q: Tensor, k: Tensor) -> Tensor:
        loss = clk.info_nce_loss(q, k, queue)
        queue.enqueue(k)
        return loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    one, other = (clk.KeyQueue(SIZE, D) for _ in range(2))
    for _ in range(5):
        values = compiled(one, q, k), step(other, q, k)
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*(torch.autograd.grad(value, q)[0] for value in values))
        assert_same_state(one, other)


# What the losses refuse


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "mask and memory must not be given together", {"labels": None, "mask": torch.eye(4)}),
        (ValueError, "labels must be given with memory", {"labels": None}),
        (ValueError, "memory and positives_cap must not be given together", {"positives_cap": 2}),
        (ValueError, "memory must be a KeyQueue with labels=True", {"memory": clk.KeyQueue(SIZE, D)}),
        (TypeError, "memory must be a KeyQueue or a pair .* got Tensor", {"memory": torch.ones(3, D)}),
        (TypeError, r"memory must be a KeyQueue or a pair .* got tuple", {"memory": (torch.ones(3, D),)}),
        (TypeError, r"memory\[0\] must be a torch.Tensor", {"memory": (None, torch.arange(3))}),
        (ValueError, r"memory\[0\] must not be empty", {"memory": (torch.ones(0, D), torch.arange(0))}),
        (TypeError, r"memory\[1\] must be a torch.Tensor", {"memory": (torch.ones(3, D), [0, 1, 2])}),
        (ValueError, r"memory\[1\] must have shape \[3\]", {"memory": (torch.ones(3, D), torch.arange(4))}),
        (ValueError, "memory must have as many features", {"memory": (torch.ones(3, 4), torch.arange(3))}),
        (
            ValueError,
            r"memory\[1\] must be on the device",
            {"memory": (torch.ones(3, D), torch.zeros(3, device="meta"))},
        ),
    ],
)
def test_memories_that_are_refused(error: type[Exception], match: str, arguments: dict[str, Any]) -> None:
    given = {"features": unit(4, 2, D), "labels": torch.arange(4), "memory": filled("filling"), **arguments}
    for module in (clk, reference):
        with pytest.raises(error, match=match):
            module.supcon_loss(**given)


@pytest.mark.parametrize("loss", [info_nce, sce, gathered_sce])
def test_queues_that_are_refused(loss: Callable[..., Tensor]) -> None:
    q, k = unit(4, D), unit(4, D)
    for queue in (clk.KeyQueue(SIZE, D + 1), torch.ones(3, D + 1)):
        with pytest.raises(ValueError, match="queue must have as many features as q"):
            loss(q, k, queue)
    with pytest.raises(ValueError, match="queue must be on the device of q"):
        loss(q, k, clk.KeyQueue(SIZE, D, device="meta"))
    with pytest.raises(TypeError, match=r"queue must be a torch.Tensor, got Linear"):
        loss(q, k, nn.Linear(D, 3))
    with pytest.raises(ValueError, match="queue must not be empty"):
        loss(q, k, torch.ones(0, D))
