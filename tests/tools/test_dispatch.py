"""Which backend serves on GPUs, by the table and by name, and why one cannot."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comparisons import unit
from torch import Tensor

import cl_kernels as clk
from cl_kernels import autograd, chunked, configs, dispatch, extension, ops
from cl_kernels.dispatch import ANY, SERVING, VARIANTS, Case, Serving
from cl_kernels.problem import Contrast, SoftTarget

GPU = torch.device("cuda", 0)
FAMILIES = [(op, variant) for op, variants in VARIANTS.items() for variant in variants]


@pytest.fixture(autouse=True)
def fresh_decisions() -> Iterator[None]:
    dispatch.forget_decisions()
    yield
    dispatch.forget_decisions()


# The table


def test_the_table_has_an_answer_for_everything() -> None:
    assert {name.rpartition("_")[0] for name in ops.SCHEMAS} == set(VARIANTS)
    kinds, widths = ("half", "float32"), (1, 128, 256, 512, 4096)
    for (op, variant), kind, architecture, width in itertools.product(
        FAMILIES, kinds, configs.ARCHITECTURES, widths
    ):
        row = dispatch.row_for(Case(op, variant, kind, architecture, width))
        assert row.backend == "triton" or (row.backend, row.basis) == ("cuda", "measured")
        assert row in dispatch.rows_for(op, architecture)
    assert dispatch.row_for(Case("new_op", "plain", "half", "sm_90", 128)).backend == "triton"
    assert dispatch.row_for(Case("contrastive", "new", "half", "sm_200", 128)).backend == "triton"


MEASURED = Serving("contrastive", "self", "half", "sm_90", None, "cuda", "measured")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if CUDA C++ had been measured to be faster for one case."""
    monkeypatch.setattr(dispatch, "SERVING", (MEASURED, *SERVING))


@pytest.mark.parametrize("basis", ["model", "default"])
def test_cuda_that_is_not_measured_serves_nobody(basis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "SERVING", (MEASURED._replace(basis=basis), *SERVING))
    assert dispatch.row_for(Case("contrastive", "self", "half", "sm_90", 128)).backend == "triton"
    assert {row.backend for row in dispatch.rows_for("contrastive", "sm_90")} == {"triton"}


def test_a_measured_row_serves(measured: None) -> None:
    assert dispatch.row_for(Case("contrastive", "self", "half", "sm_90", 128)) == MEASURED
    for elsewhere in (("dimcl", "self", "half", "sm_90"), ("contrastive", "self", "half", "sm_80")):
        assert dispatch.row_for(Case(*elsewhere, 128)).backend == "triton"


def test_every_row_of_the_table_decides_something() -> None:
    kinds, widths = ("half", "float32"), (1, *(row.widest or 1 for row in SERVING))
    deciding = {
        dispatch.row_for(Case(op, variant, kind, architecture, width))
        for (op, variant), kind, architecture, width in itertools.product(
            FAMILIES, kinds, configs.ARCHITECTURES, widths
        )
    }
    assert deciding == set(SERVING)


def test_a_row_stops_at_its_width() -> None:
    row = Serving("dimcl", ANY, "half", "sm_80", 256, "cuda", "measured")
    assert row.fits(Case("dimcl", "plain", "half", "sm_80", 256))
    assert not row.fits(Case("dimcl", "plain", "half", "sm_80", 257))
    assert not row.fits(Case("dimcl", "plain", "float32", "sm_80", 256))


# What distinguishes calls


def calls(function: Callable[..., Any], *inputs: Tensor) -> list[tuple[str, tuple[Any, ...]]]:
    """The ops that a function and its gradient call."""
    seen: list[tuple[str, tuple[Any, ...]]] = []
    with pytest.MonkeyPatch.context() as patch:
        call = dispatch.call
        patch.setattr(
            dispatch,
            "call",
            lambda name, backend, *args: (seen.append((name, args)), call(name, backend, *args))[1],
        )
        outputs = function(*inputs)
        total = sum(x.sum() for x in ([outputs] if isinstance(outputs, Tensor) else outputs))
        total.backward()
    return seen


