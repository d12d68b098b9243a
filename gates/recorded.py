"""Figures that the gates keep of every compiled kernel, as text that a reviewer reads: gates/*.tsv.

A file has a line for the compiler, one for each kernel's source and one for each compiled kernel, sorted:

    compiler    name and version
    source      kernel, digest of its text and of all that the text reaches
    figures     what was compiled, ..., what the compiler made of it

A kernel need not be compiled again where the compiler, its source and what is asked for are those recorded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).parent
SPILLS_ALLOWED = 64  # bytes a thread: registers at the edge do not survive a compiler's release

Cells = tuple[str, ...]


def digest(parts: Iterable[str]) -> str:
    made = hashlib.sha256()
    for part in parts:
        made.update(part.encode())
        made.update(b"\0")
    return made.hexdigest()[:16]


def code(text: str, comment: str) -> str:
    """A source without blank lines, lines that are comments, and blanks at the ends of lines."""
    lines = (line.rstrip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.lstrip().startswith(comment))


@dataclass
class Record:
    """A file. `figures` begins with `what` cells that say what was compiled; the rest are its figures."""

    columns: Sequence[str]
    what: int
    compiler: str = ""
    sources: dict[str, str] = field(default_factory=dict)
    figures: dict[Cells, Cells] = field(default_factory=dict)

    def text(self) -> str:
        lines = [("compiler", self.compiler)]
        lines += sorted(("source", name, made) for name, made in self.sources.items())
        lines += sorted(("figures", *what, *made) for what, made in self.figures.items())
        return "".join("\t".join(line) + "\n" for line in [("#", *self.columns), *lines])

    def read(self, text: str) -> Record:
        """Raises ValueError for a line that is none of such a file."""
        for number, line in enumerate(text.splitlines(), 1):
            kind, *cells = line.split("\t")
            if kind == "compiler" and len(cells) == 1:
                self.compiler = cells[0]
            elif kind == "source" and len(cells) == 2:
                self.sources[cells[0]] = cells[1]
            elif kind == "figures" and len(cells) == len(self.columns):
                self.figures[tuple(cells[: self.what])] = tuple(cells[self.what :])
            elif kind != "#":
                raise ValueError(f"line {number} is no line of recorded figures: {line!r}")
        return self

    def load(self, path: Path) -> Record:
        return self.read(path.read_text(encoding="utf-8")) if path.exists() else self

    def save(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(self.text(), encoding="utf-8")

    def named(self, what: Cells, made: Cells) -> dict[str, str]:
        return dict(zip(self.columns, (*what, *made), strict=True))

    def rows(self) -> list[dict[str, str]]:
        """The figures by the names of their columns."""
        return [self.named(what, made) for what, made in sorted(self.figures.items())]

    def differences(self, now: Record) -> list[str]:
        """Lines that say what `now` has otherwise; empty where both are the same."""
        found = [f"{name}: its source is not that recorded" for name in _changed(self.sources, now.sources)]
        for what in sorted(self.figures.keys() | now.figures.keys()):
            name = " | ".join(what)
            before, after = self.figures.get(what), now.figures.get(what)
            if before is None and after is not None:
                found.append(f"{name}: is not recorded")
            elif after is None and before is not None:
                found.append(f"{name}: is recorded, and there is no such kernel")
            elif before is not None and after is not None and before != after:
                names = self.columns[self.what :]
                both = zip(names, before, after, strict=True)
                changes = [f"{column} {x} -> {y}" for column, x, y in both if x != y]
                found.append(f"{name}: {', '.join(changes)}")
        return found


def _changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
