"""The in-batch losses of sentence-transformers, fused: MultipleNegativesRankingLoss, GISTEmbedLoss, their
cached forms and the symmetric ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.losses import (
    cached_gist_embed,
    cached_multiple_negatives_ranking,
    gist_embed,
    multiple_negatives_ranking,
)
from sentence_transformers.sentence_transformer.losses.matryoshka import CachedLossDecorator
from sentence_transformers.util import batch_to_device, cos_sim, dot_score
from sentence_transformers.util.similarity import pytorch_cos_sim
from torch import Tensor, nn

from .. import autograd, dtypes, validation
from ..losses._common import beside, in_chunks, log_add, own_similarity
from ..problem import Contrast
from ._dtypes import cross_entropy_dtype, logsumexp_dtype
from ._formulas import plain_cross_entropy
from ._registry import passed_on
from ._swap import Unfused, fused

__getattr__ = passed_on(losses)

_LOSSES = "sentence_transformers.sentence_transformer.losses"
_COSINES = (cos_sim, pytorch_cos_sim)


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    r"""sentence-transformers' loss of that name, without its matrices.

    With unit rows q of the anchors and d of the documents (the positives, then each column of hard
    negatives), s = `scale`, and the blocks of logits of row i that `directions` names

    .. math::
        s\, q_i \cdot d_j, \qquad s\, q_i \cdot q_j\ (j \ne i), \qquad s\, d_i \cdot q_j, \qquad
        s\, d_i \cdot d_j\ (j \text{ of another row})

    the loss is the mean of :math:`\log \sum e^{\cdot} - s\, q_i \cdot d_i`, one sum over all blocks for
    `partition_mode` "joint", the mean of one a block for "per_direction". Hardness multiplies a logit
    :math:`s\, q_i \cdot d_j` by (s + strength) / s, and its gradient by nothing.

    Fused are `cos_sim` and `dot_score` on dense embeddings [N, D].
    """

    @fused(f"{_LOSSES}.multiple_negatives_ranking:MultipleNegativesRankingLoss.compute_loss_from_embeddings")
    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        return _ranking_loss(self, multiple_negatives_ranking, embeddings)


class CachedMultipleNegativesRankingLoss(losses.CachedMultipleNegativesRankingLoss):
    """`MultipleNegativesRankingLoss` on embeddings whose gradients are cached, in one pass."""

    @fused(f"{_LOSSES}.cached_multiple_negatives_ranking:CachedMultipleNegativesRankingLoss.calculate_loss")
    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        embeddings = [torch.cat(column) for column in reps]
        loss = _ranking_loss(self, cached_multiple_negatives_ranking, embeddings)
        return _with_backward(loss, with_backward)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # by the library, of whose names these are

    class MultipleNegativesSymmetricRankingLoss(
        MultipleNegativesRankingLoss, losses.MultipleNegativesSymmetricRankingLoss
    ):
        """`MultipleNegativesRankingLoss` of anchors over documents and of positives over anchors."""

    class CachedMultipleNegativesSymmetricRankingLoss(
        CachedMultipleNegativesRankingLoss, losses.CachedMultipleNegativesSymmetricRankingLoss
    ):
        """`MultipleNegativesSymmetricRankingLoss` on embeddings whose gradients are cached."""


class GISTEmbedLoss(losses.GISTEmbedLoss):
    r"""sentence-transformers' loss of that name, in bounded memory.

    Row i contrasts its anchor with every positive, anchor and negative, and its positive with every positive,
    at :math:`\cos / \tau`, where the guide finds the pair no more similar than the row's own positive, less
    the margin:

    .. math:: \ell_i = \log \sum_{j:\, t_{ij} \le t_i^+ - m} e^{s_{ij} / \tau} - s_i^+ / \tau

    Rows are walked in chunks, whose similarities the backward computes again.
    """

    @fused(f"{_LOSSES}.gist_embed:GISTEmbedLoss.forward", relies_on=("sim_matrix",))
    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        _refuse_other_parts(self)
        if not isinstance(sentence_features, list | tuple) or len(sentence_features) not in (2, 3):
            raise Unfused("the columns are not a list of an anchor, a positive and at most one negative")
        features = list(sentence_features)
        for_guide = [dict(column) for column in features]  # the model adds what it finds to its own
        embeddings = embed_columns(self.model, features)
        with torch.no_grad():
            if self.must_retokenize:
                for_guide = [_retokenized(self, column) for column in features]
            guides = embed_columns(self.guide, for_guide)
        return _guided_loss(self, gist_embed, embeddings, guides)


class CachedGISTEmbedLoss(losses.CachedGISTEmbedLoss):
    """`GISTEmbedLoss`, with any number of negatives, on embeddings whose gradients are cached."""

    @fused(f"{_LOSSES}.cached_gist_embed:CachedGISTEmbedLoss.calculate_loss", relies_on=("sim_matrix",))
    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        _refuse_other_parts(self)
        if len(reps) != len(reps_guided) or len(reps) < 2:
            raise Unfused("the columns are not an anchor, a positive and negatives")
        embeddings, guides = ([torch.cat(column) for column in columns] for columns in (reps, reps_guided))
        loss = _guided_loss(self, cached_gist_embed, embeddings, guides)
        return _with_backward(loss, with_backward)


def rebind(twin: nn.Module) -> None:
    """Let what MatryoshkaLoss put over a cached loss call the method of the loss's twin."""
    over = vars(twin).get("calculate_loss")
    if isinstance(over, CachedLossDecorator):
        over = copy.copy(over)
        over.fn = partial(type(twin).calculate_loss, twin)  # type: ignore[attr-defined]
        vars(twin)["calculate_loss"] = over


