"""The InfoNCE loss of ms-swift, whose file is loaded without the rest of ms-swift."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from .cases import Loss, PeerCase, features

NEEDS = ("swift", "transformers")
LOSS = "swift.InfonceLoss"
EQUAL, RAGGED = (3, 3, 3, 3, 3, 3), (2, 5, 1, 3, 4, 2, 1)


def library() -> ModuleType:
    """ms-swift's swift.loss.embedding, over stand-ins for what it imports where that is not there."""
    if "swift.loss.embedding" in sys.modules:
        return sys.modules["swift.loss.embedding"]
    import transformers.utils  # noqa: F401  (before there is a stand-in for accelerate)

    spec = importlib.util.find_spec("swift")
    folder = Path(next(iter(spec.submodule_search_locations)))
    _stand_in("swift.sequence_parallel", sequence_parallel=SimpleNamespace(dp_group=None))
    _stand_in("swift.utils", get_dist_setting=_dist_setting)
    _stand_in("swift.loss").__path__ = [str(folder / "loss")]
    vars(sys.modules["swift"]).update(__version__="4.6.0", __spec__=spec)
    with pytest.MonkeyPatch.context() as patch:
        for path in ("accelerate", "accelerate.utils"):
            patch.setitem(sys.modules, path, ModuleType(path))
        sys.modules["accelerate.utils"].gather_object = _gather_object
        return import_module("swift.loss.embedding")


def _stand_in(name: str, **held: Any) -> ModuleType:
    for path in (name.partition(".")[0], name):
        sys.modules.setdefault(path, ModuleType(path)).__dict__.setdefault("__path__", [])
    vars(sys.modules[name]).update(held)
    return sys.modules[name]


def _dist_setting() -> tuple[int, int, int, int]:
    rank, world = int(os.environ.get("RANK", -1)), int(os.environ.get("WORLD_SIZE", 1))
    return rank, rank, world, world


def _gather_object(items: Any) -> list[Any]:
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, list(items))
    return [x for items in found for x in items]


def grouped(
    documents: Sequence[int], rows: int, dtype: torch.dtype, generator: torch.Generator, width: int = 32
) -> list[Tensor]:
    """Unit rows of groups with so many documents, over and over until there are `rows` anchors, and their
    labels."""
    sizes = [documents[i % len(documents)] for i in range(rows)]
    labels = torch.cat([torch.eye(1, size, dtype=torch.int64)[0] for size in sizes])
    group = torch.arange(rows).repeat_interleave(torch.tensor(sizes) + 1)
    noise = features(len(group), width, dtype, generator, requires_grad=False)
    sample = features(rows, width, dtype, generator, requires_grad=False)
    x = torch.nn.functional.normalize(noise + 0.5 * sample[group], dim=1)
    return [x.requires_grad_(), labels]


def with_environment(loss: Loss, **environment: object) -> Loss:
    """`loss` under INFONCE_ variables, and with the same random negatives each time."""
    names = {f"INFONCE_{name.upper()}": str(value) for name, value in environment.items()}

    def call(sentences: Tensor, labels: Tensor) -> Tensor:
        before = {name: value for name, value in os.environ.items() if name.startswith("INFONCE_")}
        np.random.seed(0)
        try:
            os.environ.update(names)
            return loss({"last_hidden_state": sentences}, labels)
        finally:
            for name in names:
                os.environ.pop(name)
            os.environ.update(before)

    return call


def cases() -> list[PeerCase]:
    from cl_kernels.integrations import swift as ours

    def case(documents: Sequence[int], **environment: object) -> PeerCase:
        given = {name: environment.pop(name) for name in ("measured",) if name in environment}
        options = [f"{name}={value}" for name, value in environment.items()]
        inputs = partial(grouped, documents, width=128 if "measured" in given else 32)

        def make(module: Any) -> Loss:
            return with_environment(module.InfonceLoss(None, None), **environment)

        title = ", ".join([f"documents={documents}", *options])
        return PeerCase(LOSS, title, partial(make, library()), partial(make, ours), inputs, **given)

    found: list[PeerCase] = []
    for documents, hard in ((EQUAL, ""), (RAGGED, ""), ((3, 5, 2, 4), 3)):
        common = {"hard_negatives": hard} if hard else {}
        for qq, dd, mask in product((False, True), repeat=3):
            flags = {"include_qq": qq, "include_dd": dd, "mask_fake_negative": mask}
            found.append(case(documents, **common, **{name: on for name, on in flags.items() if on}))
        found.append(case(documents, use_batch=False, **common))
        found.append(case(documents, use_batch="0", temperature=0.02, **common))
    for documents in ((1,), EQUAL, RAGGED):
        found.append(case(documents, temperature=0.02))
        found.append(case(documents, mask_fake_negative="yes", fake_neg_margin=0, include_qq=1, include_dd=1))
    everything = {"include_qq": True, "include_dd": True}
    found += [
        case((2,), hard_negatives=1, **everything),
        case((1,), **everything),
        case((5, 2), hard_negatives=1, use_batch=False),
        case((1,), measured=4096),
        case((1,), measured=4096, mask_fake_negative=True, temperature=0.05, **everything),
        case((1, 2), measured=1024),
    ]
    return found
