"""Under torch.compile: one graph, and what eager mode gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import parity
import pytest
import torch
from parity import Problem, unit

import cl_kernels as clk

pytestmark = pytest.mark.usefixtures("backend", "one_thread")


def problems() -> dict[str, Problem]:
    labels = {"labels": torch.arange(6) % 3}
    pair = {"z0": unit(6, 4), "z1": unit(6, 4)}
    keys = {"q": unit(6, 4), "k": unit(6, 4)}
    queue = {"queue": unit(4, 9).T}
    tau = {"temperature": torch.tensor(0.2)}
    return {
        "supcon": Problem("supcon_loss", {"features": unit(6, 2, 4)}),
        "supcon labels": Problem("supcon_loss", {"features": unit(6, 2, 4), **labels, **tau}),
        "supcon one": Problem("supcon_loss", {"features": unit(6, 2, 4), **labels}, {"contrast_mode": "one"}),
        "supcon in": Problem("supcon_loss", {"features": unit(6, 2, 4), **labels}, {"summation": "in"}),
        "supcon negatives": Problem(
            "supcon_loss", {"features": unit(6, 1, 4), **labels}, {"denominator": "only_negatives"}
        ),
        "supcon mask": Problem("supcon_loss", {"features": unit(6, 2, 4), "mask": torch.rand(6, 6)}),
        "supcon capped": Problem("supcon_loss", {"features": unit(6, 2, 4), **labels}, {"positives_cap": 2}),
        "selfcon": Problem("selfcon_loss", {"features": unit(6, 3, 4), **labels}, {"anchors": "exits"}),
        "multilevel": Problem(
            "multilevel_loss", {"levels": [unit(6, 2, 4), unit(6, 2, 7)], **labels}, {"weights": [1.0, 0.2]}
        ),
        "nt_xent": Problem("nt_xent_loss", {**pair, **tau}),
        "info_nce": Problem("info_nce_loss", keys),
        "info_nce queue": Problem("info_nce_loss", {**keys, **queue, **tau}),
        "clip": Problem(
            "clip_loss",
            {"image_features": unit(6, 4), "text_features": unit(6, 4), "logit_scale": torch.tensor(10.0)},
        ),
        "dcl": Problem("dcl_loss", pair),
        "dclw": Problem("dcl_loss", pair, {"sigma": 0.5}),
        "dimcl": Problem("dimcl_loss", pair),
        "sce": Problem("sce_loss", {**keys, "coeff": torch.tensor(0.3)}),
        "sce queue": Problem("sce_loss", {**keys, **queue}, {"positive_in_target": "zero"}),
        "sce momentum": Problem(
            "sce_loss", {**keys, "k_global": keys["k"], **queue}, frozen=("k", "k_global", "queue")
        ),
    }


CASES = tuple(problems())


def compiled(function: str, backend: str, **options: Any) -> Callable[..., torch.Tensor]:
    torch._dynamo.reset()
    return torch.compile(getattr(clk, function), fullgraph=True, backend=backend, **options)


def assert_same(results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, x in expected.items():
        torch.testing.assert_close(
            results[name], x, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("case", CASES)
def test_one_graph_and_the_same_result(case: str) -> None:
    problem = problems()[case]
    assert_same(parity.run(compiled(problem.function, "aot_eager"), problem), parity.ours(problem))


def test_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cl_kernels.losses.supcon.CHUNK_LOGITS", 5 * 12)
    problem = problems()["supcon capped"]
    assert_same(parity.run(compiled(problem.function, "aot_eager"), problem), parity.ours(problem))


@pytest.mark.parametrize("case", ["supcon labels", "supcon in", "nt_xent", "dimcl", "sce queue"])
def test_half_and_autocast(case: str, backend: str) -> None:
    """Ops are opaque to autocast; what is traced is not: PyTorch runs its backward under autocast."""
    if backend == "reference":
        pytest.skip("the reference is traced")
    problem = problems()[case].to(torch.bfloat16)
    function = compiled(problem.function, "aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = parity.run(function, problem)
    assert results["loss"].dtype == torch.float32
    assert_same(results, parity.ours(problem))


def test_dynamic_shapes() -> None:
    function = compiled("supcon_loss", "aot_eager", dynamic=True)
    for n in (6, 9, 14):
        problem = Problem("supcon_loss", {"features": unit(n, 2, 4), "labels": torch.arange(n) % 3})
        assert_same(parity.run(function, problem), parity.ours(problem))


def test_a_new_temperature_does_not_compile_again() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    function = torch.compile(clk.nt_xent_loss, fullgraph=True, backend=counter)
    z0, z1 = unit(6, 4), unit(6, 4)
    for tau in (0.1, 0.2, 0.3, 0.4, 0.5):
        torch.testing.assert_close(
            function(z0, z1, temperature=tau), clk.nt_xent_loss(z0, z1, temperature=tau)
        )
    assert counter.frame_count <= 2


def test_a_second_derivative_is_refused() -> None:
    features = unit(6, 2, 4).requires_grad_()
    loss = compiled("supcon_loss", "aot_eager")(features)
    (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


@pytest.mark.slow
def test_inductor() -> None:
    for case in ("supcon labels", "sce momentum"):
        problem = problems()[case]
        assert_same(parity.run(compiled(problem.function, "inductor"), problem), parity.ours(problem))
