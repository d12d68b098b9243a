"""The cost of a loss over a group for each of its processes, in a step, forward and backward, on paper.

Counted are the products of matrices as the GPU kernels do them (docs/performance.md), the bytes that
`cl_kernels.distributed` sends, launches of Triton's kernels and of library products, and memory of the size
of the features and of the rows' statistics. Exponentials, small operations on vectors, and the kernels' own
workspaces, but for the buffer of wide gradients, are not. Nothing here is measured.

n are the rows of this process, m those of all and the queue, D the width, s the bytes of a feature, a = 4
those of a sum, W the processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from .. import configs

ITEM = {"float16": 2, "bfloat16": 2, "float32": 4}  # bytes of a feature
SUM = 4  # bytes of what is summed over processes: float32
NUMBER = 8  # bytes of a label and of a statistic
CARD = 5 * NUMBER  # what a process tells the others about its part before each loss
CHUNK_BYTES = 1 << 29  # of a wide gradient's matrix at a time, as in triton/
ARCHITECTURE = "sm_90"  # whose launch shapes count launches and say which widths are fused

LOSSES = (
    "supcon", "selfcon", "multilevel", "stablerep", "nt_xent", "clip", "info_nce", "dcl", "sce", "dimcl",
)  # fmt: skip
MULTI_VIEW = ("supcon", "selfcon", "multilevel")
QUEUED = ("info_nce", "sce")
FREEZABLE = ("info_nce", "sce")
EXCHANGES = ("gather", "ring")


@dataclass(frozen=True)
class Problem:
    """One call of the engine: the rows of every process against their keys."""

    kind: str  # "self": a batch with itself; "keys"; "both axes"; "soft targets"
    rows: tuple[int, ...]
    width: int
    labels: bool = False  # travel with the keys
    frozen: bool = False  # keys without gradient
    queue: int = 0  # keys that every process has
    exchanged: bool = True  # the keys of the others take part


@dataclass(frozen=True)
class Setup:
    """A loss over a group, as one of its processes sees it."""

    loss: str
    samples: tuple[int, ...]  # of each process
    widths: tuple[int, ...]  # several of the multi-level loss
    views: int = 2
    labels: bool = True
    queue: int = 0
    frozen: bool = False
    dtype: str = "bfloat16"
    exchange: str = "gather"
    rank: int = 0

    @property
    def world(self) -> int:
        return len(self.samples)

    @property
    def item(self) -> int:
        return ITEM[self.dtype]

    @property
    def own(self) -> int:
        return self.samples[self.rank]

    def problems(self) -> list[Problem]:
        """Calls of the engine. Labels travel but where each row has one positive, known by its index."""
        width = self.widths[0]
        if self.loss in MULTI_VIEW:
            rows, by_label = tuple(self.views * n for n in self.samples), self.labels or self.views != 2
            return [Problem("self", rows, d, by_label) for d in self.widths]
        if self.loss == "stablerep":
            return [Problem("self", self.samples, width, labels=True)]
        if self.loss == "nt_xent":
            return [Problem("self", tuple(2 * n for n in self.samples), width)]
        if self.loss == "clip":
            return [Problem("both axes", self.samples, width)]
        if self.loss == "dcl":
            return [Problem("keys", self.samples, width), Problem("self", self.samples, width)]
        if self.loss == "sce":
            return [Problem("soft targets", self.samples, width, frozen=self.frozen, queue=self.queue)]
        if self.loss == "dimcl":
            return [Problem("self", self.columns(), sum(self.samples))]
        if self.queue:
            return [Problem("keys", self.samples, width, frozen=True, queue=self.queue, exchanged=False)]
        return [Problem("keys", self.samples, width, frozen=self.frozen)]

    def columns(self) -> tuple[int, ...]:
        """DimCL's rows: each process's share of the columns, in both views."""
        ends = [self.widths[0] * i // self.world for i in range(self.world + 1)]
        return tuple(2 * (ends[i + 1] - ends[i]) for i in range(self.world))


def evenly(batch: int, world: int) -> tuple[int, ...]:
    """A batch over processes; the first ones have one sample more where it is not a multiple."""
    return tuple(batch // world + (i < batch % world) for i in range(world))


# Operations and launches


@dataclass(frozen=True)
class Work:
    flops: float = 0.0
    launches: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.launches + other.launches)

    def __mul__(self, count: int) -> Work:
        return Work(self.flops * count, self.launches * count)


def _kind(dtype: str) -> str:
    return "float32" if dtype == "float32" else "half"


def fused(width: int, dtype: str) -> bool:
    """Whether a gradient of so many features stays in registers."""
    return width <= max(configs.TABLE["gradient_rows", ARCHITECTURE, _kind(dtype)])


def chunks(kernel: str, n: int, m: int, width: int, dtype: str) -> int:
    """How many times a wide gradient's matrix, of n rows, goes through its buffer."""
    rows = configs.TABLE[kernel, ARCHITECTURE, _kind(dtype)]
    block = rows[configs.wide_enough(rows, width)].block_m
    step = max(block, CHUNK_BYTES // (m * ITEM[dtype]) // block * block)
    return -(-n // step)


def forward(
    kind: str, n: int, segments: Sequence[int], width: int, dtype: str, *, saves: bool = False
) -> Work:
    """Log-sum-exps of n rows over m keys, in segments; `saves`: with the gradient, of frozen keys.

    n m D for a batch with itself, by the triangle; 2 n m D for keys, on one axis or both; 4 for soft targets,
    student and teacher. With the gradient 4 and 8 in one pass, or where that is too wide for registers what
    recomputing the logits and one product of each matrix add: 6 and 12.
    """
    pairs, wide = float(n) * sum(segments) * width, not fused(width, dtype)
    if pairs == 0:
        return Work()
    if kind == "soft targets":
        parts = len(segments) * chunks("soft_target_softmax", n, max(segments), width, dtype)
        factor = 4 if not saves else 12 if wide else 8
        return Work(factor * pairs, len(segments) + 1 + 3 * parts * (saves and wide))
    if saves:
        again = 3 + 2 * chunks("gradient_tiles", n, sum(segments), width, dtype) if wide else 1
        return Work((6 if wide else 4) * pairs, 2 + again)
    return Work((1 if kind == "self" else 2) * pairs, {"self": 3, "keys": 2, "both axes": 4}[kind])


def backward(
    kind: str, n: int, segments: Sequence[int], width: int, dtype: str, *, keys: bool = True
) -> Work:
    """Gradients of n rows and, if asked for, of their m keys; nothing was saved for them.

    4 n m D for a batch with itself. Else 4 n m D for each of the two gradients where they are fused, and
    2 n m D to recompute the logits and 2 for each where they are wide. Soft targets: 4 n m D for the logits
    and 2 for each of four gradients.
    """
    pairs, gradients = float(n) * sum(segments) * width, 1 + keys
    if pairs == 0:
        return Work()
    if kind == "soft targets":
        parts = len(segments) * chunks("soft_target_softmax", n, max(segments), width, dtype)
        return Work((4 + 4 * gradients) * pairs, (1 + 2 * gradients) * parts)
    terms = 1 if kind == "self" else 2
    if kind == "self":
        gradients = 1
    if fused(width, dtype):
        return Work(4 * gradients * pairs, terms + 2 * gradients)
    parts = (1 + gradients) * chunks("gradient_tiles", n, sum(segments), width, dtype)
    return Work((4 if kind == "self" else 2 + 2 * gradients) * pairs, terms + parts + gradients)


def works(problem: Problem, setup: Setup) -> dict[str, tuple[Work, Work]]:
    """Work by pass: with the keys at hand, and with those that visit.

    Gathered keys are others than the queries, even of a batch with itself: the triangle is lost. On a ring
    the own block keeps it. Frozen keys that travel on one axis are visited again in the backward; soft
    targets bring their gradient with the forward.
    """
    n, width, dtype, kind = problem.rows[setup.rank], problem.width, setup.dtype, problem.kind
    queue = [problem.queue] * (problem.queue > 0)
    after_saving = Work(0.0, int(n > 0))
    if not travels(problem, setup):
        if kind == "self" and setup.world > 1:
            kind = "keys"
        segments = [sum(problem.rows)] * problem.exchanged + queue
        first = forward(kind, n, segments, width, dtype, saves=problem.frozen)
        second = after_saving if problem.frozen else backward(kind, n, segments, width, dtype)
        return {"forward": (first, Work()), "backward": (second, Work())}
    keys = not problem.frozen
    saves = problem.frozen and kind == "soft targets"
    away = "keys" if kind == "self" else kind
    first, second, rest, rest_backward = Work(), Work(), Work(), Work()
    for segment in [n, *queue]:
        first += forward(kind, n, [segment], width, dtype, saves=saves)
        second += backward(kind, n, [segment], width, dtype, keys=keys)
    for half, count in _halves(problem.rows, setup.rank).items():
        rest += forward(away, n, [half], width, dtype, saves=saves) * count
        rest_backward += backward(away, n, [half], width, dtype, keys=keys) * count
    if saves:
        second, rest_backward = after_saving, Work()
    return {"forward": (first, rest), "backward": (second, rest_backward)}


def travels(problem: Problem, setup: Setup) -> bool:
    return setup.world > 1 and setup.exchange == "ring" and problem.exchanged


def _halves(rows: Sequence[int], rank: int) -> Counter[int]:
    """How often blocks of so many rows visit a process."""
    found: Counter[int] = Counter()
    for n, count in Counter([*rows[:rank], *rows[rank + 1 :]]).items():
        found[n // 2] += count
        found[n - n // 2] += count
    return found


# Bytes


class Traffic(NamedTuple):
    """Bytes and messages that one process sends. A collective is counted as a ring algorithm sends it: W - 1
    blocks."""

    phase: str  # "forward", "backward"
    by: str  # "all-gather", "reduce-scatter", "all-to-all", "to the next", "to the previous"
    what: str
    bytes: int
    messages: int


def traffic(setup: Setup) -> list[Traffic]:
    """All that this process sends in a step."""
    if setup.world == 1:
        return []
    others = setup.world - 1
    found = []
    for i, problem in enumerate(setup.problems()):
        if i == 0 or setup.loss == "multilevel":  # whose levels are a loss each
            found.append(Traffic("forward", "all-gather", "cards", CARD * others, others))
        if setup.loss == "dimcl":
            found += _shares(setup)
        if travels(problem, setup):
            found += _travelling(problem, setup)
        elif problem.exchanged:
            found += _gathered(problem, setup)
    return found


def _gathered(problem: Problem, setup: Setup) -> Iterator[Traffic]:
    """All-gathers of keys and labels, blocks padded to the largest; a reduce-scatter of the keys' gradients
    in float32; with both axes an all-to-all of the columns' log-sum-exps, and one of their gradients."""
    others, most, own = setup.world - 1, max(problem.rows), problem.rows[setup.rank]
    row = problem.width * setup.item
    yield Traffic("forward", "all-gather", "keys", most * row * others, others)
    if problem.labels:
        yield Traffic("forward", "all-gather", "labels", most * NUMBER * others, others)
    if problem.kind == "both axes":
        out = NUMBER * (sum(problem.rows) - own)
        yield Traffic("forward", "all-to-all", "log-sum-exps of columns", out, others)
        yield Traffic("backward", "all-to-all", "their gradients", NUMBER * own * others, others)
    if not problem.frozen:
        size = most * problem.width * SUM * others
        yield Traffic("backward", "reduce-scatter", "gradients of keys", size, others)


def payloads(problem: Problem, setup: Setup) -> dict[str, tuple[list[int], list[int]]]:
    """Bytes a row of each tensor that goes round in a pass, and of each that follows, added up on the way:
    in the backward of both axes the log-sum-exps of columns and their gradients go with the keys."""
    keys = [problem.width * setup.item] + [NUMBER] * problem.labels
    both, soft = problem.kind == "both axes", problem.kind == "soft targets"
    passes = {"forward": (keys, [NUMBER] * both)}
    if not (problem.frozen and soft):
        gradients = 0 if problem.frozen else 2 if soft else 1
        passes["backward"] = (keys + [NUMBER] * (2 * both), [problem.width * SUM] * gradients)
    return passes


def _travelling(problem: Problem, setup: Setup) -> Iterator[Traffic]:
    """Messages to both neighbours: the halves of every block but the one that came from there, and of what is
    added up for every block but the own."""
    world, rank = setup.world, setup.rank
    for phase, (payload, sums) in payloads(problem, setup).items():
        for way, by in ((1, "to the next"), (-1, "to the previous")):
            half = [n // 2 if way == 1 else n - n // 2 for n in problem.rows]
            for what, parts, missing in (("keys", payload, (rank + way) % world), ("sums", sums, rank)):
                sent = [n for owner, n in enumerate(half) if owner != missing and n > 0]
                if parts:
                    yield Traffic(phase, by, what, sum(sent) * sum(parts), len(sent) * len(parts))


def _shares(setup: Setup) -> list[Traffic]:
    """DimCL: to each process its share of the columns of both views, and back the gradients of the own."""
    columns, others = setup.columns(), setup.world - 1
    own, batch = columns[setup.rank], sum(setup.samples)
    out = (sum(columns) - own) * setup.own * setup.item
    back = own * (batch - setup.own) * setup.item
    return [
        Traffic("forward", "all-to-all", "columns", out, others),
        Traffic("backward", "all-to-all", "gradients of columns", back, others),
    ]


# Memory


def memory(setup: Setup) -> dict[str, int]:
    """Bytes that a process holds at the peak of a step, by what they are.

    Inputs: features, labels, the queue. Statistics: 4 numbers a row. Gathered keys: m D s, twice while
    uneven blocks are put together; at the peak of the backward beside them the gradients of the keys, 2 a
    m D: in float32 and scaled, or, where parts are uneven and the keys gone, in float32 and as blocks to
    be sent. On a ring two blocks of keys; in the backward the own gradients, those of a visiting block,
    of the one before, sent, and of the next, received, all in float32. Frozen keys: a vector a row for
    each softmax in place of gradients, and on a ring those of the block at hand.
    """
    problems, item = setup.problems(), setup.item
    gradients, matrix = max((_gradients(problem, setup) for problem in problems), key=sum)
    keys = sum(_keys(problem, setup) for problem in problems)
    found = {
        "inputs": inputs(setup),
        "statistics": sum(4 * NUMBER * problem.rows[setup.rank] for problem in problems),
        "keys of all" if setup.exchange == "gather" else "visiting keys": keys,
        "gradients": gradients + (inputs(setup) if len(problems) > 1 else 0),
        "matrix of a wide gradient": matrix,
    }
    if setup.loss == "dimcl":
        share = setup.columns()[setup.rank] * sum(setup.samples)
        found["columns"] = share * (item + SUM) + 2 * setup.own * setup.widths[0] * item
    return {name: size for name, size in found.items() if size}


def inputs(setup: Setup) -> int:
    rows = setup.own * (setup.views if setup.loss in MULTI_VIEW else 1 if setup.loss == "stablerep" else 2)
    labels = NUMBER * setup.own if setup.labels and setup.loss in (*MULTI_VIEW, "stablerep") else 0
    return (rows + setup.queue) * sum(setup.widths) * setup.item + labels


def _keys(problem: Problem, setup: Setup) -> int:
    row = problem.width * setup.item + NUMBER * problem.labels
    if setup.world == 1 or not problem.exchanged:
        return 0
    if setup.exchange == "ring":
        return 2 * max(problem.rows) * row
    return sum(problem.rows) * row * (1 if len(set(problem.rows)) == 1 else 2)


def _gradients(problem: Problem, setup: Setup) -> tuple[int, int]:
    """Those at the peak, and the matrix of a wide one; soft targets have two matrices, at any width where
    keys get a gradient."""
    n, item = problem.rows[setup.rank], setup.item
    soft = problem.kind == "soft targets"
    alone = setup.world == 1 or not problem.exchanged
    m = problem.queue + (n if alone or setup.exchange == "ring" else sum(problem.rows))
    by_matrix = not fused(problem.width, setup.dtype) or (soft and not problem.frozen)
    matrix = (1 + soft) * min(n * m * item, CHUNK_BYTES) if by_matrix else 0
    vector = n * problem.width
    rounded = item if item < SUM else 0
    if problem.frozen and travels(problem, setup):
        return vector * (5 * SUM if soft else 3 * SUM + rounded), matrix
    if problem.frozen:
        return vector * (item + SUM * (1 + soft)), matrix
    own = vector * (SUM + rounded)
    if alone:
        return own * (1 if problem.kind == "self" else 2), matrix
    if setup.exchange == "gather":
        return (1 + soft) * (own + sum(problem.rows) * problem.width * 2 * SUM), matrix
    block = max(problem.rows) * problem.width
    return (1 + soft) * (2 * vector * SUM + block * (3 * SUM + rounded)), matrix


def eager_matrix(setup: Setup) -> int:
    """Bytes of one matrix of this process's rows against all keys in float32; eager PyTorch holds several."""
    return sum(
        4 * p.rows[setup.rank] * (p.queue + (sum(p.rows) if p.exchanged else 0)) for p in setup.problems()
    )


# Time


class Rates(NamedTuple):
    """Rates of a machine, given or assumed."""

    flops: float  # operations a second of a process
    link: float  # bytes a second each way of a process in a collective
    ring: float  # and of a block on the ring
    latency: float = 0.0  # seconds of a message
    launch: float = 0.0  # seconds between launches


class Pass(NamedTuple):
    """A forward or a backward of one call of the engine, in seconds."""

    phase: str
    compute: float
    exposed: float  # the communication that is waited for
    hidden: float | None  # compute of a step over the transfer meanwhile; None: nothing travels

    @property
    def total(self) -> float:
        return self.compute + self.exposed


def _seconds(work: Work, rates: Rates) -> float:
    """As long as the products take, or the launches where that is longer."""
    return max(work.flops / rates.flops, work.launches * rates.launch)


def passes(setup: Setup, rates: Rates) -> list[Pass]:
    """Modelled times of each pass.

    Gathering: collectives, then products, then collectives; nothing overlaps. On a ring a step works on a
    block while the next one and the last one's sums travel, and takes the longer of the two; the sums of the
    last step are waited for. `hidden` compares operations with bytes alone, without latency and launches.
    """
    found, sent = [], traffic(setup)
    for problem in setup.problems():
        for phase, (home, rest) in works(problem, setup).items():
            compute = _seconds(home, rates)
            keys, sums = payloads(problem, setup).get(phase, ([], []))
            if not (keys and travels(problem, setup)):
                found.append(Pass(phase, compute, 0.0, None))
                continue
            steps, most = setup.world - 1, max(problem.rows)
            step = Work(rest.flops / steps, rest.launches // steps)
            first, last = (most * sum(x) / rates.ring + rates.latency * bool(x) for x in (keys, sums))
            middle = first + last
            each = _seconds(step, rates)
            waited = max(first - compute, 0.0) + max(middle - each, 0.0) * (steps - 1) + last
            bare = most * (sum(keys) + sum(sums)) / rates.ring
            ratio = step.flops / rates.flops / bare
            found.append(Pass(phase, compute + each * steps, waited, ratio))
    collectives = dict.fromkeys(("forward", "backward"), 0.0)
    for x in sent:
        if not x.by.startswith("to "):
            collectives[x.phase] += x.bytes / rates.link + rates.latency * x.messages
    return found + [Pass(phase, 0.0, seconds, None) for phase, seconds in collectives.items() if seconds]


def hides(setup: Setup, rates: Rates) -> bool:
    """Whether products hide the traffic in every pass of the ring."""
    return all(x.hidden is None or x.hidden >= 1 for x in passes(setup, rates))


def smallest_hidden(setup: Setup, rates: Rates, limit: int = 1 << 26) -> int | None:
    """The fewest samples of a process, as many on each, from which on the ring hides its traffic; None: it
    never does below the limit, or nothing travels."""

    def hidden(n: int) -> bool:
        return hides(replace(setup, samples=(n,) * setup.world, exchange="ring", rank=0), rates)

    ring = replace(setup, exchange="ring")
    if all(x.hidden is None for x in passes(ring, rates)) or not hidden(limit):
        return None
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if hidden(middle) else (middle, high)
    return high
