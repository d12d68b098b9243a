"""Backends, seeds and poisoned memory for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import matrix
import pytest
import torch
from hypothesis import HealthCheck, settings

if os.environ.get("CL_KERNELS_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run on the CPU
    import interpreter

    interpreter.repair()

import cl_kernels as clk
from cl_kernels import chunked, extension

pytest_plugins = ["pytester"]

settings.register_profile(
    "tests",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("tests")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds; leave out with -m 'not slow'")
    config.pluginmanager.register(matrix.Plugin(config), "matrix")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Last those that may load the emulator: from then on "cuda" serves CPU tensors in their process."""
    items.sort(key=lambda item: item.path.parent.name == "cuda" or item.path.name.startswith("test_gpu_"))


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each test that asks for it runs on the compiled kernels (by "auto") and on the chunked reference.

    Without the extension the former are skipped, or fail with CL_KERNELS_REQUIRE_EXTENSION=1.
    """
    name = request.param
    if name == "cpu" and extension.cpu.module is None:
        reason = f"no CPU kernels: {extension.cpu.missing_because}"
        if os.environ.get("CL_KERNELS_REQUIRE_EXTENSION", "") not in ("", "0"):
            pytest.fail(reason)
        pytest.skip(reason)
    with clk.use_backend("auto" if name == "cpu" else name):
        yield name


@pytest.fixture(autouse=True)
def default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests of the kernels for GPUs make their tensors on CL_KERNELS_TEST_DEVICE; on the CPU, by default, the
    kernels run under Triton's interpreter."""
    if request.path.parent.name not in ("triton", "cuda") and not request.path.name.startswith("test_gpu_"):
        yield
        return
    torch.set_default_device(os.environ.get("CL_KERNELS_TEST_DEVICE", "cpu"))
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def small_chunks() -> Iterator[None]:
    """Several chunks even for tiny inputs, the last one shorter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK_ELEMENTS", 12)
        patch.setattr(chunked, "MIN_CHUNK_ROWS", 2)
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small problems run faster so, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh tensors hold NaN, so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
