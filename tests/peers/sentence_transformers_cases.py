"""The losses of sentence-transformers, on embeddings that a stand-in for a model hands through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, combinations, product
from typing import Any

import torch
from torch import Tensor, nn

from .cases import Loss, PeerCase, features

NEEDS = ("sentence_transformers",)

DIRECTIONS = ("query_to_query", "doc_to_query", "doc_to_doc")
SUBSETS = [
    ("query_to_doc", *extra) for extra in chain.from_iterable(combinations(DIRECTIONS, r) for r in range(4))
]
SYMMETRIC = ("query_to_doc", "doc_to_query")
HARDNESS = (None, "in_batch_negatives", "hard_negatives", "all_negatives")
RANKING = "sentence_transformers.MultipleNegativesRankingLoss"
CACHED_RANKING = "sentence_transformers.CachedMultipleNegativesRankingLoss"
GIST = "sentence_transformers.GISTEmbedLoss"
CACHED_GIST = "sentence_transformers.CachedGISTEmbedLoss"
MINI_BATCH = 7


class Given(nn.Module):
    """A model whose embeddings stand in the features, under its name."""

    max_seq_length = 8

    def __init__(self, name: str = "model") -> None:
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast

        super().__init__()
        self.name = name
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"word": 0})))

    def __getitem__(self, i: int) -> nn.Module:
        return nn.Identity()

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features[self.name]}


def columns(
    count: int, rows: int, dtype: torch.dtype, generator: torch.Generator, width: int = 32
) -> list[Tensor]:
    """Embeddings of so many columns; the rows of one sample are alike."""
    sample = features(rows, width, dtype, generator, requires_grad=False)
    found = [
        0.3 * sample + features(rows, width, dtype, generator, requires_grad=False) for _ in range(count)
    ]
    return [x.requires_grad_() for x in found]


def with_guide(
    count: int, rows: int, dtype: torch.dtype, generator: torch.Generator, width: int = 32
) -> list[Tensor]:
    """Embeddings, then the guide's of a width of their own, some pairs of which are equal."""
    own = columns(count, rows, dtype, generator, width)
    noise = [features(rows, 24, dtype, generator, requires_grad=False) for _ in own]
    guide = [x.detach()[:, :24] + 0.5 * y for x, y in zip(own, noise, strict=True)]
    guide[1][3], guide[0][5], guide[-1][7] = guide[1][2], guide[0][4], guide[1][7]
    return [*own, *guide]


def mini_batches(columns: Sequence[Tensor], rows: int = MINI_BATCH) -> list[list[Tensor]]:
    return [list(x.split(rows)) for x in columns]


def from_embeddings(loss: Any) -> Loss:
    return lambda *embeddings: loss.compute_loss_from_embeddings(list(embeddings), None)


def from_mini_batches(loss: Any) -> Loss:
    return lambda *embeddings: loss.calculate_loss(mini_batches(embeddings, loss.mini_batch_size))


def from_features(loss: Any) -> Loss:
    def call(*tensors: Tensor) -> Tensor:
        half = len(tensors) // 2
        pairs = zip(tensors[:half], tensors[half:], strict=True)
        return loss([{"model": x, "guide": y} for x, y in pairs], None)

    return call


