"""torch.func's transforms of every loss and primitive give what they give for the reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparisons import unit
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, jacrev, jvp, vjp, vmap

import cl_kernels as clk
from cl_kernels.losses._common import CHUNK_LOGITS

pytestmark = pytest.mark.usefixtures("backend", "one_thread")

B, N, D = 3, 5, 4
LABELS = torch.arange(N) % 2
VALID = torch.arange(N) != 1


def f64(*shape: int) -> Tensor:
    return unit(*shape, dtype=torch.float64)


def views(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x, y], 1)


def scalar(x: Tensor) -> Tensor:
    """A number that depends on every element."""
    return x.masked_fill(x == -torch.inf, 0.0).sin().sum()


# Of x [N, D], by a module of losses (ours or the reference), given other data y [N, D] and z [N + 2, D].
CASES: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "supcon": lambda m, x, y, z: m.supcon_loss(views(x, y), temperature=0.4),
    "supcon labels": lambda m, x, y, z: m.supcon_loss(views(x, y), LABELS, temperature=0.4),
    "supcon one": lambda m, x, y, z: m.supcon_loss(views(x, y), LABELS, contrast_mode="one"),
    "supcon in": lambda m, x, y, z: m.supcon_loss(views(x, y), LABELS, temperature=0.4, summation="in"),
    "supcon mask": lambda m, x, y, z: m.supcon_loss(
        views(x, y), mask=(y @ y.T > 0).double(), temperature=0.4, no_positive="drop"
    ),
    "supcon capped": lambda m, x, y, z: m.supcon_loss(views(x, y), LABELS, temperature=0.4, positives_cap=2),
    "supcon keys": lambda m, x, y, z: m.supcon_loss(
        views(x, y), LABELS, temperature=0.4, keys=z, key_labels=torch.arange(N + 2) % 3
    ),
    "supcon keys, in": lambda m, x, y, z: m.supcon_loss(
        views(y, y), mask=torch.ones(N, N).tril(), temperature=0.4, keys=x, summation="in"
    ),
    "supcon padded": lambda m, x, y, z: m.supcon_loss(views(x, y), LABELS, temperature=0.4, valid=VALID),
    "supcon padded, one positive": lambda m, x, y, z: m.supcon_loss(
        views(x, y), LABELS, temperature=0.4, valid=VALID, denominator="one_positive"
    ),
    "nt_xent padded": lambda m, x, y, z: m.nt_xent_loss(x, y, valid=VALID),
    "selfcon": lambda m, x, y, z: m.selfcon_loss(views(x, y), LABELS, anchors="exits", temperature=0.4),
    "multilevel": lambda m, x, y, z: m.multilevel_loss(
        [views(x, y), views(x[:, :2], y[:, 1:3])], LABELS, weights=[1.0, 0.4]
    ),
    "stablerep": lambda m, x, y, z: m.stablerep_loss(x, LABELS, temperature=0.4),
    "nt_xent": lambda m, x, y, z: m.nt_xent_loss(x, y),
    "info_nce": lambda m, x, y, z: m.info_nce_loss(x, y, temperature=0.4),
    "info_nce queue": lambda m, x, y, z: m.info_nce_loss(x, y, z, temperature=0.4),
    "info_nce keys": lambda m, x, y, z: m.info_nce_loss(y, x, torch.cat([x, z]), temperature=0.4),
    "info_nce in batch": lambda m, x, y, z: m.info_nce_loss(x, y, z, temperature=0.4, in_batch=True),
    "info_nce gathered": lambda m, x, y, z: m.info_nce_loss(
        y, y, z, temperature=0.4, k_global=torch.cat([z[:N], x]), rank=1
    ),
    "info_nce valid": lambda m, x, y, z: m.info_nce_loss(x, y, temperature=0.4, valid=VALID),
    "clip": lambda m, x, y, z: m.clip_loss(x, y, 2.0 + y[0, 0]),
    "clip labels": lambda m, x, y, z: m.clip_loss(x, y, 2.0 + y[0, 0], labels=LABELS),
    "clip labels valid": lambda m, x, y, z: scalar(
        m.clip_loss(x, y, 2.0, labels=LABELS, valid=VALID, reduction="none")
    ),
    "clip valid": lambda m, x, y, z: m.clip_loss(x, y, 2.0, valid=VALID),
    "dcl": lambda m, x, y, z: m.dcl_loss(x, y, temperature=0.4),
    "dclw": lambda m, x, y, z: m.dcl_loss(x, y, temperature=0.4, sigma=0.5),
    "dclw valid": lambda m, x, y, z: m.dcl_loss(x, y, temperature=0.4, sigma=0.5, valid=VALID),
    "dimcl": lambda m, x, y, z: m.dimcl_loss(x, y, temperature=0.4),
    "sce": lambda m, x, y, z: m.sce_loss(x, y, temperature=0.4, target_temperature=0.3, coeff=0.4),
    "sce queue": lambda m, x, y, z: m.sce_loss(x, y, queue=z, temperature=0.4, positive_in_target="zero"),
    "sce keys": lambda m, x, y, z: m.sce_loss(y, y, x, z, temperature=0.4, target_temperature=0.3),
    "similarity": lambda m, x, y, z: scalar(m.similarity(x, z, scale=2.0, normalize=True)),
    "similarity self": lambda m, x, y, z: scalar(m.similarity(x, scale=2.0)),
    "masked_log_softmax": lambda m, x, y, z: scalar(m.masked_log_softmax(4 * x, y > 0)),
    "log_softmax": lambda m, x, y, z: scalar(m.masked_log_softmax(4 * x)),
    "contrastive_lse": lambda m, x, y, z: scalar(
        torch.cat(m.contrastive_lse(x, z, scale=2.0, key_bias=z[:, 0], both_axes=True))
    ),
    "soft_target_cross_entropy": lambda m, x, y, z: m.soft_target_cross_entropy(
        x, [y, z], y, [y, z], scale=2.0, target_scale=3.0, positive=torch.tensor([0, 7, -1, 2, 9]), coeff=0.3
    ),
}  # fmt: skip

TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], Tensor, Tensor, Tensor], Any]] = {
    "grad": lambda f, x, y, z: grad(f)(x[0], y[0], z),
    "grad_and_value": lambda f, x, y, z: grad_and_value(f)(x[0], y[0], z),
    "grad of all": lambda f, x, y, z: grad(f, (0, 1, 2))(x[0], y[0], z),
    "vjp": lambda f, x, y, z: vjp(lambda x: f(x, y[0], z), x[0])[1](torch.tensor(1.5).double()),
    "vmap": lambda f, x, y, z: vmap(f, (0, 0, None))(x, y, z),
    "vmap, last": lambda f, x, y, z: vmap(f, (2, None, None))(x.movedim(0, 2), y[0], z),
    "vmap of grad": lambda f, x, y, z: vmap(grad(f), (0, None, None))(x, y[0], z),
    "grad of vmap": lambda f, x, y, z: grad(
        lambda x, y, z: vmap(f, (0, 0, None))(x, y, z).sin().sum(), (0, 1, 2)
    )(x, y, z),
    "autograd of vmap": lambda f, x, y, z: of_leaf(lambda x: vmap(f, (0, 0, None))(x, y, z).sin().sum(), x),
    "jacrev": lambda f, x, y, z: jacrev(lambda x: torch.stack([f(x, y[0], z), f(x, y[1], z).sin()]))(x[0]),
    "jacrev of grad": lambda f, x, y, z: jacrev(grad(f))(x[0], y[0], z),
    "grad of grad": lambda f, x, y, z: grad(lambda y: grad(f)(x[0], y, z).sin().sum())(y[0]),
    "vjp of vjp": lambda f, x, y, z: pulled_back(
        lambda y: pulled_back(lambda x: f(x, y, z), x[0]).sin().sum(), y[0]
    ),
}
EVERY_CASE = ("grad", "vmap of grad", "grad of vmap", "jacrev of grad")
SOME = ("supcon labels", "clip", "info_nce queue", "dimcl", "sce keys", "masked_log_softmax", "similarity")


def pulled_back(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient by a pull-back that runs outside of its transform."""
    value, pull_back = vjp(function, x)
    return pull_back(torch.ones_like(value))[0]


