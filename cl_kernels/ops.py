"""The registered ops `torch.ops.cl_kernels.*`: schemas, formulas and fake kernels.

The default implementation of every op is the function of the same name in `chunked.py`; the compiled
extension registers faster CPU kernels for the same schemas. What GPU tensors go on to, `dispatch.py`
registers: one of two libraries, `torch.ops.cl_kernels_triton.*`, the functions of `triton/entry_points.py`,
and `torch.ops.cl_kernels_cuda.*`, whose kernels the CUDA extension registers. Gradients are attached in
`autograd.py`: the ops themselves are not differentiable.

Common to all: N rows, M columns, D features; features are [N, D] and [M, D] of one dtype, and `k` None means
`q` with itself. "acc" is float64 for float64 features and float32 otherwise. Scales are 0-dim acc tensors, on
the CPU or on the features' device. Statistics of rows (lse, sums and counts of positives, cross) are float64:
their differences decide the gradient of a converged row. Outputs are contiguous and never alias an input;
what was not asked for is empty, [0].

contrastive: S_ij = scale q_i.k_j + key_bias_j
    exclude    offset o: column i + o is left out of row i; None: nothing is
    among      "all" | "same" | "different": Den(i) holds the columns with any / equal / other labels; where
               there are none, and a positive_mask, all / those of weight other than 0, their log w_ij added
               to S_ij / those of weight 0 (one axis; not on GPUs)
    positives  at most one kind: w_ij = 1 where labels are equal (label_positives), w_ij = 1 at column
               positive_index_i (-1: none), or w_ij = positive_mask[i % R, j % C]; 0 at the excluded column,
               except for positive_index
    forward    lse_i = LSE_{j in Den(i)} S_ij (-inf if empty); lse_cols_j = LSE_{i: j in Den(i)} S_ij;
               positive_sum_i = sum_j w_ij scale q_i.k_j; positive_count_i = sum_j w_ij; with save_gradient
               (one axis, keys of their own, positives by index or none): residual = (P - W) k, [N, D] acc,
               P the softmax over Den
    backward   G_ij = g_lse_i exp(S_ij - lse_i) + g_cols_j exp(S_ij - lse_cols_j) [over Den] + g_pos_i w_ij;
               grad_q = scale G k (k None: + scale G^T q); grad_k = scale G^T q;
               grad_scale = sum G o (q k^T); grad_key_bias = column sums of the first two terms;
               needs = (q, k, scale, key_bias); from the residual, where only q and the scale need a gradient

soft_target: S_ij = scale q_i.k_j, T_ij = target_scale t_i.u_j over the concatenated segments of k, target_k
    positive   int64 [N], a column (-1: none): left out of T ("exclude"), or a logit of 0 there ("zero")
    forward    lse, target_lse [N] of S and T; cross_i = sum_j softmax(T)_ij S_ij, 0 if T is empty;
               positive_sum_i = S at the positive; with save_gradient, over the columns but the positive:
               mean_key = softmax(S) k and mean_target_key = softmax(T) k, [N, D]
    backward   G_ij = g_lse_i softmax(S)_ij + g_cross_i softmax(T)_ij + g_pos_i [j = positive_i];
               H_ij = softmax(T)_ij (g_target_lse_i + g_cross_i (S_ij - cross_i)), 0 at the positive;
               grad_q = scale G k; grad_k = scale G^T q; grad_scale = sum G o (q k^T);
               grad_target_q = target_scale H u; grad_target_k = target_scale H^T t;
               grad_target_scale = sum H o (t u^T), 0 unless a target gradient is needed;
               needs = (q, k, target_q, target_k)

dimcl: X [2D, N] holds the centred columns of z0 and z1 [N, D] at unit length, 0 for a constant column;
    S = scale X X^T without its diagonal; positives of row r: (r + D) mod 2D, and positive_mask [2D, 2D]
    forward    lse, positive_sum, positive_count [2D]; mean, rnorm [2, D] of the columns
    backward   dz = rnorm (g - mean(g) - x (x.g)) for each column, g the gradient of its row x of X

similarity: scale q k^T in the dtype of q, of rows at unit length with `normalize`; *_rnorm = 1 / ||row||, 0
    for a zero row; needs = (q, k)

masked_log_softmax: logits - LSE over the included of each row; excluded: -inf, gradient 0

On the CPU alone, by the compiled extension, whole losses with their gradients:

contrastive_loss: factor sum_i l_i, with `mean` over the rows, of which `drop` counts those with positives;
    l_i = lse_i - positive_sum_i / positive_count_i of a problem as above, with both_axes the mean of lse_i
    and lse_cols_i in place of lse_i; 0 in a row without positives or without a denominator, and with
    at_least_zero where rounding put it below. With `unit`, where k is None, of q's rows at unit length. The
    gradients, of those that needs = (q, k, scale) says, are acc tensors, here and below
dimcl_loss: the sum or mean of lse_i - positive_sum_i / positive_count_i as above; needs = (z0, z1, scale)
key_loss: the sum or mean of l_i over keys that get no gradient; S = scale q k^T,
    T = target_scale target_q k^T over the concatenated segments of k, s_i the logit of the positive: column
    positive_i of S, left out of T or with positive_is_zero 0 there, or scale q_i.own_i beside the keys;
    l_i = LSE(S_i, s_i of own) - (1 - coeff) softmax(T)_i . S_i - coeff s_i; without target_q coeff is 1.
    needs = (q, scale)
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import chunked
from .dtypes import accumulate_dtype, statistics_dtype
from .problem import Contrast, SoftTarget, flat

NAMESPACE = "cl_kernels"
TRITON_NAMESPACE = "cl_kernels_triton"
CUDA_NAMESPACE = "cl_kernels_cuda"

_PAIRS = (
    "int? exclude, Tensor? row_labels, Tensor? col_labels, str among, bool label_positives, "
    "Tensor? positive_index, Tensor? positive_mask, Tensor? key_bias, bool both_axes"
)
_TARGETS = (
    "Tensor q, Tensor[] k, Tensor target_q, Tensor[] target_k, Tensor scale, Tensor target_scale, "
    "Tensor? positive, str positive_in_target"
)

SCHEMAS = {
    "contrastive_forward": (
        f"(Tensor q, Tensor? k, Tensor scale, {_PAIRS}, bool save_gradient)"
        " -> (Tensor lse, Tensor lse_cols, Tensor positive_sum, Tensor positive_count, Tensor residual)"
    ),
    "contrastive_backward": (
        "(Tensor? grad_lse, Tensor? grad_lse_cols, Tensor? grad_positive_sum, "
        f"Tensor q, Tensor? k, Tensor scale, {_PAIRS}, Tensor lse, Tensor lse_cols, Tensor residual, "
        "bool[4] needs)"
        " -> (Tensor grad_q, Tensor grad_k, Tensor grad_scale, Tensor grad_key_bias)"
    ),
    "soft_target_forward": (
        f"({_TARGETS}, bool save_gradient)"
        " -> (Tensor lse, Tensor target_lse, Tensor cross, Tensor positive_sum, "
        "Tensor mean_key, Tensor mean_target_key)"
    ),
    "soft_target_backward": (
        "(Tensor? grad_lse, Tensor? grad_target_lse, Tensor? grad_cross, Tensor? grad_positive_sum, "
        f"{_TARGETS}, Tensor lse, Tensor target_lse, Tensor cross, Tensor positive_sum, "
        "Tensor mean_key, Tensor mean_target_key, bool[4] needs)"
        " -> (Tensor grad_q, Tensor[] grad_k, Tensor grad_target_q, Tensor[] grad_target_k, "
        "Tensor grad_scale, Tensor grad_target_scale)"
    ),
    "dimcl_forward": (
        "(Tensor z0, Tensor z1, Tensor scale, Tensor? positive_mask)"
        " -> (Tensor lse, Tensor positive_sum, Tensor positive_count, Tensor mean, Tensor rnorm)"
    ),
    "dimcl_backward": (
        "(Tensor? grad_lse, Tensor? grad_positive_sum, Tensor z0, Tensor z1, Tensor scale, "
        "Tensor? positive_mask, Tensor lse, Tensor mean, Tensor rnorm, bool needs_scale)"
        " -> (Tensor grad_z0, Tensor grad_z1, Tensor grad_scale)"
    ),
    "similarity_forward": (
        "(Tensor q, Tensor? k, Tensor scale, bool normalize) -> (Tensor out, Tensor q_rnorm, Tensor k_rnorm)"
    ),
    "similarity_backward": (
        "(Tensor grad, Tensor q, Tensor? k, Tensor scale, bool normalize, Tensor q_rnorm, Tensor k_rnorm, "
        "bool[2] needs) -> (Tensor grad_q, Tensor grad_k, Tensor grad_scale)"
    ),
    "masked_log_softmax_forward": "(Tensor logits, Tensor? mask) -> Tensor",
    "masked_log_softmax_backward": "(Tensor grad, Tensor output, Tensor? mask) -> Tensor",
}

LOSS_SCHEMAS = {
    "contrastive_loss": (
        f"(Tensor q, Tensor? k, Tensor scale, {_PAIRS}, bool unit, float factor, bool mean, bool drop, "
        "bool at_least_zero, bool[3] needs)"
        " -> (Tensor loss, Tensor grad_q, Tensor grad_k, Tensor grad_scale)"
    ),
    "dimcl_loss": (
        "(Tensor z0, Tensor z1, Tensor scale, Tensor? positive_mask, bool mean, bool[3] needs)"
        " -> (Tensor loss, Tensor grad_z0, Tensor grad_z1, Tensor grad_scale)"
    ),
    "key_loss": (
        "(Tensor q, Tensor[] k, Tensor? target_q, Tensor scale, Tensor? target_scale, Tensor? coeff, "
        "Tensor? own, Tensor? positive, bool positive_is_zero, bool mean, bool[2] needs)"
        " -> (Tensor loss, Tensor grad_q, Tensor grad_scale)"
    ),
}


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


_library = torch.library.Library(NAMESPACE, "DEF")
_triton_library = torch.library.Library(TRITON_NAMESPACE, "DEF")
_cuda_library = torch.library.Library(CUDA_NAMESPACE, "DEF")
_libraries = (_library, _triton_library, _cuda_library)
for _name, _schema in SCHEMAS.items():
    for _each in _libraries:
        _each.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, getattr(chunked, _name), "CompositeExplicitAutograd")

for _name, _schema in LOSS_SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))

_library.define("snapshot(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_clone = functools.partial(torch.clone, memory_format=torch.contiguous_format)
_library.impl("snapshot", _clone, "CompositeExplicitAutograd")


@torch.library.register_fake(f"{NAMESPACE}::snapshot", lib=_library)
def _snapshot(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def snapshot(x: Tensor) -> Tensor:
    """A copy of `x`, which gets no gradient, to be read in the backward when x may have changed in place.

    In a compiled graph by an op: Inductor would leave a clone out, and compute it from x in the backward.
    """
    if torch.compiler.is_compiling():
        return torch.ops.cl_kernels.snapshot(x.detach())
    return _clone(x)


def on_gpus(serve: Callable[..., Any], by_triton: Callable[..., Any]) -> None:
    """Register what GPU tensors go on to, functions of an op's name and arguments: the backend that serves
    them, and Triton."""
    for name in SCHEMAS:
        _library.impl(name, functools.partial(serve, name), "CUDA")
        _triton_library.impl(name, functools.partial(by_triton, name), "CUDA")


def _fake(function: Callable[..., Any]) -> Callable[..., Any]:
    name = function.__name__.removeprefix("_")
    for library in _libraries:
        torch.library.register_fake(f"{library.ns}::{name}", function, lib=library)
    return function


def _fake_loss(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.library.register_fake(f"{NAMESPACE}::{function.__name__[1:]}", function, lib=_library)
    return function


def _empty(like: Tensor, *shape: int, needed: bool = True) -> Tensor:
    """An acc tensor on the device of `like`; [0] where it is not needed."""
    return like.new_empty(shape if needed else (0,), dtype=accumulate_dtype(like.dtype))


def _scalar(like: Tensor, needed: bool) -> Tensor:
    return _empty(like) if needed else _empty(like, 0)


def _rows(like: Tensor, n: int, needed: bool = True) -> Tensor:
    """A statistic of n rows."""
    return like.new_empty((n if needed else 0,), dtype=statistics_dtype(like))


def _gradient(of: Tensor, needed: bool) -> Tensor:
    return of.new_empty(of.shape) if needed else _empty(of, 0)


@_fake
@flat(Contrast)
def _contrastive_forward(problem: Contrast, save_gradient: bool) -> tuple[Tensor, ...]:
    q, n, positives = problem.q, problem.q.shape[0], problem.positives != "none"
    return (
        _rows(q, n),
        _rows(q, problem.keys.shape[0], problem.both_axes),
        _rows(q, n, positives),
        _rows(q, n, positives),
        _empty(q, *q.shape, needed=save_gradient),
    )


@_fake
@flat(Contrast, gradients=3)
def _contrastive_backward(
    grads: Any, problem: Contrast, saved: Any, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    q, keys = problem.q, problem.keys
    needs_q, needs_k, needs_scale, needs_bias = needs
    return (
        _gradient(q, needs_q),
        _gradient(keys, needs_k),
        _scalar(q, needs_scale),
        _empty(q, keys.shape[0], needed=needs_bias),
    )


@_fake_loss
@flat(Contrast)
def _contrastive_loss(problem: Contrast, *options: Any) -> tuple[Tensor, ...]:
    needs_q, needs_k, needs_scale = options[-1]
    needs = needs_q, needs_k and problem.k is not None, needs_scale
    return _loss_and_gradients([problem.q, problem.keys], needs)


@_fake_loss
def _dimcl_loss(z0: Tensor, z1: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _loss_and_gradients([z0, z1], rest[-1])


@_fake_loss
def _key_loss(q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _loss_and_gradients([q], rest[-1])


def _loss_and_gradients(features: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """A loss, its gradients in the features and in the scale."""
    like = features[0]
    pairs = zip(features, needs, strict=False)
    grads = (_empty(like, *x.shape, needed=needed) for x, needed in pairs)
    return _empty(like), *grads, _scalar(like, any(needs))


@_fake
@flat(SoftTarget)
def _soft_target_forward(problem: SoftTarget, save_gradient: bool) -> tuple[Tensor, ...]:
    q, n = problem.q, problem.q.shape[0]
    rows = (_rows(q, n) for _ in range(3))
    means = (_empty(q, *q.shape, needed=save_gradient) for _ in range(2))
    return *rows, _rows(q, n, problem.positive is not None), *means


@_fake
@flat(SoftTarget, gradients=4)
def _soft_target_backward(
    grads: Any, problem: SoftTarget, saved: Any, needs: Sequence[bool]
) -> tuple[Tensor | list[Tensor], ...]:
    q, target_q = problem.q, problem.target_q
    needs_q, needs_k, needs_target_q, needs_target_k = needs
    return (
        _gradient(q, needs_q),
        [_gradient(part, needs_k) for part in problem.k],
        _gradient(target_q, needs_target_q),
        [_gradient(part, needs_target_k) for part in problem.target_k],
        _empty(q),
        _empty(q),
    )


@_fake
def _dimcl_forward(z0: Tensor, z1: Tensor, scale: Tensor, positive_mask: Tensor | None) -> tuple[Tensor, ...]:
    d = z0.shape[1]
    rows = (_rows(z0, 2 * d) for _ in range(3))
    return *rows, _empty(z0, 2, d), _empty(z0, 2, d)


@_fake
def _dimcl_backward(
    grad_lse: Tensor | None, grad_positive_sum: Tensor | None, z0: Tensor, z1: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _gradient(z0, True), _gradient(z1, True), _scalar(z0, rest[-1])


@_fake
def _similarity_forward(q: Tensor, k: Tensor | None, scale: Tensor, normalize: bool) -> tuple[Tensor, ...]:
    n, m = q.shape[0], (q if k is None else k).shape[0]
    return (
        q.new_empty(n, m),
        _empty(q, n, needed=normalize),
        _empty(q, m, needed=normalize and k is not None),
    )


@_fake
def _similarity_backward(grad: Tensor, q: Tensor, k: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    needs_q, needs_k = rest[-1]
    return _gradient(q, needs_q), _gradient(q if k is None else k, needs_k), _empty(q)


@_fake
def _masked_log_softmax_forward(logits: Tensor, mask: Tensor | None) -> Tensor:
    return logits.new_empty(logits.shape)


@_fake
def _masked_log_softmax_backward(grad: Tensor, output: Tensor, mask: Tensor | None) -> Tensor:
    return output.new_empty(output.shape)
