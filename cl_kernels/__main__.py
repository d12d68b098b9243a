"""`python -m cl_kernels info`: versions, the build, and which backend serves which op here, and why.

`python -m cl_kernels bench`: measures the losses beside other implementations, and writes a report.
`python -m cl_kernels compare`: what became slower between two of its results.
`python -m cl_kernels check`: every loss and option on this machine's backends against float64.
`python -m cl_kernels estimate`: what a loss over many processes costs each of them; needs no GPU.
`python -m cl_kernels tune`: times launch shapes on this machine's GPU.
"""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "info": (".tools.info", "versions, the build, and which backend serves which op, and why"),
    "check": (".tools.check", "compare every loss and option with float64"),
    "estimate": (".tools.estimate", "operations, bytes, memory and times of a loss over many processes"),
    "tune": (".tools.tune", "time launch shapes on this machine's GPU"),
    "bench": (".bench.cli", "measure the losses beside others; write a report"),
    "compare": (".bench.compare", "what became slower between two bench results"),
}
"""The module of each, with `add_arguments` and `main`: imported, with what it needs, when it is asked for."""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m cl_kernels", description="Contrastive losses for PyTorch."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {name: commands.add_parser(name, help=text) for name, (_, text) in COMMANDS.items()}
    name = arguments[0] if arguments else ""
    if name in parsers:
        try:
            module = importlib.import_module(COMMANDS[name][0], __package__)
        except ModuleNotFoundError as error:
            ours = str(error.name).startswith(str(__package__))
            if ours or name in ("info", "check"):
                raise
            print(f"{name}: {error}: pip install 'cl_kernels[bench]'", file=sys.stderr)
            return 2
        module.add_arguments(parsers[name])
    options = parser.parse_args(arguments)  # exits where no command is named
    return module.main(options)


if __name__ == "__main__":
    sys.exit(main())
