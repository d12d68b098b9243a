"""`python -m cl_kernels info`: versions, the build, and which backend serves which op here, and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import torch

from .. import __version__, dispatch, extension
from .text import aligned


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def collect() -> dict[str, Any]:
    on_cpu, on_gpu = extension.cpu, extension.cuda
    build, cuda_build = on_cpu.build_info(), on_gpu.build_info()
    capability = build.get("cpu_capability") or f"{torch.backends.cpu.get_cpu_capability()} (torch's)"
    return {
        "versions": {
            "cl_kernels": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "triton": _installed("triton"),
        },
        "build": {
            "extension": "loaded" if build else f"none: {on_cpu.missing_because}",
            **({"built with": _described(build)} if build else {}),
            "CUDA extension": "loaded" if cuda_build else f"none: {on_gpu.missing_because}",
            **({"CUDA extension built with": _described(cuda_build)} if cuda_build else {}),
            "CPU instruction set": capability,
            "threads": str(torch.get_num_threads()),
            "float32 matmul precision": torch.get_float32_matmul_precision(),
        },
        "backend": dispatch.requested(),
        "ops": [row._asdict() for row in dispatch.table()],
    }


def _described(build: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in build.items() if key != "cpu_capability")


def _section(title: str, entries: dict[str, str]) -> list[str]:
    width = max(map(len, entries))
    return [title, *(f"  {key:<{width}}  {value}" for key, value in entries.items()), ""]


def as_text(info: dict[str, Any]) -> str:
    header = ("op", "device", "backend", "why")
    rows = [(row["op"], row["device"], row["backend"], row["reason"]) for row in info["ops"]]
    return "\n".join(
        [
            *_section("versions", info["versions"]),
            *_section("build", info["build"]),
            f"ops under backend 'auto' (now: {info['backend']!r})",
            *aligned(header, rows),
        ]
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(options: argparse.Namespace) -> int:
    collected = collect()
    print(json.dumps(collected, indent=2) if options.json else as_text(collected))
    return 0