def _with_backward(loss: Tensor, wanted: bool) -> Tensor:
    if wanted:
        loss.backward()
        return loss.detach()
    return loss


class _Rows(NamedTuple):
    """Anchors and documents that are compared: rows of this process, keys of all."""

    queries: Tensor  # [W, D]
    docs: list[Tensor]  # [W, D] each, positives first
    first: int  # row i of this process is key first + i
    n: int

    def here(self, x: Tensor) -> Tensor:
        return x if self.alone else x[self.first : self.first + self.n]

    @property
    def keys(self) -> Tensor:
        return self.docs[0] if len(self.docs) == 1 else torch.cat(self.docs)

    @property
    def alone(self) -> bool:
        """Whether all keys are of this process."""
        return self.n == self.queries.shape[0]


def _ranking_loss(loss: Any, home: ModuleType, embeddings: Sequence[Tensor]) -> Tensor:
    """The mean over rows, in the library's dtype; `home` is its module, whose collectives are used."""
    embeddings = _floats(embeddings)
    return _ranking_rows(loss, home, embeddings).mean().to(logsumexp_dtype(embeddings[0]))


@dtypes.full_precision
def _ranking_rows(loss: Any, home: ModuleType, embeddings: list[Tensor]) -> Tensor:
    if loss.similarity_fct not in (*_COSINES, dot_score):
        raise Unfused("similarity_fct is neither cos_sim nor dot_score")
    scale = validation.scale("scale", loss.scale, embeddings[0])
    n, first = embeddings[0].shape[0], 0
    if loss.gather_across_devices:
        first = home.get_rank() * n
        embeddings = [home.all_gather_with_grad(x) for x in embeddings]
    if loss.similarity_fct in _COSINES:
        embeddings = [F.normalize(x, dim=1) for x in embeddings]
    blocks = _above_positive(loss, _Rows(embeddings[0], embeddings[1:], first, n), scale)
    if loss.partition_mode == "per_direction":
        return torch.stack(blocks).mean(0)
    found = blocks[0]
    for block in blocks[1:]:
        found = log_add(found, block)
    return found


