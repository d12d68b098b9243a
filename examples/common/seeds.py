"""Seeds of generators."""

from __future__ import annotations

import numpy as np


def mixed(*numbers: int) -> int:
    """A seed of 64 bits from several numbers, such that neighbouring ones give unrelated generators."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
