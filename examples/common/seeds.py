"""Seeds of generators, each a function of what it is for, the run's seed, and the step or epoch."""

from __future__ import annotations

import numpy as np

VIEWS, ORDER, MODULES = range(3)  # what a generator is for


def mixed(seed: int, *key: int) -> int:
    """A seed of 32 bits, all that torch's CPU generator takes; neighbouring numbers give unrelated ones."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0])