def _floats(embeddings: Sequence[Tensor]) -> list[Tensor]:
    """The embeddings in at least float32, all of one shape."""
    if len(embeddings) < 2:
        raise Unfused("there are no documents")
    if any(x.is_sparse for x in embeddings):
        raise Unfused("the embeddings are sparse")
    if any(x.dim() != 2 or x.shape != embeddings[0].shape for x in embeddings):
        raise Unfused("the columns are not matrices of one shape")
    if not embeddings[0].numel():
        raise Unfused("the batch is empty")
    found = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in embeddings]
    if any((x.dtype, x.device) != (found[0].dtype, found[0].device) for x in found):
        raise Unfused("the columns are of different dtypes or devices")
    return found


def _above_positive(loss: Any, rows: _Rows, scale: float | Tensor) -> list[Tensor]:
    """For each direction its log-sum-exp, less the positive's logit, [N] each."""
    queries, docs = rows.here(rows.queries), rows.here(rows.docs[0])
    directions = loss.directions
    backward = None
    if loss.hardness_mode is not None and loss.hardness_strength > 0:
        positive = own_similarity(queries, docs, scale)
        found = [beside(_harder_negatives(loss, rows, scale), positive)]
    else:
        both_axes = rows.alone and "doc_to_query" in directions
        own = torch.arange(rows.first, rows.first + rows.n, device=queries.device)
        problem = Contrast(queries, rows.keys, scale, positive_index=own, both_axes=both_axes)
        stats = autograd.contrastive(problem, first_positive=rows.first)
        positive = stats.positive_sum
        found = [stats.lse - positive]
        if both_axes:
            backward = stats.lse_cols[: rows.n]
    if "query_to_query" in directions:
        keys = None if rows.alone else rows.queries
        found.append(autograd.contrastive(Contrast(queries, keys, scale, rows.first)).lse - positive)
    if "doc_to_query" in directions:
        if backward is None:
            backward = autograd.contrastive(Contrast(docs, rows.queries, scale)).lse
        found.append(backward - positive)
    if "doc_to_doc" in directions:
        found.append(_other_documents(docs, rows, scale) - positive)
    return found


def _other_documents(q: Tensor, rows: _Rows, scale: float | Tensor) -> Tensor:
    """The log-sum-exp of each row of `q` over the documents of other rows."""
    if len(rows.docs) == 1:
        own_keys = rows.alone and q is rows.docs[0]
        return autograd.contrastive(Contrast(q, None if own_keys else rows.docs[0], scale, rows.first)).lse
    of = torch.arange(rows.queries.shape[0], device=q.device)
    return autograd.contrastive(
        Contrast(
            q, rows.keys, scale, row_labels=rows.here(of), col_labels=of.repeat(len(rows.docs)),
            among="different",
        )
    ).lse  # fmt: skip


def _harder_negatives(loss: Any, rows: _Rows, scale: float | Tensor) -> Tensor:
    """The log-sum-exp of each anchor over all documents but its positive, some of them made harder."""
    harder = scale + loss.hardness_strength
    share = scale / harder
    if isinstance(scale, Tensor) and isinstance(share, Tensor):
        share = share.detach()
        harder = (scale + loss.hardness_strength).detach() + (scale - scale.detach()) / share

    def weighted(x: Tensor) -> Tensor:
        """x with `share` of its gradient: hardness changes a logit's value alone."""
        return share * x + (1 - share) * x.detach()  # also of -inf

    queries = rows.here(rows.queries)
    if loss.hardness_mode == "all_negatives":
        return weighted(autograd.contrastive(Contrast(queries, rows.keys, harder, rows.first)).lse)
    own = [rows.here(x) for x in rows.docs[1:]]
    if loss.hardness_mode == "in_batch_negatives":
        negatives = weighted(_other_documents(queries, rows, harder))
        similarities = [own_similarity(queries, x, scale) for x in own]
    else:
        negatives = _other_documents(queries, rows, scale)
        similarities = [weighted(own_similarity(queries, x, harder)) for x in own]
    for similarity in similarities:
        negatives = log_add(similarity, negatives)
    return negatives


