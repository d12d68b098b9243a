"""Holds an installed CUDA build to what it was built for; needs no GPU. `make cuda-build` runs it, outside
the checkout, in the environment that the package was installed into."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import cuda_gate
import torch

import cl_kernels
from cl_kernels import cuda_build, extension, ops
from cl_kernels.tools import info

CHECKOUT = Path(__file__).resolve().parents[1]


def machine_code(library: str) -> set[str]:
    """The architectures that the library has machine code for."""
    cuobjdump = cuda_gate.tool("cuobjdump")
    if cuobjdump is None:
        raise SystemExit("there is no cuobjdump, of the CUDA toolkit or of Triton's package")
    done = subprocess.run([cuobjdump, "--list-elf", library], capture_output=True, text=True, check=True)
    return set(re.findall(r"\.(sm_\w+)\.cubin", done.stdout))


def faults(architectures: str) -> list[str]:
    package = Path(cl_kernels.__file__).resolve()
    if package.is_relative_to(CHECKOUT / "cl_kernels"):
        return [f"{package} was imported, not an installed package"]
    told = info.as_text(info.collect())
    print(told)
    if not re.search(r"^  CUDA extension +loaded$", told, re.MULTILINE):
        return [f"info does not say that the CUDA extension is loaded: {extension.cuda.missing_because}"]
    found = []
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [f"{ops.CUDA_NAMESPACE}::{name}" for name in ops.SCHEMAS]
    found += [f"{name} has no CUDA kernel" for name in names if not has(name, "CUDA")]
    wanted = cuda_build.architectures(architectures)
    compiled = extension.cuda.build_info()["architectures"].split(",")
    if compiled != wanted:
        found.append(f"built for {compiled}, not {wanted}")
    held = machine_code(extension.cuda.module.__file__)
    for code in wanted:  # cuobjdump of Triton 3.6 says sm_90 for sm_90a
        if code.startswith("sm_") and not {code, code.removesuffix("a")} & held:
            found.append(f"no machine code for {code}")
    if not found:
        print(f"\ntorch {torch.__version__}: all {len(names)} ops have CUDA kernels, for {compiled}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architectures", required=True, help="as TORCH_CUDA_ARCH_LIST had them: '8.0;9.0'")
    found = faults(parser.parse_args().architectures)
    print("\n".join(f"fault: {fault}" for fault in found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
