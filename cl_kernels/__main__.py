"""`python -m cl_kernels info`: versions, the build, and which backend serves which op here, and why.

`python -m cl_kernels bench`: measures the losses beside other implementations, and writes a report.
`python -m cl_kernels compare`: what became slower between two of its results.
`python -m cl_kernels check`: every loss and option on this machine's backends against float64.
`python -m cl_kernels tune`: times launch shapes on this machine's GPU.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import sys
from typing import Any

import torch

from . import __version__, dispatch, extension
from .tools import tables


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def collect() -> dict[str, Any]:
    build, on_gpu = extension.build_info(), extension.cuda_build_info()
    capability = build.get("cpu_capability") or f"{torch.backends.cpu.get_cpu_capability()} (torch's)"
    return {
        "versions": {
            "cl_kernels": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "triton": _installed("triton"),
        },
        "build": {
            "extension": "loaded" if extension.is_loaded() else f"none: {extension.missing_because}",
            **({"built with": _described(build)} if build else {}),
            "CUDA extension": "loaded" if on_gpu else f"none: {extension.cuda_missing_because}",
            **({"CUDA extension built with": _described(on_gpu)} if on_gpu else {}),
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
            *tables.aligned(header, rows),
        ]
    )


COMMANDS = {
    "check": (".tools.check", "compare every loss and option with float64"),
    "tune": (".tools.tune", "time launch shapes on this machine's GPU"),
    "bench": (".bench.cli", "measure the losses beside others; write a report"),
    "compare": (".bench.compare", "what became slower between two bench results"),
}
"""Beside info; the module of one is imported when it is asked for, and what it needs with it."""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m cl_kernels", description="Contrastive losses for PyTorch."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, the build, and which backend serves which op, and why")
    info.add_argument("--json", action="store_true", help="print JSON")
    for name, (path, help) in COMMANDS.items():
        command = commands.add_parser(name, help=help)
        if arguments[:1] != [name]:
            continue
        try:
            module = importlib.import_module(path, __package__)
        except ModuleNotFoundError as error:
            if not path.startswith(".bench"):
                raise
            print(f"{name}: {error}: pip install 'cl_kernels[bench]'", file=sys.stderr)
            return 2
        command.description = getattr(module, "DESCRIPTION", None)
        module.add_arguments(command)
        return module.main(parser.parse_args(arguments))
    options = parser.parse_args(arguments)
    collected = collect()
    print(json.dumps(collected, indent=2) if options.json else as_text(collected))
    return 0


if __name__ == "__main__":
    sys.exit(main())
