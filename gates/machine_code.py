"""A tile's cost in issue slots: the hot path of a kernel's loop over tiles, from its machine code.

A multiprocessor of sm_80 to sm_100 has four schedulers, each of which issues one instruction of a warp a
clock: a tile takes at least hot path x warps / 4 clocks, whatever its products and exponentials take.

The loop over tiles is the innermost one with products of tiles and exponentials; where no loop has both, the
innermost one with products. Its hot path is the shortest way around, by instructions, of those with the most
products: what a branch leaves out on the usual tile (masks at an edge, the safe path of large logits) does
not count, nor does what is behind a condition that nearly always holds: a mask of positives in gradient_rows,
labels in the CUDA C++ kernels. A loop inside it, over chunks of the features, is gone around once.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", re.MULTILINE)
TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
PRODUCTS = ("HGMMA", "HMMA", "UTCHMMA")
EXPONENTIALS = ("MUFU",)
SWITCH = "BRX"
ENDS = ("EXIT", "RET", SWITCH)


class Instruction(NamedTuple):
    at: int
    conditional: bool
    name: str
    operands: str

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def target(self) -> int | None:
        found = TARGET.search(self.operands) if self.kind == "BRA" else None
        return int(found[1], 16) if found else None


@dataclass(frozen=True)
class Loop:
    """A loop over tiles, in instructions of a warp."""

    hot: int  # on the hot path
    inner: int  # of those, in the loop inside
    size: int  # of the whole loop


def cells(loop: Loop | None) -> tuple[str, str, str]:
    """As the gates record it."""
    return ("-", "-", "-") if loop is None else (str(loop.hot), str(loop.inner), str(loop.size))


@dataclass
class Graph:
    """The basic blocks of a function, numbered by address; 0 is the entry."""

    blocks: list[list[Instruction]]
    after: list[list[int]] = field(default_factory=list)

    def count(self, block: int, kinds: Collection[str]) -> int:
        return sum(instruction.kind in kinds for instruction in self.blocks[block])

    def size(self, blocks: Collection[int]) -> int:
        return sum(len(self.blocks[block]) for block in blocks)

    def has(self, blocks: Collection[int], kinds: Collection[str]) -> bool:
        return any(self.count(block, kinds) for block in blocks)


def functions(sass: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Name and instructions of each function in the text of `cuobjdump -sass`."""
    for part in re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)[1:]:
        name, _, text = part.partition("\n")
        lines = LINE.findall(text)
        yield name.strip(), [Instruction(int(at, 16), bool(when), *rest) for at, when, *rest in lines]


def graph(code: list[Instruction]) -> Graph:
    """A switch leads to the blocks that nothing else does: the table of its targets is not in the code."""
    targets = {instruction.target for instruction in code}
    blocks: list[list[Instruction]] = [[]]
    for instruction in code:
        if blocks[-1] and instruction.at in targets:
            blocks.append([])
        blocks[-1].append(instruction)
        if instruction.target is not None or instruction.kind in ENDS:
            blocks.append([])
    found = Graph([block for block in blocks if block])
    numbers = {block[0].at: number for number, block in enumerate(found.blocks)}
    for number, block in enumerate(found.blocks):
        last = block[-1]
        after = [] if last.target is None else [numbers[last.target]]
        falls = last.conditional or (last.target is None and last.kind not in ENDS)
        if falls and number + 1 < len(found.blocks):
            after.append(number + 1)
        found.after.append(after)
    reached = {0}.union(*found.after)
    apart = [number for number in range(len(found.blocks)) if number not in reached]
    for block, after in zip(found.blocks, found.after, strict=True):
        if block[-1].kind == SWITCH:
            after += apart
    return found


def _postorder(after: list[list[int]], entry: int, within: Collection[int] | None = None) -> list[int]:
    """Blocks that the entry reaches, each behind those that it leads to but for ways back."""
    seen, order, stack = {entry}, [], [(entry, iter(after[entry]))]
    while stack:
        block, rest = stack[-1]
        following = next((x for x in rest if x not in seen and (within is None or x in within)), None)
        if following is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(after[following])))
    return order


def _dominators(after: list[list[int]]) -> dict[int, int]:
    """The immediate dominator of each block that the entry reaches, as Cooper, Harvey and Kennedy find it."""
    order = _postorder(after, 0)
    rank = {block: i for i, block in enumerate(order)}
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for following in after[block]:
            before[following].append(block)
    found, changed = {0: 0}, True
    while changed:
        changed = False
        for block in reversed(order[:-1]):
            known = [x for x in before[block] if x in found]
            common = known[0]
            for other in known[1:]:
                while common != other:
                    if rank[common] < rank[other]:
                        common = found[common]
                    else:
                        other = found[other]
            if found.get(block) != common:
                found[block], changed = common, True
    return found


def _dominates(dominators: dict[int, int], block: int, of: int) -> bool:
    while of not in (block, 0):
        of = dominators[of]
    return of == block


def loops(code: Graph) -> dict[int, set[int]]:
    """The blocks of each natural loop by its first block."""
    dominators = _dominators(code.after)
    before: dict[int, list[int]] = {block: [] for block in dominators}
    for block in dominators:
        for following in code.after[block]:
            before[following].append(block)
    found: dict[int, set[int]] = {}
    for block in dominators:
        for head in code.after[block]:
            if _dominates(dominators, head, block):
                body, stack = found.setdefault(head, {head}), [block]
                while stack:
                    if (inside := stack.pop()) not in body:
                        body.add(inside)
                        stack += before[inside]
    return found


def _hot_path(code: Graph, head: int, body: set[int]) -> list[int]:
    """The blocks of the hot path, from the first to the one that leads back."""
    order = _postorder(code.after, head, body)
    rank = {block: i for i, block in enumerate(order)}
    best: dict[int, tuple[int, int, list[int]]] = {}  # to the end of a way around: products, -size, blocks
    for block in order:
        here = (code.count(block, PRODUCTS), -len(code.blocks[block]))
        onward = [x for x in code.after[block] if rank.get(x, len(order)) < rank[block]]
        ways = [best[following] for following in onward if following in best]
        if head in code.after[block]:
            ways.append((0, 0, []))
        if ways:
            products, size, path = max(ways, key=lambda way: way[:2])
            best[block] = (here[0] + products, here[1] + size, [block, *path])
    return best[head][2]


def tile_loop(code: list[Instruction]) -> Loop | None:
    """The loop over tiles of a function; of several apart, for usual tiles and for others, that with the
    shortest hot path."""
    made = graph(code)
    found = loops(made)
    for wanted in ((PRODUCTS, EXPONENTIALS), (PRODUCTS,)):
        having = {
            head: body for head, body in found.items() if all(made.has(body, kinds) for kinds in wanted)
        }
        measured = [
            _measured(made, found, head, body)
            for head, body in having.items()
            if not any(other < body for other in having.values())
        ]
        if measured:
            return min(measured, key=lambda loop: loop.hot)
    return None


def _measured(code: Graph, found: dict[int, set[int]], head: int, body: set[int]) -> Loop:
    path = _hot_path(code, head, body)
    inside = set().union(*(other for other in found.values() if other < body))
    return Loop(
        hot=code.size(path),
        inner=code.size([block for block in path if block in inside]),
        size=code.size(body),
    )