def of_leaf(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


@pytest.mark.parametrize(
    ("transform", "case"),
    [(t, c) for t in TRANSFORMS for c in CASES if t in EVERY_CASE or c in SOME],
)
def test_transforms(transform: str, case: str) -> None:
    x, y, z = f64(B, N, D), f64(B, N, D), f64(N + 2, D)
    apply = TRANSFORMS[transform]
    if case == "supcon mask" and "vmap" in transform:
        y = y[:1].expand(B, N, D)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a slow fallback of vmap
        found = apply(lambda x, y, z: CASES[case](clk, x, y, z), x, y, z)
    expected = apply(lambda x, y, z: CASES[case](clk.reference, x, y, z), x, y, z)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_batches_of_labels_masks_and_indices() -> None:
    features, labels = f64(B, N, 2, D), torch.randint(3, (B, N))
    masks = torch.rand(B, N, N) > 0.5
    index = torch.randint(-1, N, (B, N))
    index[0] = -1

    def losses(m: Any, x: Tensor, labels: Tensor, mask: Tensor, index: Tensor) -> Tensor:
        y = x[:, 1]
        parts = [
            m.supcon_loss(x, labels),
            m.supcon_loss(x, mask=mask),
            m.soft_target_cross_entropy(
                x[:, 0], y, y, y, scale=2.0, target_scale=3.0, positive=index, coeff=0.5
            ),
            scalar(m.masked_log_softmax(x.flatten(1) @ x.flatten(1).T, mask)),
            scalar(m.contrastive_lse(y, row_labels=labels, among="different")),
        ]
        return torch.stack(parts).sum()

    for in_dims in ((0, 0, 0, 0), (None, 0, None, None), (0, None, 0, None), (None, None, None, 0)):
        inputs = [
            x if dim == 0 else x[1] for x, dim in zip((features, labels, masks, index), in_dims, strict=True)
        ]
        found, expected = (
            vmap(grad(lambda *args, m=m: losses(m, *args)), in_dims)(*inputs) for m in (clk, clk.reference)
        )
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="vmap has no rule for the bits of a float there")
def test_batches_of_float_labels() -> None:
    features, labels = f64(B, N, 2, D), torch.randint(3, (B, N)).double()
    found, expected = (vmap(grad(m.supcon_loss))(features, labels) for m in (clk, clk.reference))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_gradients_for_each_problem_of_a_batch() -> None:
    """Gradients of a module's parameters and of the temperature, by functional_call."""
    module = torch.nn.Linear(D, 3, dtype=torch.float64)
    parameters = {name: x.detach() for name, x in module.named_parameters()}
    tau = torch.tensor(0.3, dtype=torch.float64)
    x, y = f64(B, N, D), f64(B, N, D)

    def loss(m: Any) -> Callable[..., Tensor]:
        return lambda p, tau, x, y: m.info_nce_loss(
            functional_call(module, p, (x,)), functional_call(module, p, (y,)).detach(), temperature=tau
        )

    found, expected = (
        vmap(grad(loss(m), (0, 1)), (None, None, 0, 0))(parameters, tau, x, y) for m in (clk, clk.reference)
    )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_shared_targets_in_a_batch() -> None:
    q, k, queue = f64(B, N, D), f64(B, N, D), f64(7, D)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return clk.sce_loss(q, k, k, queue, targets=clk.sce_targets(k, k, queue))

    expected = vmap(grad(lambda q, k: clk.reference.sce_loss(q, k, k, queue)))(q, k)
    torch.testing.assert_close(vmap(grad(loss))(q, k), expected, rtol=1e-8, atol=1e-9)