def leaf(*shape: int) -> Tensor:
    return unit(*shape).requires_grad_()


@pytest.mark.parametrize(
    ("expected", "function", "inputs"),
    [
        ("self", lambda q: autograd.contrastive(Contrast(q, None, 2.0, exclude=0)).lse, [(6, 4)]),
        ("keys", lambda q, k: autograd.contrastive(Contrast(q, k, 2.0, exclude=0)).lse, [(6, 4), (7, 4)]),
        ("frozen keys", lambda q: autograd.contrastive(Contrast(q, q.detach(), 2.0)).lse, [(6, 4)]),
        (
            "both axes",
            lambda q, k: autograd.contrastive(Contrast(q, k, 2.0, both_axes=True))[:2],
            [(6, 4), (7, 4)],
        ),
        ("transposed", lambda q: autograd.contrastive(Contrast(q.T, None, 2.0)).lse, [(4, 6)]),
        ("transposed", lambda q, k: autograd.similarity(q, k.T, 2.0, True), [(6, 4), (4, 7)]),
        ("plain", lambda q, k: autograd.similarity(q, k, 2.0, True), [(6, 4), (7, 4)]),
        ("plain", lambda z: autograd.dimcl(z, z * 2, 2.0)[0], [(6, 4)]),
        ("plain", lambda q: autograd.soft_target(SoftTarget(q, [q], q, [q], 1.0, 2.0)).cross, [(6, 4)]),
        ("plain", lambda x: autograd.masked_log_softmax(x, None).sin(), [(6, 4)]),
        ("plain", lambda q: autograd.similarity(q, None, 2.0, True), [(6, 1)]),
    ],
)
def test_a_backward_is_the_variant_of_its_forward(
    expected: str, function: Callable[..., Any], inputs: list[tuple[int, int]]
) -> None:
    seen = calls(function, *(leaf(*shape) for shape in inputs))
    assert [name.rpartition("_")[2] for name, _ in seen] == ["forward", "backward"]
    assert [dispatch._case(name, args)[0].variant for name, args in seen] == [expected, expected]


@pytest.fixture
def arguments() -> tuple[Any, ...]:
    """Those of a contrastive forward, q with itself."""
    pairs = (0, None, None, "all", False, None, None, None, False)
    return (unit(6, 4).bfloat16(), None, torch.tensor(2.0), *pairs, False)


