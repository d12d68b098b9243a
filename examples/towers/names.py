"""Names in several languages: those of emojis, or of a file."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..common.data import Data

HELD_OUT = 1000
TONES = "[\U0001f3fb-\U0001f3ff\ufe0f]"  # and variation selector 16 (emoji presentation)
TONE_NAMES = r"[ ,]*\b(medium-light|medium-dark|light|medium|dark) skin tone"
KINDS = THING, FLAG, PERSON, TONED = range(4)  # a person or hand without and with a skin tone


class Names:
    """Names of N things in V languages, with the interface of `Images`; labels int64 [N] colour the plot.

    `codes` int32 [N, V, L] are the characters' code points, with 0 after the end.
    """

    def __init__(self, codes: Tensor, labels: Tensor, languages: Sequence[str]) -> None:
        if codes.dtype != torch.int32 or codes.ndim != 3 or codes.shape[1] != len(languages):
            wanted = f"int32 [N, {len(languages)}, L]"
            raise ValueError(f"codes: {codes.dtype} {list(codes.shape)}; wanted: {wanted}")
        if labels.dtype != torch.int64 or labels.shape != codes.shape[:1]:
            raise ValueError(f"labels: {labels.dtype} {list(labels.shape)}; wanted: int64 [{len(codes)}]")
        self.codes, self.labels, self.languages = codes, labels, tuple(languages)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Code points, int64 [B, V, L]; indices: int64 [B]."""
        return self.codes[indices].long()

    def prefetch(self, indices: Tensor) -> None:
        """Do nothing: the names are in memory."""

    def where(self, chosen: Tensor) -> Names:
        """Rows by index, int64 [M], or by mask, bool [N]."""
        return Names(self.codes[chosen], self.labels[chosen], self.languages)

    def columns(self, languages: Sequence[str]) -> list[int]:
        """Places of the first language and of the given ones."""
        if unknown := [name for name in languages if name not in self.languages[1:]]:
            raise ValueError(f"language={unknown[0]!r}; wanted: of {', '.join(self.languages[1:])}")
        if not languages or len(set(languages)) < len(languages):
            raise ValueError(f"language={tuple(languages)}; wanted: one or more, each once")
        return [0, *map(self.languages.index, languages)]


def plain(name: str) -> str:
    """The name in lower case, with single blanks between its words."""
    return " ".join(name.replace("_", " ").casefold().split())


def encoded(rows: list[list[str]], length: int | None) -> Tensor:
    """Code points int32 [N, V, L] of plain names, with a blank before and after each."""
    texts = [f" {name} " for row in rows for name in row]
    longest = length or max(map(len, texts))
    points = "".join(text[:longest].ljust(longest, "\0") for text in texts).encode("utf-32-le")
    return torch.frombuffer(bytearray(points), dtype=torch.int32).view(len(rows), -1, longest)


def split(names: Names, rows: list[list[str]]) -> Data:
    """Hold out about HELD_OUT things, a quarter at most, always the same ones.

    Things whose `rows` of words [N, K] have an equal one in a column lie in one part together.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    words = np.stack([np.unique(column, return_inverse=True)[1] for column in zip(*rows, strict=True)], 1)
    n, k = words.shape
    nodes = (words + n + np.cumsum([0, *words.max(0)[:-1] + 1])).ravel()  # of a graph: things, then words
    size = nodes.max() + 1
    edges = coo_array((np.ones(n * k), (np.arange(n).repeat(k), nodes)), (size, size))
    family = connected_components(edges, directed=False)[1][:n]
    sizes = np.bincount(family)
    order = np.random.default_rng(0).permutation(len(sizes))
    held = np.zeros(len(sizes), bool)
    held[order[np.cumsum(sizes[order]) <= min(HELD_OUT, n // 4)]] = True
    if not held.any():
        raise ValueError(f"{n} names of {len(sizes)} families, by equal names; wanted: more to hold some out")
    test = torch.from_numpy(held[family])
    return Data(names.where(~test), names.where(test), len(KINDS))


def emojis(length: int | None) -> Data:
    """Fully qualified emojis with their names in 14 languages, English first, that the package `emoji` holds.

    Emojis that differ in skin tones only, by code points or English names, lie in one part together, and so
    do those with an equal name. Women, men and persons of one activity may lie apart.
    """
    import emoji

    emoji.config.load_language()
    known = {k: v for k, v in emoji.EMOJI_DATA.items() if v["status"] == emoji.STATUS["fully_qualified"]}
    rows = [[plain(v[language].strip(":")) for language in emoji.LANGUAGES] for v in known.values()]
    points = [re.sub(TONES, "", k) for k in known]
    bare = [re.sub(TONE_NAMES, "", row[0]) for row in rows]
    people = {base for base, row in zip(bare, rows, strict=True) if base != row[0]}
    kinds = [FLAG if "\U0001f1e6" <= k[0] <= "\U0001f1ff" else THING for k in known]
    for i, row in enumerate(rows):
        if bare[i] in people:
            kinds[i] = PERSON if bare[i] == row[0] else TONED
    names = Names(encoded(rows, length), torch.tensor(kinds), emoji.LANGUAGES)
    return split(names, [[x, y, *row] for x, y, row in zip(points, bare, rows, strict=True)])


def pairs(path: Path | None, length: int | None) -> Data:
    """Names of a text file: columns divided by tabs, of which the first line gives the languages.

    Rows with an equal name in a language lie in one part together; all labels are 0.
    """
    if path is None:
        raise ValueError("root is needed for pairs: a file of columns divided by tabs, languages first")
    if not path.is_file():
        raise FileNotFoundError(f"root={path} is no file; wanted: columns divided by tabs, languages first")
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    languages, rows = (lines[0], lines[1:]) if lines else ([], [])
    if len(languages) < 2 or len(set(languages)) < len(languages):
        raise ValueError(f"{path} begins with {languages}; wanted: two or more languages, divided by tabs")
    for line, row in enumerate(rows, 2):
        if len(row) != len(languages) or not all(map(str.strip, row)):
            raise ValueError(f"{path}, line {line}: {row}; wanted: a name for each of {', '.join(languages)}")
    if len(rows) < 8:
        raise ValueError(f"{path} has {len(rows)} rows of names; wanted: 8 or more")
    rows = [list(map(plain, row)) for row in rows]
    names = Names(encoded(rows, length), torch.zeros(len(rows), dtype=torch.long), languages)
    return split(names, rows)


def load(name: str, root: Path | None = None, size: int | None = None) -> Data:
    """Load names (of emojis) or pairs (of the file `root`); `size` characters of each, None for all."""
    loaders = {"names": lambda: emojis(size), "pairs": lambda: pairs(root, size)}
    if name not in loaders:
        raise ValueError(f"name={name!r}; wanted: one of {', '.join(loaders)}")
    if size is not None and size < 3:
        raise ValueError(f"size={size}; wanted: characters of a name, at least 3")
    return loaders[name]()