def _refuse_other_parts(loss: Any) -> None:
    """Raise `Unfused` where a GIST loss has had its cosine or its cross-entropy changed."""
    cosine = loss.similarity_fct
    if type(cosine) is not nn.CosineSimilarity or cosine.dim != -1:
        raise Unfused("similarity_fct is not the cosine over the last dimension")
    if not plain_cross_entropy(loss.cross_entropy_loss):
        raise Unfused("cross_entropy_loss is another one")
    if loss.margin_strategy not in ("absolute", "relative"):
        raise Unfused("margin_strategy is unknown")


def _retokenized(loss: Any, column: dict[str, Tensor]) -> dict[str, Any]:
    """The texts of a column as the guide reads them."""
    tokens: Any = column["input_ids"]
    if "cu_seq_lens_q" in column:  # texts one after the other, in one row
        bounds = column["cu_seq_lens_q"].tolist()
        tokens = [x.tolist() for x in tokens[0].tensor_split(bounds[1:-1])]
    texts = loss.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    found: dict[str, Any] = batch_to_device(loss.guide.preprocess(texts), loss.guide.device)
    return found


def _guided_loss(
    loss: Any, home: ModuleType, embeddings: Sequence[Tensor], guides: Sequence[Tensor]
) -> Tensor:
    """The mean over rows, as for `_ranking_loss`."""
    return _guided_rows(loss, home, embeddings, guides).mean().to(cross_entropy_dtype(embeddings[0]))


@dtypes.full_precision
def _guided_rows(
    loss: Any, home: ModuleType, embeddings: Sequence[Tensor], guides: Sequence[Tensor]
) -> Tensor:
    n = embeddings[0].shape[0]
    offset = home.get_rank() * n if loss.gather_across_devices else 0
    model = _sides(loss, home, embeddings, offset)
    with torch.no_grad():
        guide = _sides(loss, home, guides, offset)
    columns = sum(keys.shape[0] for keys in model[1::2])
    scale, margin, relative = 1.0 / loss.temperature, loss.margin, loss.margin_strategy == "relative"

    def chunk(first: int, last: int, *sides: Tensor) -> tuple[Tensor]:
        model, guide = sides[: len(sides) // 2], sides[len(sides) // 2 :]
        scores = _similarities(model, first, last, scale)
        rows = torch.arange(last - first, device=scores.device)
        positives = rows + offset + first
        with torch.no_grad():
            guided = _similarities(guide, first, last)
            limit = guided[rows, positives]
            limit = limit - (limit.abs() * margin if relative else margin)
            false = guided > limit[:, None]
            false[rows, positives] = False
        scores = scores.masked_fill(false, -torch.inf)
        return (scores.logsumexp(1) - scores[rows, positives],)

    (rows,) = in_chunks(n, columns, chunk, *model, *guide)
    return rows


def _sides(loss: Any, home: ModuleType, embeddings: Sequence[Tensor], offset: int) -> list[Tensor]:
    """The sides that are compared, rows and keys by turns: anchors with all, and positives with positives.
    The positives are the first keys."""
    eps = loss.similarity_fct.eps
    anchors, positives, *negatives = (_cosine_rows(x, eps) for x in embeddings)
    if loss.gather_across_devices:
        positives, *negatives = (home.all_gather_with_grad(x) for x in (positives, *negatives))
    keys = torch.cat([positives, *([anchors] if loss.contrast_anchors else []), *negatives])
    if not loss.contrast_positives:
        return [anchors, keys]
    return [anchors, keys, positives[offset : offset + anchors.shape[0]], positives]


def _cosine_rows(x: Tensor, eps: float) -> Tensor:
    """Rows over their norms as torch.nn.CosineSimilarity takes them."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / (norm + (norm.clamp_min(eps) - norm).detach())


def _similarities(sides: Sequence[Tensor], first: int, last: int, scale: float = 1.0) -> Tensor:
    parts = [
        autograd.similarity(q[first:last], k, scale, normalize=False)
        for q, k in zip(sides[::2], sides[1::2], strict=True)
    ]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]
