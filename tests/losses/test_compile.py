"""Under torch.compile: one graph, and what eager mode gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comparisons
import pytest
import torch
from comparisons import Problem, unit
from functorch.compile import make_boxed_func
from loss_cases import problems
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

import cl_kernels as clk
from cl_kernels.losses._common import CHUNK_LOGITS
from cl_kernels.tools import check_cases

pytestmark = pytest.mark.usefixtures("backend", "one_thread")


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
    assert_same(comparisons.run(compiled(problem.function, "aot_eager"), problem), comparisons.ours(problem))


def test_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", 5 * 12)
    problem = problems()["supcon capped"]
    assert_same(comparisons.run(compiled(problem.function, "aot_eager"), problem), comparisons.ours(problem))


@pytest.mark.parametrize("case", ["supcon labels", "supcon in", "nt_xent", "dimcl", "sce queue"])
def test_half_and_autocast(case: str) -> None:
    problem = problems()[case].to(torch.bfloat16)
    function = compiled(problem.function, "aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = comparisons.run(function, problem)
    assert results["loss"].dtype == torch.float32
    assert_same(results, comparisons.ours(problem))


def test_dynamic_shapes() -> None:
    function = compiled("supcon_loss", "aot_eager", dynamic=True)
    for n in (6, 9, 14):
        problem = Problem("supcon_loss", {"features": unit(n, 2, 4), "labels": torch.arange(n) % 3})
        assert_same(comparisons.run(function, problem), comparisons.ours(problem))


def test_fixed_sizes_in_a_dynamic_graph() -> None:
    """Labels, masks and indices made in the graph, of a size that the features happen to have."""
    mask = torch.ones(4, 4, dtype=torch.bool)
    soft = {"scale": 2.0, "target_scale": 3.0, "coeff": 0.5}
    for function in (
        lambda z: clk.supcon_loss(z.view(-1, 2, 6), torch.arange(4) % 2),
        lambda z: clk.supcon_loss(z.view(-1, 2, 6), mask=mask),
        lambda z: clk.selfcon_loss(z.view(-1, 2, 6), (torch.arange(4) % 2)[:, None]),
        lambda z: clk.contrastive_lse(z, row_labels=torch.arange(8) % 3, key_bias=torch.ones(8)).sum(),
        lambda z: clk.masked_log_softmax(z, torch.ones(8, 6, dtype=torch.bool)).sum(),
        lambda z: clk.masked_log_softmax(z, torch.ones(1, 6, dtype=torch.bool)).sum(),
        lambda z: clk.soft_target_cross_entropy(z, z, z, z, positive=torch.arange(8), **soft),
        lambda z: clk.dimcl_loss(z, z.flip(0), positive_mask=torch.ones(12, 12, dtype=torch.bool)),
        lambda z: clk.info_nce_loss(z, torch.ones(8, 6)),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        z = unit(8, 6)
        torch.testing.assert_close(compiled(z), function(z))


def thirds(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(6, device=x.device) % 3


WITH_FLOATS: dict[str, Callable[..., torch.Tensor]] = {
    "supcon": lambda x, y, a, b: clk.supcon_loss(
        torch.stack([x, y], 1), thirds(x), temperature=a, base_temperature=b
    ),
    "supcon from its base": lambda x, y, a, b: clk.supcon_loss(
        torch.stack([x, y], 1), temperature=a, base_temperature=0.1
    ),
    "supcon in": lambda x, y, a, b: clk.supcon_loss(
        torch.stack([x, y], 1),
        thirds(x),
        temperature=a,
        base_temperature=b,
        summation="in",
    ),
    "supcon capped": lambda x, y, a, b: clk.supcon_loss(
        torch.stack([x, y], 1),
        thirds(x),
        temperature=a,
        base_temperature=b,
        positives_cap=2,
    ),
    "selfcon": lambda x, y, a, b: clk.selfcon_loss(
        torch.stack([x, y], 1), thirds(x), temperature=a, base_temperature=b
    ),
    "multilevel": lambda x, y, a, b: clk.multilevel_loss(
        [torch.stack([x, y], 1), torch.stack([y, x], 1)], weights=[a, b], temperature=a, base_temperature=b
    ),
    "nt_xent": lambda x, y, a, b: clk.nt_xent_loss(x, y, temperature=a),
    "info_nce": lambda x, y, a, b: clk.info_nce_loss(x, y, y.flip(0), temperature=a),
    "clip": lambda x, y, a, b: clk.clip_loss(x, y, a),
    "dcl": lambda x, y, a, b: clk.dcl_loss(x, y, temperature=a, sigma=b),
    "dimcl": lambda x, y, a, b: clk.dimcl_loss(x, y, temperature=a),
    "sce": lambda x, y, a, b: clk.sce_loss(x, y, temperature=a, target_temperature=b, coeff=a),
    "sce queue": lambda x, y, a, b: clk.sce_loss(
        x, y, queue=y.flip(0), temperature=a, target_temperature=b, coeff=a, positive_in_target="zero"
    ),
    "sce targets": lambda x, y, a, b: clk.sce_loss(
        x, y, temperature=a, coeff=b, targets=clk.sce_targets(y, target_temperature=a)
    ),
    "soft target": lambda x, y, a, b: clk.soft_target_cross_entropy(
        x, y, y, x.detach(), scale=a, target_scale=b, positive=torch.arange(6, device=x.device), coeff=b
    ),
    "similarity": lambda x, y, a, b: clk.similarity(x, y, scale=a).sum(),
    "lse": lambda x, y, a, b: clk.contrastive_lse(x, y, scale=a).sum(),
}


@pytest.mark.parametrize("case", WITH_FLOATS)
def test_new_floats_do_not_compile_again(case: str, backend: str) -> None:
    """Schedules of temperatures, scales, coefficients and weights: one graph with dynamic=True, two without,
    as the first takes the floats for constants."""
    if backend == "reference" and case not in ("sce", "supcon capped"):
        pytest.skip("the losses are traced alike on every backend")
    function = WITH_FLOATS[case]
    x, y = unit(6, 4).requires_grad_(), unit(6, 4)
    for dynamic, more in ((True, 0), (None, 1)) if case == "sce" else ((True, 0),):
        counter = CompileCounterWithBackend("aot_eager")
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=dynamic)
        first = 0  # graphs of the first call, which may start over
        for a, b in ((0.1, 0.7), (0.2, 0.6), (0.5, 0.5)):
            found, expected = compiled(x, y, a, b), function(x, y, a, b)
            torch.testing.assert_close(found, expected)
            grads = (torch.autograd.grad(loss, x)[0] for loss in (found, expected))
            torch.testing.assert_close(*grads)
            first = first or counter.frame_count
        assert counter.frame_count <= first + more


def devices_in(graph: torch.fx.GraphModule) -> set[str]:
    values = pytree.tree_leaves([node.meta.get("val") for node in graph.graph.nodes])
    return {x.device.type for x in values if isinstance(x, torch.Tensor)}


@pytest.mark.parametrize("case", WITH_FLOATS)
def test_no_tensor_of_another_device(case: str, backend: str) -> None:
    """Temperatures and the like stand beside the features: a graph with a tensor of the CPU would not be one
    CUDA graph, as mode="reduce-overhead" makes them."""
    if backend == "reference":
        pytest.skip("the losses are traced alike on every backend")
    found: list[set[str]] = []

    def record(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        found.append(devices_in(graph))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    x, y = torch.empty(6, 4, device="meta", requires_grad=True), torch.empty(6, 4, device="meta")
    compiled = torch.compile(WITH_FLOATS[case], backend=aot_autograd(fw_compiler=record), fullgraph=True)
    compiled(x, y, 0.2, 0.6).backward()
    assert found == [{"meta"}] * 2


@pytest.mark.parametrize("case", ["sce", "sce queue", "sce momentum", "supcon labels", "clip"])
def test_without_gradients(case: str) -> None:
    """A validation step."""
    problem = problems()[case]
    function = compiled(problem.function, "aot_eager")
    expected = getattr(clk, problem.function)(**problem.inputs, **problem.options)
    torch.testing.assert_close(function(**problem.inputs, **problem.options), expected)
    learnt = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in problem.inputs.items()}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(function(**learnt, **problem.options), expected)


def test_soft_targets_of_any_segments_without_gradients() -> None:
    q, parts = unit(6, 4), [unit(n, 4) for n in (3, 5, 2)]
    for segments in (parts[:1], parts[:2], parts):
        function = compiled("soft_target_cross_entropy", "aot_eager")
        arguments = (q, segments, q, segments)
        expected = clk.soft_target_cross_entropy(*arguments, scale=5.0, target_scale=7.0)
        torch.testing.assert_close(function(*arguments, scale=5.0, target_scale=7.0), expected)


REDUCED = ("sum", "none")  # what is traced does not depend on it
OPTIONS = [case for case in check_cases.CASES if case.options.get("reduction") not in REDUCED]


@pytest.mark.parametrize("loss", check_cases.LOSSES)
def test_every_option_under_autocast(loss: str, backend: str) -> None:
    """PyTorch runs what is traced of a backward under the autocast of its caller."""
    data = check_cases.Data(7, 5, "random", 0.2)
    cases = [case for case in OPTIONS if case.loss == loss]
    for case in cases if backend == "cpu" else cases[:1]:
        problem = case.problem(data)
        expected = comparisons.run(case.call, problem)
        torch._dynamo.reset()
        function = torch.compile(case.call, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(comparisons.run(function, problem), expected)


def test_a_second_derivative_is_refused() -> None:
    features = unit(6, 2, 4).requires_grad_()
    loss = compiled("supcon_loss", "aot_eager")(features)
    (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|does not require grad"):  # the latter by 2.11
        gradient.square().sum().backward()


@pytest.mark.slow
def test_inductor() -> None:
    for case in ("supcon labels", "sce momentum"):
        problem = problems()[case]
        assert_same(
            comparisons.run(compiled(problem.function, "inductor"), problem), comparisons.ours(problem)
        )
