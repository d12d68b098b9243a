"""The adapter of ms-swift: environment, groups, random negatives, processes, and without ms-swift."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from groups import in_group
from peers.side_by_side import runs
from peers.swift_cases import EQUAL, LOSS, NEEDS, RAGGED, grouped, library, with_environment
from torch import Tensor

from cl_kernels.integrations import swift as ours
from cl_kernels.losses._common import CHUNK_LOGITS

HERE = all(map(importlib.util.find_spec, NEEDS))
needs_swift = pytest.mark.skipif(not HERE, reason="ms-swift is not here")


def example(documents: tuple[int, ...] = RAGGED, rows: int = 9) -> tuple[Tensor, Tensor]:
    sentences, labels = grouped(documents, rows, torch.float64, torch.Generator().manual_seed(0))
    return sentences, labels


def plain(sentences: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Each anchor's cross-entropy over the documents of all groups."""
    starts = labels.nonzero()[:, 0]
    anchors = starts + torch.arange(len(starts))
    documents = torch.ones(len(sentences), dtype=torch.bool).index_fill(0, anchors, False)
    logits = sentences[anchors] @ sentences[documents].T / temperature
    return torch.nn.functional.cross_entropy(logits, starts)


@pytest.mark.parametrize("documents", [(1,), EQUAL, RAGGED])
def test_runs_without_the_library(documents: tuple[int, ...]) -> None:
    sentences, labels = example(documents)
    loss = ours.InfonceLoss(None, None)({"last_hidden_state": sentences}, labels, num_items_in_batch=None)
    wanted = plain(sentences, labels)
    torch.testing.assert_close(loss, wanted)
    found, expected = (torch.autograd.grad(x, sentences)[0] for x in (loss, wanted))
    torch.testing.assert_close(found, expected)


def test_megatron_is_told_by_the_name_of_its_trainer() -> None:
    trainer = type("Own", (type("BaseMegatronTrainer", (), {}),), {})()
    assert ours.InfonceLoss(None, trainer).is_megatron and not ours.InfonceLoss(None, None).is_megatron


def test_masked_rows_are_walked_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    sentences, labels = example(rows=20)
    options = {"mask_fake_negative": 1, "fake_neg_margin": 0.05, "include_qq": 1, "include_dd": 1}
    loss = with_environment(ours.InfonceLoss(None, None), **options)

    def outcome() -> tuple[Tensor, Tensor]:
        value = loss(sentences, labels)
        return value, torch.autograd.grad(value, sentences)[0]

    wanted = outcome()
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", 500)
    torch.testing.assert_close(outcome(), wanted)


@pytest.mark.parametrize("chunk", [500, 2**20])
def test_a_backward_inside_of_autocast_is_exact(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", chunk)
    sentences, labels = example(rows=20)
    sentences = sentences.detach().float().requires_grad_()
    loss = with_environment(ours.InfonceLoss(None, None), mask_fake_negative=1, include_qq=1)
    (wanted,) = torch.autograd.grad(loss(sentences, labels), sentences)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(loss(sentences, labels), sentences)
    torch.testing.assert_close(found, wanted)


@needs_swift
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dtypes_are_the_library_s(dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    sentences, labels = example()
    found = []
    for kit in (library(), ours):
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            found.append(kit.InfonceLoss(None, None)({"last_hidden_state": sentences.to(dtype)}, labels))
    assert found[0].dtype == found[1].dtype
    torch.testing.assert_close(*found, rtol=0.02, atol=0.02)


@needs_swift
def test_random_negatives_are_drawn_once_and_alike() -> None:
    inputs = example((3, 5, 2, 4))
    states = []
    for kit in (library(), ours):
        with_environment(kit.InfonceLoss(None, None), hard_negatives=4)(*inputs)
        states.append(np.random.get_state()[2])
    assert states[0] == states[1]


@needs_swift
def test_what_is_not_fused_is_the_library_s() -> None:
    library()
    sentences, labels = example()
    loss = ours.InfonceLoss(None, None)
    with runs(LOSS, fallback=2):  # the library raises in the first two
        with pytest.raises(AssertionError):  # a group of no negatives
            with_environment(loss, hard_negatives=2)(sentences, labels)
        with pytest.raises(ValueError, match="truth value"):
            with_environment(loss, use_batch="perhaps")(sentences, labels)
        margin = with_environment(loss, mask_fake_negative=1, fake_neg_margin=-3)
        assert not margin(sentences, labels).isfinite()
        trailing = with_environment(loss)(torch.cat([sentences, sentences[:3]]), labels)
    torch.testing.assert_close(trailing, plain(sentences, labels))


def _over_processes(rank: int) -> list[tuple[Tensor, Tensor]]:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    found = []
    generator = torch.Generator().manual_seed(rank)
    inputs = [grouped(EQUAL, 6, torch.float64, generator), grouped(RAGGED, 7, torch.float64, generator)]
    for options in ({}, {"include_qq": 1, "include_dd": 1, "mask_fake_negative": 1}, {"use_batch": 0}):
        for sentences, labels in inputs:
            for kit in (library(), ours):
                value = with_environment(kit.InfonceLoss(None, None), **options)(sentences, labels)
                found.append((value.detach(), torch.autograd.grad(value, sentences)[0]))
    return found


@needs_swift
def test_over_two_processes(tmp_path: Path) -> None:
    for result in in_group(2, _over_processes, tmp_path):
        assert isinstance(result, list), result
        for wanted, found in zip(result[::2], result[1::2], strict=True):
            torch.testing.assert_close(found, wanted)


@needs_swift
def test_sequence_parallelism_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    library()
    monkeypatch.setenv("WORLD_SIZE", "2")
    parallel = SimpleNamespace(dp_group=object())
    monkeypatch.setattr(sys.modules["swift.sequence_parallel"], "sequence_parallel", parallel)
    with pytest.raises(ours.Unfused, match="parallel"):
        ours._world_size()