def test_chunks_of_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", 3 * 2 * N)
    x, y, z = f64(B, N, D), f64(B, N, D), f64(N + 2, D)
    for transform in ("grad", "vmap of grad", "jacrev of grad"):
        found, expected = (
            TRANSFORMS[transform](lambda x, y, z, m=m: CASES["supcon capped"](m, x, y, z), x, y, z)
            for m in (clk, clk.reference)
        )
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("case", SOME)
def test_the_first_derivative_is_the_op(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain formula holds whole matrices: no first derivative may come from it."""
    for name in ("contrastive", "soft_target", "dimcl"):
        monkeypatch.setattr(f"cl_kernels.reference.{name}_stats", None)
    for name in ("similarity", "masked_log_softmax"):
        monkeypatch.setattr(f"cl_kernels.reference.{name}_matrix", None)
    x, y, z = f64(N, D), f64(N, D), f64(N + 2, D)
    first = grad(lambda x: CASES[case](clk, x, y, z))(x)
    x.requires_grad_()
    (second,) = torch.autograd.grad(CASES[case](clk, x, y, z), x, create_graph=True)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)  # one by an op of the whole loss


@pytest.mark.parametrize("case", SOME)
def test_forward_mode_is_refused_by_name(case: str) -> None:
    x, y, z = f64(N, D), f64(N, D), f64(N + 2, D)

    def loss(x: Tensor) -> Tensor:
        return CASES[case](clk, x, y, z)

    names = "|".join(("contrastive losses", "sce_loss", "dimcl_loss", "similarity", "masked_log_softmax"))
    message = rf"({names}).*no derivative in forward mode.*torch.func.grad, vjp or jacrev"
    with pytest.raises(NotImplementedError, match=message):
        jvp(loss, (x,), (y,))
    with pytest.raises(NotImplementedError, match=message):
        torch.func.hessian(loss)(x)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        loss(forward_ad.make_dual(x, y))
    with forward_ad.dual_level():  # nothing is asked of the loss
        assert torch.equal(loss(x), loss(x.clone()))
    value, tangent = jvp(lambda x: CASES[case](clk.reference, x, y, z), (x,), (y,))
    assert value.isfinite()
    assert tangent.isfinite()
