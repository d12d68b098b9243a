"""Settings of the paper and of two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..common.settings import Settings


@dataclass(frozen=True)
class TowersSettings(Settings):
    methods: tuple[Literal["clip", "supcon"], ...] = ("clip", "supcon")
    """clip: the paper's loss, its scale learnt; supcon: all languages' names of an emoji are positives."""
    data: Literal["names", "pairs"] = "names"
    """names: of emojis, in 14 languages; pairs: those of the file --root."""
    root: Path | None = None
    """File of columns divided by tabs, whose first line names their languages; the first tower's is first."""
    size: int | None = None
    """Characters of a name that are read; None: all."""
    language: tuple[str, ...] = ("es",)
    """Languages of the second tower: of names, one or more of es ja ko pt it fr de fa id zh ru tr ar."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    width: int = 128
    """Width of the embedding of n-grams."""
    buckets: int = 1 << 14
    """Rows of the embedding, which n-grams share by their hashes."""
    grams: int = 4
    """Characters of the longest n-grams."""
    dropout: float = 0.1
    """Part of the characters that are left out in training, and with them the n-grams that have them."""
    temperature: float = 0.1
    """Temperature of supcon; clip's scale begins at 1/0.07 whatever this is."""


# Of the paper (section 2.5; tables 18 and 20, ViT-B/32): 32,768 pairs a step, 32 epochs, AdamW with weight
# decay 0.2 but not of gains and biases, learning rate 5e-4 with 2,000 steps of warm-up and a cosine, joint
# space of 512, scale from 1/0.07 to at most 100, mixed precision. Its 2,000 steps are 0.16 of an epoch of its
# 400 million pairs, and the moments of AdamW are those of its ResNets. Chosen here: the encoders, n-grams in
# the place of transformers, and their sizes; bfloat16 for its float16.
PAPER = TowersSettings(
    methods=("clip",),
    data="pairs",
    epochs=32,
    batch=32768,
    lr=5e-4,
    warmup=0.16,
    weight_decay=0.2,
    projection=512,
    width=512,
    buckets=1 << 18,
    amp="bfloat16",
)

# Chosen on seed 0; 220 steps.
CPU = TowersSettings(epochs=20, batch=250, lr=1e-2, warmup=1, weight_decay=0.2, projection=128)

PRESETS = {"cpu": CPU, "paper": PAPER}