def from_guided_mini_batches(loss: Any) -> Loss:
    def call(*tensors: Tensor) -> Tensor:
        parts = mini_batches(tensors, loss.mini_batch_size)
        return loss.calculate_loss(parts[: len(parts) // 2], parts[len(parts) // 2 :])

    return call


def with_scale(loss: Any) -> Loss:
    """Embeddings and a scale, which gets its gradient."""

    def call(*tensors: Tensor) -> Tensor:
        loss.scale = tensors[-1]
        return loss.compute_loss_from_embeddings(list(tensors[:-1]), None)

    return call


def columns_and_scale(count: int, rows: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    return [*columns(count, rows, dtype, generator), torch.tensor(15.0, dtype=dtype, requires_grad=True)]


def cases() -> list[PeerCase]:
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import cos_sim, dot_score, euclidean_sim

    from cl_kernels.integrations import sentence_transformers as ours

    def case(
        loss: str,
        call: Callable[[Any], Loss],
        inputs: partial[list[Tensor]],
        kind: str | None = None,
        **options: Any,
    ) -> PeerCase:
        kind = kind or loss.split(".")[1]
        given = {name: options.pop(name) for name in ("fused", "measured") if name in options}
        models = ("model", "guide") if "GIST" in kind else ("model",)
        shown = [kind, call.__name__, f"{inputs.args[0]} columns"]
        shown += [f"{name}={getattr(x, '__name__', x)}" for name, x in options.items()]

        def make(module: Any) -> Loss:
            return call(getattr(module, kind)(*map(Given, models), **options))

        return PeerCase(
            loss, ", ".join(shown[1:] if loss.split(".")[1] == kind else shown),
            partial(make, losses), partial(make, ours), inputs, **given,
        )  # fmt: skip

    scaled = partial(columns_and_scale, 3)
    pair, triple, four = (partial(columns, n) for n in (2, 3, 4))
    found: list[PeerCase] = []
    for directions, hardness, inputs in product(SUBSETS, HARDNESS, (pair, four)):
        options: dict[str, Any] = {"directions": directions}
        if hardness is not None:
            options |= {"hardness_mode": hardness, "hardness_strength": 5.0}
        found.append(case(RANKING, from_embeddings, inputs, **options))
        if directions in (SUBSETS[0], SYMMETRIC):
            found.append(case(RANKING, from_embeddings, inputs, partition_mode="per_direction", **options))
    for directions in SUBSETS:
        product_of = {"similarity_fct": dot_score, "scale": 0.5, "directions": directions}
        found.append(case(RANKING, from_embeddings, triple, **product_of))
        found.append(
            case(CACHED_RANKING, from_mini_batches, triple, mini_batch_size=7, directions=directions)
        )
    wide = partial(columns, 2, width=128)
    everything = {"directions": SUBSETS[-1]}
    for hardness in HARDNESS[1:]:
        harder = {"hardness_mode": hardness, "hardness_strength": 9.0}
        found += [
            case(CACHED_RANKING, from_mini_batches, four, mini_batch_size=5, **harder),
            case(RANKING, from_embeddings, triple, similarity_fct=dot_score, scale=0.5, **harder),
            case(RANKING, with_scale, scaled, directions=SYMMETRIC, **harder),
        ]
    found += [
        case(RANKING, from_embeddings, wide, measured=4096),
        case(RANKING, from_embeddings, wide, measured=4096, scale=10.0, **everything),
        case(
            RANKING, from_embeddings, wide, measured=4096, scale=30.0,
            directions=SYMMETRIC, partition_mode="per_direction",
        ),
        case(
            RANKING, from_embeddings, wide, measured=4096,
            hardness_mode="in_batch_negatives", hardness_strength=9.0,
        ),
        case(RANKING, with_scale, scaled),
        case(RANKING, from_embeddings, triple, kind="MultipleNegativesSymmetricRankingLoss"),
        case(RANKING, from_embeddings, pair, similarity_fct=cos_sim, scale=100.0),
        case(RANKING, from_embeddings, pair, similarity_fct=euclidean_sim, scale=1.0, fused=False),
        case(CACHED_RANKING, from_mini_batches, wide, measured=4096),
        case(
            CACHED_RANKING, from_mini_batches, triple,
            kind="CachedMultipleNegativesSymmetricRankingLoss", mini_batch_size=7,
        ),
        case(CACHED_RANKING, from_mini_batches, pair, similarity_fct=euclidean_sim, scale=1.0, fused=False),
    ]  # fmt: skip

    flags = ("contrast_anchors", "contrast_positives")
    margins = (("absolute", 0.0), ("absolute", 0.1), ("relative", 0.05))
    for (strategy, margin), anchors, positives, count in product(margins, *[(True, False)] * 2, (2, 3)):
        contrast = dict(zip(flags, (anchors, positives), strict=True))
        options = {"temperature": 0.05, "margin_strategy": strategy, "margin": margin, **contrast}
        found.append(case(GIST, from_features, partial(with_guide, count), **options))
        inputs = partial(with_guide, count + 1)
        found.append(case(CACHED_GIST, from_guided_mini_batches, inputs, mini_batch_size=9, **options))
    wide = partial(with_guide, 2, width=128)
    found += [
        case(GIST, from_features, wide, measured=1024),
        case(CACHED_GIST, from_guided_mini_batches, wide, measured=1024),
    ]
    return found
