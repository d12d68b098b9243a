"""Names in several languages: those of emojis, or of a file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..common.data import Data

HELD_OUT = 1000
SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
KINDS = THING, PERSON, FLAG = range(3)


class Names:
    """Names of N things in V languages, with the interface of `Images`; labels int64 [N] are for pictures.

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


def encoded(rows: list[list[str]], length: int | None) -> Tensor:
    """Code points int32 [N, V, L] of names in lower case, a blank before and after them and between words."""
    texts = [f" {' '.join(name.replace('_', ' ').casefold().split())} " for row in rows for name in row]
    longest = length or max(map(len, texts))
    bytes_ = "".join(text[:longest].ljust(longest, "\0") for text in texts).encode("utf-32-le")
    return torch.from_numpy(np.frombuffer(bytes_, np.int32).copy()).view(len(rows), -1, longest)


def split(codes: Tensor, labels: Tensor, languages: Sequence[str], same: np.ndarray) -> Data:
    """Hold out about HELD_OUT things, a quarter at most, always the same ones.

    same: int [N, K], whose equal numbers in a column mark things that stay together, in either part.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n, k = same.shape
    ties = (same - same.min(0) + n + np.cumsum([0, *np.ptp(same, 0)[:-1] + 1])).ravel()
    things = np.arange(n).repeat(k)
    nodes = ties.max() + 1
    family = connected_components(coo_array((np.ones(n * k), (things, ties)), (nodes, nodes)))[1][:n]
    family = np.unique(family, return_inverse=True)[1]
    sizes = np.bincount(family)
    order = np.random.default_rng(0).permutation(len(sizes))
    held = np.zeros(len(sizes), bool)
    held[order[np.cumsum(sizes[order]) <= min(HELD_OUT, n // 4)]] = True
    names, test = Names(codes, labels, languages), torch.from_numpy(held[family])
    return Data(names.where(~test), names.where(test), len(KINDS))


def emojis(length: int | None) -> Data:
    """Fully qualified emojis with their names in 14 languages, English first, that the package `emoji` holds.

    Emojis that differ in skin tones only, or whose names are equal in a language, lie in one part together.
    """
    import emoji

    emoji.config.load_language()
    known = {k: v for k, v in emoji.EMOJI_DATA.items() if v["status"] == emoji.STATUS["fully_qualified"]}
    bare = [k.translate(dict.fromkeys(map(ord, SKIN_TONES + "\ufe0f"))) for k in known]
    tones = {b for b, k in zip(bare, known, strict=True) if set(k) & set(SKIN_TONES)}
    labels = [
        PERSON if b in tones else FLAG if "\U0001f1e6" <= k[0] <= "\U0001f1ff" else THING
        for b, k in zip(bare, known, strict=True)
    ]
    rows = [[names[language].strip(":") for language in emoji.LANGUAGES] for names in known.values()]
    return split(encoded(rows, length), torch.tensor(labels), emoji.LANGUAGES, numbers(bare, rows))


def numbers(things: list[str] | None, rows: list[list[str]]) -> np.ndarray:
    """Numbers int [N, V], with `things` [N, 1 + V], that are equal in a column where its words are."""
    columns = [*([] if things is None else [things]), *zip(*rows, strict=True)]
    return np.stack([np.unique(column, return_inverse=True)[1] for column in columns], 1)


def pairs(path: Path | None, length: int | None) -> Data:
    """Names of a text file: columns divided by tabs, of which the first line gives the languages.

    Rows with an equal name in a language lie in one part together; all labels are 0.
    """
    if path is None:
        raise ValueError("root is needed for pairs: a file of columns divided by tabs, languages first")
    if not path.is_file():
        raise FileNotFoundError(
            f"root={path} is not a file; wanted: columns divided by tabs, languages first"
        )
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
    labels = torch.zeros(len(rows), dtype=torch.long)
    return split(encoded(rows, length), labels, languages, numbers(None, rows))


def load(name: str, root: Path | None = None, size: int | None = None) -> Data:
    """Load names (of emojis) or pairs (of the file `root`); `size` characters of each, None for all."""
    loaders = {"names": lambda: emojis(size), "pairs": lambda: pairs(root, size)}
    if name not in loaders:
        raise ValueError(f"name={name!r}; wanted: one of {', '.join(loaders)}")
    if size is not None and size < 3:
        raise ValueError(f"size={size}; wanted: characters of a name, at least 3")
    return loaders[name]()
