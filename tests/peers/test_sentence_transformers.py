"""The adapters of sentence-transformers: models, wrappers, caches, errors, dtypes, processes."""

from __future__ import annotations

import contextlib
import copy
import inspect
import string
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from groups import in_group
from torch import Tensor, nn

import cl_kernels as clk
from cl_kernels import integrations

pytest.importorskip("sentence_transformers")

from peers.sentence_transformers_cases import (
    CACHED_GIST,
    CACHED_RANKING,
    GIST,
    HARDNESS,
    RANKING,
    SUBSETS,
    Given,
    mini_batches,
)
from peers.side_by_side import gradients, ran, runs
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from cl_kernels.integrations import sentence_transformers as ours
from cl_kernels.losses._common import CHUNK_LOGITS

TEXTS = (
    ["a cat", "the dog sat", "blue", "run"],
    ["one cat", "dogs", "red sky", "he ran"],
    ["a stone", "we", "bus", "go home"],
)
WIDTH = 32
KINDS: dict[str, Callable[[Any, Any, Any], nn.Module]] = {
    "ranking": lambda kit, model, guide: kit.MultipleNegativesRankingLoss(model),
    "symmetric": lambda kit, model, guide: kit.MultipleNegativesSymmetricRankingLoss(model),
    "cached": lambda kit, model, guide: kit.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3),
    "cached symmetric": lambda kit, model, guide: kit.CachedMultipleNegativesSymmetricRankingLoss(
        model, mini_batch_size=3
    ),
    "gist": lambda kit, model, guide: kit.GISTEmbedLoss(model, guide),
    "cached gist": lambda kit, model, guide: kit.CachedGISTEmbedLoss(model, guide, mini_batch_size=3),
}
WRAPPERS: dict[str, Callable[[Any, nn.Module], nn.Module]] = {
    "itself": lambda model, loss: loss,
    "matryoshka": lambda model, loss: losses.MatryoshkaLoss(model, loss, [WIDTH, 16]),
    "layers": lambda model, loss: losses.AdaptiveLayerLoss(model, loss, n_layers_per_step=-1),
    "2d": lambda model, loss: losses.Matryoshka2dLoss(
        model, loss, [WIDTH, 16], n_layers_per_step=-1, n_dims_per_step=-1
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[SentenceTransformer, SentenceTransformer]:
    """A model and a guide of random weights, whose words are letters."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    letters = [*string.ascii_lowercase, *(f"##{x}" for x in string.ascii_lowercase)]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64)
    config = BertConfig(
        vocab_size=5 + len(letters), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    found = []
    for name in ("model", "guide"):
        tokenizer.save_pretrained(folder / name)
        BertModel(config).save_pretrained(folder / name)
        parts = [Transformer(str(folder / name)), Pooling(WIDTH)]
        found.append(SentenceTransformer(modules=parts, device="cpu").double())
    return found[0], found[1]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def step(loss: nn.Module, model: SentenceTransformer) -> tuple[Tensor, Tensor]:
    """The loss of TEXTS, and the gradient of all of the model's parameters."""
    model.zero_grad()
    value = loss([model.preprocess(column) for column in TEXTS], None)
    value.backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    return value.detach(), torch.cat([p.grad.flatten() for p in parameters])


def assert_alike(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == y.dtype
        assert (x - y).norm() <= 1e-10 * y.norm()


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", KINDS)
def test_models_are_trained_alike(
    models: tuple[SentenceTransformer, SentenceTransformer], kind: str, wrapper: str
) -> None:
    if "cached" in kind and wrapper in ("layers", "2d"):
        pytest.skip("the library does not combine them")
    model = models[0]
    theirs = WRAPPERS[wrapper](model, KINDS[kind](losses, *models))
    wanted = step(theirs, model)
    imported = WRAPPERS[wrapper](model, KINDS[kind](ours, *models))
    before = integrations.calls()
    twin = clk.accelerate(theirs)
    assert twin is not theirs and isinstance(twin, type(theirs))
    for loss in (imported, twin):
        assert_alike(step(loss, model), wanted)
    untouched = step(theirs, model)
    assert_alike(untouched, wanted)
    with clk.patch("sentence_transformers", verbose=False):
        patched = WRAPPERS[wrapper](model, KINDS[kind](losses, *models))
        assert_alike(step(patched, model), wanted)
    after = integrations.calls()
    new = {name: after[name].fused - before.get(name, integrations.Calls(0, 0)).fused for name in after}
    runs = {name: count for name, count in new.items() if count}
    assert len(runs) == 1 and next(iter(runs.values())) >= 3
    assert all(after[name].fallback == before.get(name, after[name]).fallback for name in after)


def test_names_signatures_and_state_are_the_library_s() -> None:
    for make in KINDS.values():
        theirs, mine = (make(kit, Given("model"), Given("guide")) for kit in (losses, ours))
        assert isinstance(mine, type(theirs)) and type(mine).__name__ == type(theirs).__name__
        assert inspect.signature(type(mine)) == inspect.signature(type(theirs))
        config, own = theirs.get_config_dict(), mine.get_config_dict()
        assert {**config, "guide": None} == {**own, "guide": None}
        assert theirs.state_dict().keys() == mine.state_dict().keys()
        assert type(copy.deepcopy(mine)) is type(mine)
    for kind, name in (
        ("MultipleNegativesRankingLoss", "compute_loss_from_embeddings"),
        ("CachedMultipleNegativesRankingLoss", "calculate_loss"),
        ("GISTEmbedLoss", "forward"),
        ("CachedGISTEmbedLoss", "calculate_loss"),
    ):
        theirs, mine = (getattr(getattr(kit, kind), name) for kit in (losses, ours))
        assert inspect.signature(theirs) == inspect.signature(mine)


def pairs(dtype: torch.dtype = torch.float32, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(12, 16, generator=generator).to(dtype).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_are_the_library_s(dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    x = pairs(dtype)
    guide = [y.detach().float() for y in x]
    for kit in (losses, ours):
        ranking = kit.MultipleNegativesRankingLoss(Given())
        gist = kit.CachedGISTEmbedLoss(Given(), Given("guide"), mini_batch_size=5, temperature=0.1)
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            found = [
                ranking.compute_loss_from_embeddings(x, None),
                gist.calculate_loss(mini_batches(x), mini_batches(guide)),
            ]
        if kit is losses:
            wanted = found
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.02)


def test_without_gradients_and_with_some_alone() -> None:
    x = pairs(torch.float64)
    x[1] = x[1].detach()
    for kit in (losses, ours):
        loss = kit.MultipleNegativesRankingLoss(Given(), directions=SUBSETS[-1])
        with torch.no_grad():
            value = loss.compute_loss_from_embeddings(x, None)
        assert not value.requires_grad
        (gradient,) = torch.autograd.grad(loss.compute_loss_from_embeddings(x, None), x[:1])
        if kit is losses:
            wanted = value, gradient
    assert_alike((value, gradient), wanted)


@pytest.mark.parametrize("hardness", HARDNESS)
def test_one_sample_loses_nothing_to_contrast(hardness: str | None) -> None:
    x = [y[:1].detach().double().requires_grad_() for y in pairs(count=3)]
    for directions in SUBSETS:
        options = {"hardness_mode": hardness, "hardness_strength": 2.0} if hardness else {}
        for kit in (losses, ours):
            loss = kit.MultipleNegativesRankingLoss(Given(), directions=directions, **options)
            value = loss.compute_loss_from_embeddings(x, None)
            gradient = torch.cat(torch.autograd.grad(value, x))
            if kit is losses:
                wanted = value, gradient
        torch.testing.assert_close(value, wanted[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient, wanted[1], rtol=1e-10, atol=1e-12)


def test_a_learnable_scale_has_a_finite_gradient_beside_excluded_pairs() -> None:
    loss = ours.MultipleNegativesRankingLoss(Given(), directions=SUBSETS[-1])
    loss.scale = torch.tensor(20.0, requires_grad=True)  # the library: NaN, from -inf * 0
    loss.compute_loss_from_embeddings(pairs(), None).backward()
    assert loss.scale.grad.isfinite()


def test_equal_texts_are_false_negatives_of_nobody() -> None:
    """Similarities that tie with the positive's are kept, by the library and by ours, whatever the width."""
    for width in (16, 384, 1000):
        generator = torch.Generator().manual_seed(width)
        for dtype in (torch.float32, torch.float64):
            x = [torch.randn(64, width, generator=generator, dtype=dtype) for _ in range(4)]
            for column in (x[:2], x[2:]):
                column[1][9], column[0][20], column[1][30:34] = column[1][40], column[0][50], column[0][30:34]
            values = []
            for kit in (losses, ours):
                loss = kit.CachedGISTEmbedLoss(Given(), Given("guide"), temperature=0.05, mini_batch_size=64)
                values.append(loss.calculate_loss(mini_batches(x[:2], 64), mini_batches(x[2:], 64)))
            torch.testing.assert_close(*values, rtol=1e-5, atol=0)


def test_gist_walks_rows_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(20, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(6)]
    loss = ours.CachedGISTEmbedLoss(Given(), Given("guide"), temperature=0.1)

    def outcome() -> tuple[Tensor, Tensor]:
        value = loss.calculate_loss(mini_batches(x[:3]), mini_batches([y.detach() for y in x[3:]]))
        return value, torch.cat(torch.autograd.grad(value, x[:3]))

    wanted = outcome()
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", 300)
    assert_alike(outcome(), wanted)


@pytest.mark.parametrize("chunk", [150, 2**20])
def test_a_backward_of_gist_inside_of_autocast_is_exact(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", chunk)
    x = pairs(count=4)
    loss = ours.CachedGISTEmbedLoss(Given(), Given("guide"), temperature=0.1)

    def gradient() -> Tensor:
        value = loss.calculate_loss(mini_batches(x[:2]), mini_batches([y.detach() for y in x[2:]]))
        return torch.cat(torch.autograd.grad(value, x[:2]))

    wanted = gradient()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gradient(), wanted)


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("ranking", lambda loss: setattr(loss, "similarity_fct", lambda x, y: x @ y.T)),
        ("gist", lambda loss: setattr(loss, "similarity_fct", nn.CosineSimilarity(dim=1))),
        ("gist", lambda loss: setattr(loss.cross_entropy_loss, "label_smoothing", 0.1)),
        ("gist", lambda loss: setattr(loss, "cross_entropy_loss", nn.MSELoss())),
        ("gist", lambda loss: setattr(loss.cross_entropy_loss, "ignore_index", 0)),
    ],
)
def test_what_was_changed_falls_back(kind: str, spoil: Callable[[Any], None]) -> None:
    loss = KINDS[kind](ours, Given("model"), Given("guide"))
    spoil(loss)
    name = RANKING if kind == "ranking" else GIST
    columns = [{"model": x, "guide": x.detach()} for x in pairs()]
    fused = ran(name).fused
    with contextlib.suppress(IndexError, RuntimeError):  # the library's own
        loss(columns, None)
    assert ran(name).fused == fused


def test_errors_are_the_library_s() -> None:
    loss = ours.MultipleNegativesRankingLoss(Given())
    with pytest.raises(ValueError, match="Expected at least 2 embeddings"):
        loss.compute_loss_from_embeddings(pairs()[:1], None)
    with pytest.raises(ValueError, match="Expected 2 or 3 embeddings"):
        gist = ours.GISTEmbedLoss(Given("model"), Given("guide"))
        gist([{"model": x, "guide": x.detach()} for x in pairs(count=4)], None)
    with pytest.raises(ValueError, match="Scale must be a positive value"):
        ours.MultipleNegativesRankingLoss(Given(), scale=0)
    x, y = pairs()
    unequal = losses.MultipleNegativesRankingLoss(Given()).compute_loss_from_embeddings([x[:5], y], None)
    assert torch.equal(loss.compute_loss_from_embeddings([x[:5], y], None), unequal)


def test_sparse_encoder_losses_are_served_through_the_class_they_inherit() -> None:
    from sentence_transformers.sparse_encoder import losses as sparse

    loss = sparse.SparseMultipleNegativesRankingLoss(Given())
    x = [y.detach().relu().requires_grad_() for y in pairs(torch.float64)]
    wanted = loss.compute_loss_from_embeddings(x, None)
    with runs(RANKING, fused=1):
        torch.testing.assert_close(clk.accelerate(loss).compute_loss_from_embeddings(x, None), wanted)
    with runs(RANKING), pytest.raises(NotImplementedError):  # the library's own
        clk.accelerate(loss).compute_loss_from_embeddings([y.detach().to_sparse() for y in x], None)


def _gathered(rank: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Both libraries' values and gradients of this process's embeddings, its keys those of all."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    generator = torch.Generator().manual_seed(rank)
    x = [torch.randn(6, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    guide = [torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(3)]
    for kit in (losses, ours):
        calls: dict[str, Callable[[], Tensor]] = {}
        for hardness in HARDNESS:
            options: dict[str, Any] = {"directions": SUBSETS[-1], "gather_across_devices": True}
            if hardness is not None:
                options |= {"hardness_mode": hardness, "hardness_strength": 3.0}
            ranking = kit.MultipleNegativesRankingLoss(Given(), **options)
            calls[f"{hardness}"] = lambda ranking=ranking: ranking.compute_loss_from_embeddings(x, None)
            calls[f"{hardness}, a pair"] = lambda ranking=ranking: ranking.compute_loss_from_embeddings(
                x[:2], None
            )
            cached = kit.CachedMultipleNegativesRankingLoss(Given(), mini_batch_size=4, **options)
            calls[f"cached {hardness}"] = lambda cached=cached: cached.calculate_loss(mini_batches(x, 4))
        gist = kit.GISTEmbedLoss(Given("model"), Given("guide"), 0.1, gather_across_devices=True)
        columns = [{"model": y, "guide": z} for y, z in zip(x, guide, strict=True)]
        calls["gist"] = lambda gist=gist, columns=columns: gist(columns, None)
        cached_gist = kit.CachedGISTEmbedLoss(
            Given("model"), Given("guide"), 0.1, mini_batch_size=4, gather_across_devices=True
        )
        calls["cached gist"] = lambda loss=cached_gist: loss.calculate_loss(
            mini_batches(x, 4), mini_batches(guide, 4)
        )
        for name, call in calls.items():
            value = call()
            found.setdefault(name, []).append((value.detach(), gradients(value, x)))
    assert all(
        ran(name).fused and not ran(name).fallback for name in (RANKING, CACHED_RANKING, GIST, CACHED_GIST)
    )
    return found


def test_gathered_over_two_processes(tmp_path: Path) -> None:
    for result in in_group(2, _gathered, tmp_path):
        assert isinstance(result, dict), result
        for theirs, mine in result.values():
            assert_alike(mine, theirs)
