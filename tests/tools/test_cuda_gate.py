"""The gate for the CUDA kernels' machine code finds what it looks for; all of it is `make compile-gate`."""

from __future__ import annotations

from pathlib import Path

import cuda_gate
import pytest

ARRAY = """
__global__ void __launch_bounds__(128) kernel(const int* index, float* out) {
  float array[64];
  for (int i = 0; i < 64; ++i) array[i] = 0.0f;
  for (int i = 0; i < 64; ++i) array[index[i]] += out[i];
  for (int i = 0; i < 64; ++i) out[i] = array[i];
}
"""
PLAIN = "__global__ void kernel(float* out) { out[threadIdx.x] = exp2f(out[threadIdx.x]); }"
WARNING = "__global__ void kernel(float* out) { int unused; out[threadIdx.x] = 0.0f; }"

pytestmark = pytest.mark.skipif(cuda_gate.obstacle() is not None, reason=str(cuda_gate.obstacle()))


def compiled(
    source: str, name: str, folder: Path, architecture: str = "90a"
) -> tuple[list[cuda_gate.Kernel], list[str]]:
    path = folder / name
    path.write_text(source)
    return cuda_gate.compile_file(path, architecture, folder)


def test_local_memory_is_a_fault(tmp_path: Path) -> None:
    (kernel,), _ = compiled(ARRAY, "array.cu", tmp_path)
    assert kernel.stack == 256
    assert any("stack" in fault for fault in kernel.faults())
    assert any("LDL" in fault for fault in kernel.faults())


def test_a_kernel_of_hoppers_without_its_products_is_a_fault(tmp_path: Path) -> None:
    (kernel,), _ = compiled(PLAIN, "plain_sm90.cu", tmp_path)
    assert kernel.faults() == ["no HGMMA"]
    assert kernel.counts["MUFU.EX2"] == 1
    (kernel,), _ = compiled(PLAIN, "plain.cu", tmp_path)
    assert kernel.faults() == []


def test_hoppers_kernels_trap_elsewhere(tmp_path: Path) -> None:
    """A launch on the wrong architecture is an error, not unwritten memory; the gate looks at the rest
    when they change."""
    kernels, _ = cuda_gate.compile_file(cuda_gate.SOURCES / "similarity_sm90.cu", "80", tmp_path)
    assert kernels and all(kernel.counts["BPT.TRAP"] and not kernel.faults() for kernel in kernels)
    (kernel,), _ = compiled("__global__ void kernel(float*) {}", "empty_sm90.cu", tmp_path, "80")
    assert kernel.faults() == ["no trap"]


def test_warnings_are_found(tmp_path: Path) -> None:
    _, warnings = compiled(WARNING, "warning.cu", tmp_path)
    assert any("unused" in warning for warning in warnings)
    assert compiled(PLAIN, "plain.cu", tmp_path)[1] == []


def test_what_does_not_compile_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="error"):
        compiled("__global__ void kernel( {", "broken.cu", tmp_path)
