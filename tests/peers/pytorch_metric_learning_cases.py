"""pytorch-metric-learning: SupConLoss and NTXentLoss with their options, and inside of its wrappers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .cases import Loss, PeerCase, features

NEEDS = ("pytorch_metric_learning",)
LABELS = {
    "classes": lambda n: torch.arange(n) * 7 % max(n // 6, 2),
    "pairs": lambda n: torch.arange(n) % (n // 2),
    "uneven": lambda n: torch.arange(n).float().sqrt().long(),  # the first alone, then 3, 5, ...
    "alone": lambda n: torch.arange(n).clamp(min=n - 3),  # but for the last three all alone
    "same": lambda n: torch.zeros(n, dtype=torch.int64),  # no negatives
    "different": lambda n: torch.arange(n),  # no positives
    "bytes": lambda n: (torch.arange(n) % 5).to(torch.uint8),
}


def cases() -> list[PeerCase]:
    from pytorch_metric_learning import distances, losses, reducers, regularizers, utils
    from pytorch_metric_learning.miners import MultiSimilarityMiner, TripletMarginMiner

    from cl_kernels.integrations import pytorch_metric_learning as ours

    found: list[PeerCase] = []

    def add(
        options: str,
        loss: Callable[[Any, str], Loss],
        inputs: Sequence[Callable[[int], Tensor]] = (LABELS["classes"],),
        *,
        only: Sequence[str] = ("SupConLoss", "NTXentLoss"),
        refs: int | None = None,
        **more: Any,
    ) -> None:
        """A case of each loss, of embeddings, references (`refs` more than embeddings) and integers."""

        def example(rows: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
            width = 128 if more.get("measured") else 32
            embeddings = [features(rows, width, dtype, generator)]
            if refs is not None:
                embeddings.append(features(rows + refs, width, dtype, generator))
            return [*embeddings, *(make(rows) for make in inputs)]

        for name in only:
            found.append(
                PeerCase(
                    f"pytorch_metric_learning.{name}",
                    options,
                    lambda name=name: loss(losses, name),
                    lambda name=name: loss(ours, name),
                    example,
                    **more,
                )
            )

    def plain(**options: Any) -> Callable[[Any, str], Loss]:
        return lambda module, name: getattr(module, name)(**options)

    add("plain", plain(), only=["SupConLoss"], measured=4096)
    add("plain", plain(), only=["NTXentLoss"])
    for kind, labels in LABELS.items():
        if kind != "classes":
            add(f"labels {kind}", plain(temperature=0.2), [labels])
    add("temperature=0.02", plain(temperature=0.02))
    add("rows=1", plain(), rows=1)
    add("rows=2", plain(), [LABELS["same"]], rows=2)

    for text, distance in {
        "cosine": distances.CosineSimilarity(),
        "cosine, p=1": distances.CosineSimilarity(p=1),
        "dot product": distances.DotProductSimilarity(normalize_embeddings=False),
        "dot product, p=3": distances.DotProductSimilarity(p=3),
        "squared distance": distances.LpDistance(power=2),
    }.items():
        temperature = 3.0 if text == "dot product" else 0.3
        add(text, plain(distance=distance, temperature=temperature))
    add(
        "squared distance, not normalised",
        plain(distance=distances.LpDistance(power=2, normalize_embeddings=False), temperature=20.0),
    )
    for text, distance in {
        "distance": distances.LpDistance(),
        "squared similarity": distances.CosineSimilarity(power=2),
        "signal to noise": distances.SNRDistance(),
    }.items():
        add(text, plain(distance=distance, temperature=0.3), fused=False)

    far = distances.DotProductSimilarity(normalize_embeddings=False)
    add("losses beyond their bound", plain(distance=far, temperature=0.05))

    class_weights = torch.linspace(0.5, 2, 24)
    for text, reducer in {
        "mean": reducers.MeanReducer(),
        "sum": reducers.SumReducer(),
        "non-zero": reducers.AvgNonZeroReducer(),
        "threshold": reducers.ThresholdReducer(low=1.0, high=5.0),
        "high threshold": reducers.ThresholdReducer(high=5.0),
        "class weights": reducers.ClassWeightedReducer(class_weights),
        "per anchor": reducers.PerAnchorReducer(reducers.AvgNonZeroReducer()),
        "several": reducers.MultipleReducers({"loss": reducers.MeanReducer()}),
    }.items():
        for labels in ("classes", "uneven", "same", "different"):
            add(f"reducer {text}, {labels}", plain(reducer=reducer), [LABELS[labels]])
        add(f"reducer {text}, pairs", plain(reducer=reducer), [LABELS["pairs"]], only=["NTXentLoss"])

    def weighted(found: Any) -> Tensor:
        """The losses of a reducer that does nothing, by their indices."""
        indices = found["loss"]["indices"]
        seen = indices if isinstance(indices, Tensor) else (indices[0] * 100 + indices[1]) % 97
        # The gradient of a row alone is NaN in the library where 4 or more arrives.
        return found["loss"]["losses"] * (1 + seen) / 1000

    def nothing_done(module: Any, name: str) -> Loss:
        loss = getattr(module, name)(reducer=reducers.DoNothingReducer())

        return lambda embeddings, labels: weighted(loss(embeddings, labels))

    add("reducer nothing", nothing_done)
    add("reducer nothing, uneven", nothing_done, [LABELS["uneven"]])
    add("regularizer", plain(embedding_regularizer=regularizers.LpRegularizer(), embedding_reg_weight=0.1))

    def with_refs(**options: Any) -> Callable[[Any, str], Loss]:
        def make(module: Any, name: str) -> Loss:
            loss = getattr(module, name)(**options)
            return lambda x, refs, *labels: loss(
                x, labels[0], ref_emb=refs, ref_labels=labels[1] if len(labels) > 1 else None
            )

        return make

    more = [LABELS["classes"], lambda n: torch.arange(n + 8) * 5 % (n // 4)]
    add("references", with_refs(), more, refs=8)
    add("references, non-zero", with_refs(reducer=reducers.AvgNonZeroReducer()), more, refs=8)
    add("references without labels", with_refs(), refs=0)
    add("more references than labels", with_refs(), refs=5)
    add(
        "references of one class",
        with_refs(),
        [LABELS["classes"], lambda n: torch.zeros(n + 8).long()],
        refs=8,
    )
    add("a reference each", with_refs(), [LABELS["different"], LABELS["different"]], refs=0)
    add("one row", with_refs(), [LABELS["same"], lambda n: torch.arange(n + 1)], refs=1, rows=1)
    add(
        "one row, three references",
        with_refs(),
        [LABELS["same"], lambda n: torch.arange(n + 2)],
        refs=2,
        rows=1,
    )

    def mined(
        miner: Callable[[], Any], with_labels: bool = True, **options: Any
    ) -> Callable[[Any, str], Loss]:
        def make(module: Any, name: str) -> Loss:
            loss = getattr(module, name)(**options)

            def of_pairs(x: Tensor, labels: Tensor) -> Tensor:
                pairs = miner()(x.detach(), labels)
                return loss(x, labels if with_labels else None, pairs)

            return of_pairs

        return make

    def picked(positives: slice, negatives: slice, again: int = 0) -> Callable[[], Any]:
        """Some of all pairs by label, and `again` of them another time."""

        def of(x: Tensor, labels: Tensor) -> list[Tensor]:
            pairs = utils.loss_and_miner_utils.get_all_pairs_indices(labels)
            kept = [
                part[chosen] for part, chosen in zip(pairs, (positives,) * 2 + (negatives,) * 2, strict=True)
            ]
            return [torch.cat([part, part[:again]]) for part in kept]

        return lambda: of

    every, none = slice(None), slice(0)
    for text, miner in {
        "similarities mined": MultiSimilarityMiner,
        "triplets mined": lambda: TripletMarginMiner(margin=0.3),
        "all pairs": picked(every, every),
        "few pairs": picked(slice(None, None, 9), slice(None, None, 60)),
        "no negatives": picked(every, none),
        "no positives": picked(none, every),
        "one pair each": picked(slice(1), slice(1)),
        "pairs twice": picked(every, every, again=9),
    }.items():
        add(text, mined(miner))
        add(f"{text}, no labels", mined(miner, with_labels=False, reducer=reducers.AvgNonZeroReducer()))

    def in_memory(steps: int, size: int, mask: bool = False, **options: Any) -> Callable[[Any, str], Loss]:
        def make(module: Any, name: str) -> Loss:
            memory = module.CrossBatchMemory(getattr(module, name)(**options), 32, memory_size=size)

            def last(x: Tensor, labels: Tensor) -> Tensor:
                chosen = torch.arange(len(x)) % 3 == 0 if mask else None
                for step in range(steps):
                    memory(x.detach().roll(step, 0) * (1 + step), labels.roll(2 * step), enqueue_mask=chosen)
                found = memory(x, labels, enqueue_mask=chosen)
                return weighted(found) if isinstance(found, dict) else found

            return last

        return make

    add("memory, first batch", in_memory(0, 100))
    add("memory, filling", in_memory(2, 100))
    add("memory, full", in_memory(7, 96))
    add("memory, around its end", in_memory(6, 100))
    add("memory, no larger than a batch", in_memory(3, 24))
    add("memory, non-zero", in_memory(3, 60, reducer=reducers.AvgNonZeroReducer()))
    add("memory, all losses", in_memory(5, 100, reducer=reducers.PerAnchorReducer()), only=["SupConLoss"])
    nothing = reducers.DoNothingReducer()
    add("memory, nothing reduced", in_memory(6, 100, reducer=nothing))
    add("memory, some enqueued", in_memory(3, 64, mask=True))
    add("memory, distance", in_memory(3, 64, distance=distances.LpDistance()), fused=False)
    add("memory, one row", in_memory(3, 5), rows=1)
    add(
        "memory, dot product",
        in_memory(
            4, 100, distance=distances.DotProductSimilarity(normalize_embeddings=False), temperature=9.0
        ),
    )

    def self_supervised(symmetric: bool, **options: Any) -> Callable[[Any, str], Loss]:
        return lambda module, name: losses.SelfSupervisedLoss(
            getattr(module, name)(**options), symmetric=symmetric
        )

    add("self-supervised", self_supervised(True), [], refs=0, only=["SupConLoss"])
    # Two rows each: theirs takes 17 GB.
    add("self-supervised", self_supervised(True), [], refs=0, only=["NTXentLoss"], measured=512)
    add("self-supervised, one way", self_supervised(False), [], refs=0)
    add("self-supervised, non-zero", self_supervised(True, reducer=reducers.AvgNonZeroReducer()), [], refs=0)

    def several(module: Any, name: str) -> Loss:
        made = [getattr(module, name)(temperature=tau) for tau in (0.1, 0.5)]
        return losses.MultipleLosses(made, weights=[1.0, 0.3])

    add("several losses", several)
    return found