@pytest.mark.parametrize(
    ("architecture", "able", "expected"),
    [
        ("sm_90", {"cuda", "triton"}, "cuda"),
        ("sm_90", {"triton"}, "triton"),
        ("sm_80", {"cuda", "triton"}, "triton"),
        ("sm_80", {"cuda"}, "reference"),  # not measured there
        ("sm_80", set(), "reference"),
    ],
)
def test_the_next_backend_that_can_serve(
    architecture: str,
    able: set[str],
    expected: str,
    arguments: tuple[Any, ...],
    measured: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(configs, "device_of", lambda x: configs.Device(architecture, 4, architecture))
    monkeypatch.setattr(dispatch, "obstacle", lambda backend, *_: None if backend in able else "it is not")
    assert dispatch.serving("contrastive_forward", arguments) == expected


def test_float64_is_the_references(
    arguments: tuple[Any, ...], measured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "device_of", lambda x: configs.Device("sm_90", 4, "sm_90"))
    monkeypatch.setattr(extension.cuda, "emulated_ops", frozenset(ops.SCHEMAS))
    assert dispatch.serving("contrastive_forward", arguments) == "cuda"
    q, *rest = arguments
    assert dispatch.serving("contrastive_forward", (q.double(), *rest)) == "reference"


# GPUs that Triton's kernels do not serve


def as_gpu(patch: pytest.MonkeyPatch, major: int, minor: int, amd: str | None = None) -> None:
    """Tensors are taken for those of a GPU of this kind."""
    properties = SimpleNamespace(
        major=major, minor=minor, multi_processor_count=40, gcnArchName=f"{amd}:sramecc+:xnack-"
    )
    patch.setattr(torch.version, "hip", None if amd is None else "7.0")
    patch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(ops, "has_triton", lambda: True)
    patch.setattr(dispatch, "_unsuited", {})
    patch.setattr(configs, "gpu", configs.gpu.__wrapped__)


@pytest.mark.parametrize(
    ("gpu", "shapes"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_80"),
        ((9, 4, "gfx942"), "gfx942"),
        ((7, 0), None),
        ((7, 5), None),
        ((9, 0, "gfx90a"), None),
        ((11, 0, "gfx1100"), None),
    ],
)
def test_a_gpu_has_launch_shapes_or_a_reason(
    gpu: tuple[Any, ...], shapes: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_gpu(monkeypatch, *gpu)
    architecture, reason = configs.gpu(0).architecture, dispatch.obstacle("triton", GPU)
    if shapes is not None:
        assert (architecture, reason) == (shapes, None)
        return
    assert architecture not in configs.ARCHITECTURES
    assert architecture in str(reason)
    row = dispatch._row("contrastive_forward", "cuda")
    assert row.backend == "reference" and f"triton: {reason}" in row.reason


def test_an_unsuited_gpu_by_name_and_under_auto(
    arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_gpu(monkeypatch, 7, 5)
    q = SimpleNamespace(device=GPU, dtype=torch.float16, shape=(6, 4))
    assert dispatch.serving("contrastive_forward", (q, *arguments[1:])) == "reference"
    with clk.use_backend("triton"), pytest.raises(clk.BackendError, match="not sm_75"):
        dispatch.select("contrastive_forward", q)


class OutOfResources(Exception):
    """As Triton raises it."""


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, Exception]:
    """CPU tensors are taken for those of an sm_90 GPU, on which Triton and CUDA C++ can serve, by chunked.py.
    What an op raises by name, for the test to fill in."""
    failing: dict[str, Exception] = {}
    original = dispatch.implementation

    def implementation(op_name: str, backend: str) -> Callable[..., Any]:
        def launch(*args: Any) -> Any:
            if op_name in failing:
                raise failing[op_name]
            return original(op_name, "reference")(*args)

        return original(op_name, backend) if backend == "reference" else launch

    monkeypatch.setattr(dispatch, "implementation", implementation)
    monkeypatch.setattr(dispatch, "obstacle", lambda *_: None)
    monkeypatch.setattr(configs, "device_of", lambda x: configs.Device("sm_90", 4, "sm_90"))
    monkeypatch.setattr(dispatch, "_exhausted", {})
    return failing


def step(q: Tensor, serve: Callable[..., Any]) -> Tensor:
    """The gradient of q by the ops, as autograd calls them."""
    pairs = (0, None, None, "all", False, None, None, None, False)
    lse, lse_cols, *_, residual = serve("contrastive_forward", q, None, torch.tensor(2.0), *pairs, False)
    grads = (torch.ones_like(lse), None, None)
    saved = (lse, lse_cols, residual, (True, False, True, False))
    return serve("contrastive_backward", *grads, q, None, torch.tensor(2.0), *pairs, *saved)[0]


RESOURCES = [
    OutOfResources("out of resource: shared memory, Required: 131072, Hardware limit: 101376."),
    RuntimeError("Triton Error [CUDA]: too many resources requested for launch"),
    RuntimeError("raising the limit of shared memory: invalid argument"),
]


@pytest.mark.parametrize("error", RESOURCES, ids=str)
@pytest.mark.parametrize("failing", ["contrastive_forward", "contrastive_backward"])
def test_what_does_not_launch_is_passed_over_once(
    failing: str, error: Exception, launches: dict[str, Exception]
) -> None:
    q = unit(6, 4)
    expected = step(q, lambda name, *args: getattr(chunked, name)(*args))
    launches[failing] = error
    with pytest.warns(RuntimeWarning, match=f"triton cannot launch {failing}.*reference serves") as seen:
        assert torch.equal(step(q, dispatch.serve), expected)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(step(q, dispatch.serve), expected)
        # Of forward and backward alike, and of nothing else.
        forward = (q, None, torch.tensor(2.0), 0, None, None, "all", False, None, None, None, False, False)
        assert dispatch.serving("contrastive_forward", forward) == "reference"
        assert dispatch.serving("contrastive_forward", (unit(6, 5), *forward[1:])) == "triton"
        assert dispatch.serving("contrastive_forward", (q.bfloat16(), *forward[1:])) == "triton"


def test_what_does_not_launch_goes_from_cuda_to_triton(
    measured: None, launches: dict[str, Exception]
) -> None:
    launches["contrastive_forward"] = RESOURCES[2]
    with pytest.warns(RuntimeWarning) as seen:
        step(unit(6, 4).bfloat16(), dispatch.serve)
    assert ["triton serves" in str(seen[0].message), "reference serves" in str(seen[1].message)] == [True] * 2


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: misaligned address"), ValueError("no")], ids=str)
def test_other_errors_are_raised(error: Exception, launches: dict[str, Exception]) -> None:
    launches["contrastive_forward"] = error
    with pytest.raises(type(error), match=str(error)):
        step(unit(6, 4), dispatch.serve)
    assert not dispatch._exhausted


@pytest.mark.parametrize("error", RESOURCES, ids=str)
def test_what_does_not_launch_by_name(error: Exception, launches: dict[str, Exception]) -> None:
    launches["contrastive_forward"] = error
    for backend in ("triton", "cuda"):
        with clk.use_backend(backend), pytest.raises(clk.BackendError, match="cannot serve contrastive_f"):
            clk.contrastive_lse(unit(6, 4))


# The backend "cuda" by name


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CUDA extension were loaded, compiled for Ampere, beside a GPU of that kind."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(extension.cuda, "module", object())
    monkeypatch.setattr(extension.cuda, "ops", frozenset(ops.SCHEMAS))
    monkeypatch.setattr(extension.cuda, "_unsuited", {})
    monkeypatch.setattr(extension.cuda, "build_info", lambda: {"architectures": "sm_80,sm_90a"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))


def test_cuda_serves(loaded: None) -> None:
    assert dispatch.obstacle("cuda", GPU, "contrastive_forward", torch.bfloat16) is None


def test_why_cuda_does_not_serve(loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(device: Any = GPU, dtype: torch.dtype = torch.float32) -> str:
        return str(dispatch.obstacle("cuda", device, "contrastive_forward", dtype))

    monkeypatch.setattr(extension.cuda, "emulated_ops", frozenset())
    assert reason("cpu") == "takes GPU tensors, not cpu tensors"
    assert reason(dtype=torch.float64) == "takes float16, bfloat16 and float32, not torch.float64"
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "7.0")
        assert reason() == "takes NVIDIA GPUs, not AMD GPUs"
    with monkeypatch.context() as patch:
        patch.setattr(extension.cuda, "module", None)
        patch.setattr(extension.cuda, "missing_because", "it was not built")
        assert reason() == "it was not built"
    with monkeypatch.context() as patch:
        patch.setattr(extension.cuda, "ops", frozenset({"dimcl_forward"}))
        assert "no kernel for contrastive_forward" in reason()


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((8, 6), None),
        ((9, 0), None),
        ((7, 5), "takes GPUs from sm_80 on, not sm_75"),
        ((10, 0), "compiled for sm_80, sm_90a, not for this GPU, sm_100"),
    ],
)
def test_gpus_that_the_kernels_were_not_compiled_for(
    loaded: None, capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert dispatch.obstacle("cuda", GPU, "contrastive_forward", torch.float32) == reason


def test_info_says_what_the_table_has(loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    as_gpu(monkeypatch, 9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    row = dispatch._row("contrastive_forward", "cuda")
    assert row.backend == "triton"
    assert "cuda: serves by name only" in row.reason
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "SERVING", (MEASURED, *SERVING))
        row = dispatch._row("contrastive_forward", "cuda")
        assert row.backend == "cuda, triton"
        assert "cuda for half self (measured); triton for the rest (default)" in row.reason
    monkeypatch.setattr(extension.cuda, "module", None)
    monkeypatch.setattr(extension.cuda, "missing_because", "it was not built")
    row = dispatch._row("contrastive_forward", "cuda")
    assert row.backend == "triton"
    assert "cuda: it was not built" in row.reason


@pytest.fixture
def emulated() -> Iterator[list[str]]:
    """A library of the CUDA ops for CPU tensors, as the emulator registers; the names of the ops that ran."""
    if extension.cuda.emulated_ops:
        pytest.skip("the emulator is loaded")
    ran: list[str] = []

    def recording(name: str) -> Callable[..., Any]:
        return lambda *args: (ran.append(name), getattr(chunked, name)(*args))[1]

    library = torch.library.Library(ops.CUDA_NAMESPACE, "IMPL")
    for name in ops.SCHEMAS:
        library.impl(name, recording(name), "CPU")
    yield ran
    library._destroy()
    extension.cuda.require()


def test_cuda_by_name_takes_cpu_tensors_of_the_emulator_only(emulated: list[str]) -> None:
    q = leaf(6, 4)
    clk.contrastive_lse(q).sum()
    assert not emulated
    with clk.use_backend("cuda"):
        loss = clk.contrastive_lse(q).sum()
        with pytest.raises(clk.BackendError, match="float64"):
            clk.contrastive_lse(q.double())
    loss.backward()
    assert emulated == ["contrastive_forward", "contrastive_backward"]


def test_cuda_by_name_compiles(emulated: list[str]) -> None:
    torch.compiler.reset()
    q = leaf(6, 4)
    with clk.use_backend("cuda"):
        torch.compile(lambda q: clk.contrastive_lse(q).sum(), fullgraph=True, backend="aot_eager")(
            q
        ).backward()
    assert emulated == ["contrastive_forward", "contrastive_backward"]


def test_all_libraries_have_the_schemas_and_fake_kernels() -> None:
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(6, 4)
        for namespace in (ops.NAMESPACE, ops.TRITON_NAMESPACE, ops.CUDA_NAMESPACE):
            for name in ops.SCHEMAS:
                assert str(getattr(getattr(torch.ops, namespace), name).default._schema).endswith(
                    ops.SCHEMAS[name]
                )
            out, *_ = getattr(torch.ops, namespace).similarity_forward(q, None, torch.tensor(1.0), False)
            assert out.shape == (6, 6)


def test_other_backends_compile_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension.cuda, "_required", False)
    monkeypatch.setattr(extension, "_compile", lambda: pytest.fail("it compiles"))
    for backend in ("auto", "reference", "cpu", "triton"):
        with clk.use_backend(backend):
            pass
    assert not extension.cuda._required


def test_a_source_checkout_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(extension.cuda, "_required", False)
    monkeypatch.setattr(extension.cuda, "module", None)
    monkeypatch.setattr(extension.cuda, "missing_because", "it was not built")
    monkeypatch.setattr(extension, "_is_source_checkout", lambda: True)
    monkeypatch.setattr(extension, "_switched_off", lambda: False)
    monkeypatch.setattr(extension, "_is_built", lambda name: False)
    monkeypatch.setattr(extension.cuda_build, "obstacle", lambda root: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def fail() -> None:
        compiled.append(True)
        raise RuntimeError("ninja said no")

    monkeypatch.setattr(extension, "_compile", fail)
    for _ in range(2):
        with clk.use_backend("cuda"):
            assert "it was not built, and its compilation failed (ninja said no)" in str(
                dispatch.obstacle("cuda", GPU)
            )
    assert len(compiled) == 1
