"""`python -m cl_kernels estimate`: what a loss over many processes costs each of them, on paper.

Nothing is run, and no GPU is needed: `cost.py` is the model, and the times follow from rates that are given,
or assumed to be a share of what data sheets say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from . import cost
from .cost import Rates, Setup
from .text import aligned

NODE = 8  # processes that share NVLink
SHARE, LINK_SHARE = 0.6, 0.8  # of the data sheet's operations and bytes a second; assumed


class Device(NamedTuple):
    """A GPU by its data sheet: TFLOP/s of dense products, GB/s each way (docs/scaling.md has the sources)."""

    name: str
    half: float  # bfloat16 and float16
    tf32: float  # of which a product in float32 takes three
    nvlink: float
    network: float  # of a GPU's network card in the vendor's system of eight


DEVICES = {
    "a100": Device("A100 SXM 80 GB", 312, 156, 300, 25),
    "h100": Device("H100 SXM", 989, 495, 450, 50),
    "h200": Device("H200 SXM", 989, 495, 450, 50),
    "b200": Device("HGX B200", 2250, 1100, 900, 50),
}


def assumed(device: Device, dtype: str, world: int) -> Rates:
    """Rates of a device in a group of so many processes, without latencies.

    Beyond a node the bytes of a collective enter it through the network cards of all its GPUs, NVLink being
    the limit where it is slower. On the ring only the two at the ends of a node reach the next, each with one
    half of a block each way.
    """
    flops = device.tf32 / 3 if dtype == "float32" else device.half
    link = ring = device.nvlink
    if world > NODE:
        link, ring = min(link, NODE * device.network), min(ring, 2 * device.network)
    return Rates(SHARE * flops * 1e12, LINK_SHARE * link * 1e9, LINK_SHARE * ring * 1e9)


# What is asked for


def count(text: str) -> int:
    """65536, 64k or 16M: k is 1024, M its square."""
    match = re.fullmatch(r"(\d+)([kKmM]?)", text)
    number = int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2].lower()] if match else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"a positive integer, also as 64k or 16M, not {text!r}")
    return number


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"a positive number, not {text!r}")
    return number


def not_negative(text: str) -> float:
    return 0.0 if re.fullmatch(r"0*\.?0*", text) else positive(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "What a loss over many processes costs each of them in a step, forward and backward: modelled, not "
        "measured. With several batches or processes, a line for each."
    )
    parser.add_argument("loss", choices=cost.LOSSES, metavar="loss", help=", ".join(cost.LOSSES))
    parser.add_argument(
        "--batch", nargs="+", type=count, default=[65536], metavar="N",
        help="samples of all processes: 65536, 64k, 16M (default 64k)",
    )  # fmt: skip
    parser.add_argument("--processes", nargs="+", type=count, default=[8], metavar="W", help="default 8")
    parser.add_argument(
        "--width", nargs="+", type=count, default=[512], metavar="D",
        help="features of a row (default 512); of the multi-level loss one a level",
    )  # fmt: skip
    parser.add_argument(
        "--views", type=count, help=f"rows of a sample (default 2), for {', '.join(cost.MULTI_VIEW)}"
    )
    parser.add_argument(
        "--no-labels", action="store_true", help="for the same: positives are the other views of a sample"
    )
    parser.add_argument(
        "--queue", type=count, default=0, metavar="K",
        help=f"earlier keys, the same on every process, for {', '.join(cost.QUEUED)}",
    )  # fmt: skip
    parser.add_argument(
        "--frozen-keys", action="store_true", help="keys without gradient, for " + ", ".join(cost.FREEZABLE)
    )
    parser.add_argument("--exchange", choices=[*cost.EXCHANGES, "both"], default="both", help="default both")
    parser.add_argument("--dtype", choices=list(cost.ITEM), default="bfloat16", help="default bfloat16")
    parser.add_argument(
        "--device", choices=list(DEVICES), default="h100",
        help=f"assume {SHARE:.0%}% of its data sheet's FLOP/s and {LINK_SHARE:.0%}% of its NVLink's or, "
        f"beyond {NODE} processes, its network's bytes/s (default h100)",
    )  # fmt: skip
    parser.add_argument("--tflops", type=positive, help="of products, in place of the device's")
    parser.add_argument(
        "--link-gbps", type=positive, metavar="GB/S",
        help="gigabytes (not bits) a second each way of a process, in place of the device's",
    )  # fmt: skip
    parser.add_argument(
        "--latency-us", type=not_negative, default=5.0, help="of a message (default 5, assumed)"
    )
    parser.add_argument(
        "--launch-us", type=not_negative, default=5.0, help="between two launches (default 5, assumed)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def mistake(options: argparse.Namespace) -> str | None:
    """Options that do not go together, or None."""
    loss = options.loss
    if options.views is not None and loss not in cost.MULTI_VIEW:
        return f"--views is for {', '.join(cost.MULTI_VIEW)}, not {loss}"
    if options.no_labels and loss not in cost.MULTI_VIEW:
        return f"--no-labels is for {', '.join(cost.MULTI_VIEW)}, not {loss}"
    if options.no_labels and options.views == 1:
        return "--no-labels needs at least two --views: one view has no positives"
    if options.queue and loss not in cost.QUEUED:
        return f"--queue is for {', '.join(cost.QUEUED)}, not {loss}"
    if options.frozen_keys and loss not in cost.FREEZABLE:
        return f"--frozen-keys is for {', '.join(cost.FREEZABLE)}, not {loss}"
    if len(options.width) > 1 and loss != "multilevel":
        return f"several --width are for multilevel, not {loss}"
    if min(options.batch) < max(options.processes):
        return (
            f"--batch must be at least a sample a process, got {min(options.batch)} samples for "
            f"{max(options.processes)} processes"
        )
    return None


@dataclass(frozen=True)
class Estimate:
    """A setup with the rates it is given, per process and step."""

    setup: Setup
    rates: Rates

    @property
    def batch(self) -> int:
        return sum(self.setup.samples)

    @property
    def work(self) -> dict[str, cost.Work]:
        """Operations and launches of the forward and of the backward."""
        found = {"forward": cost.Work(), "backward": cost.Work()}
        for problem in self.setup.problems():
            for phase, parts in cost.works(problem, self.setup).items():
                for part in parts:
                    found[phase] += part
        return found

    @property
    def flops(self) -> float:
        return sum(work.flops for work in self.work.values())

    @property
    def launches(self) -> int:
        return sum(work.launches for work in self.work.values())

    @property
    def sent(self) -> int:
        return sum(x.bytes for x in cost.traffic(self.setup))

    @property
    def memory(self) -> int:
        return sum(cost.memory(self.setup).values())

    @property
    def compute(self) -> float:
        return sum(x.compute for x in cost.passes(self.setup, self.rates))

    @property
    def exposed(self) -> float:
        return sum(x.exposed for x in cost.passes(self.setup, self.rates))

    @property
    def hidden(self) -> float | None:
        """Products of a step of the ring over its transfer, at the worst pass; None where nothing travels."""
        return min(
            (x.hidden for x in cost.passes(self.setup, self.rates) if x.hidden is not None), default=None
        )

    def as_json(self) -> dict[str, Any]:
        setup = self.setup
        return {
            "setup": {
                "loss": setup.loss, "batch": self.batch, "processes": setup.world, "samples": setup.own,
                "widths": list(setup.widths), "dtype": setup.dtype, "exchange": setup.exchange,
                "queue": setup.queue, "frozen_keys": setup.frozen,
                "rows": [problem.rows[setup.rank] for problem in setup.problems()],
            },
            "rates": self.rates._asdict(),
            "flops": {phase: work.flops for phase, work in self.work.items()},
            "launches": {phase: work.launches for phase, work in self.work.items()},
            "sent": [x._asdict() for x in cost.traffic(setup)],
            "memory": cost.memory(setup),
            "eager_matrix": cost.eager_matrix(setup),
            "seconds": {"compute": self.compute, "exposed": self.exposed},
            "hidden": self.hidden,
            "smallest_hidden": cost.smallest_hidden(setup, self.rates) if self.hidden else None,
        }  # fmt: skip


def estimates(options: argparse.Namespace) -> list[Estimate]:
    """Estimates for the first process, which has no fewer rows than any other."""
    exchanges = cost.EXCHANGES if options.exchange == "both" else (options.exchange,)
    found = []
    for world in options.processes:
        rates = assumed(DEVICES[options.device], options.dtype, world)
        if options.tflops:
            rates = rates._replace(flops=1e12 * options.tflops)
        if options.link_gbps:
            rates = rates._replace(link=1e9 * options.link_gbps, ring=1e9 * options.link_gbps)
        rates = rates._replace(latency=1e-6 * options.latency_us, launch=1e-6 * options.launch_us)
        for batch in options.batch:
            setup = Setup(
                options.loss,
                cost.evenly(batch, world),
                tuple(options.width),
                views=options.views or 2,
                labels=not options.no_labels,
                queue=options.queue,
                frozen=options.frozen_keys,
                dtype=options.dtype,
            )
            found += [Estimate(replace(setup, exchange=exchange), rates) for exchange in exchanges]
    return found


# What is printed


_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def number(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def quantity(value: float, unit: str = "") -> str:
    """Three digits, in powers of a thousand."""
    size, prefix = next((x for x in _UNITS if value >= 0.9995 * x[0]), _UNITS[-1])
    return f"{number(value / size)} {prefix}{unit}".rstrip()


def seconds(value: float) -> str:
    size, unit = next((x for x in _TIMES if value >= 0.9995 * x[0]), _TIMES[-1])
    return f"{number(value / size)} {unit}" if value else "0"


def batch_size(value: int) -> str:
    for size, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if value % size == 0:
            return f"{value // size}{letter}"
    return str(value)


def verdict(estimate: Estimate) -> str:
    """Whether the ring hides its traffic, and by how much."""
    ratio = estimate.hidden
    return "–" if ratio is None else f"{'yes' if ratio >= 1 else 'no'}, {number(ratio)}×"


HEADER = ("processes", "batch", "exchange", "FLOPs", "sent", "launches", "memory", "eager matrix", "compute",
          "waiting", "step", "hides")  # fmt: skip
LEFT = (2, 11)  # columns of words


def table(found: Sequence[Estimate]) -> list[tuple[str, ...]]:
    """A row an estimate."""
    return [
        (
            str(x.setup.world), batch_size(x.batch), x.setup.exchange, quantity(x.flops),
            quantity(x.sent, "B"), str(x.launches), quantity(x.memory, "B"),
            quantity(cost.eager_matrix(x.setup), "B"), seconds(x.compute), seconds(x.exposed),
            seconds(x.compute + x.exposed), verdict(x),
        )
        for x in found
    ]  # fmt: skip


def rates_in_words(options: argparse.Namespace, found: Sequence[Estimate]) -> list[str]:
    device, first = DEVICES[options.device], found[0].rates
    sheet = device.tf32 / 3 if options.dtype == "float32" else device.half
    source = f"{SHARE:.0%} of the data sheet's {sheet:.0f} TFLOP/s of the {device.name}, assumed"
    lines = [f"products: {quantity(first.flops, 'FLOP/s')} ({'given' if options.tflops else source})"]
    source = "given" if options.link_gbps else f"{LINK_SHARE:.0%} of the data sheet's, assumed"
    for rates in dict.fromkeys(x.rates for x in found):
        worlds = ", ".join(dict.fromkeys(str(x.setup.world) for x in found if x.rates == rates))
        speed = f"{quantity(rates.link, 'B/s')} each way"
        if rates.ring != rates.link:
            speed += f", on the ring {quantity(rates.ring, 'B/s')} for blocks"
        lines.append(f"links of {worlds} processes: {speed} ({source})")
    lines.append(f"{seconds(first.latency)} a message, {seconds(first.launch)} a launch (assumed or given)")
    return lines


def details(found: Sequence[Estimate]) -> list[tuple[str, ...]]:
    """A column an exchange, after the labels."""
    columns = []
    for x in found:
        cells = {f"{phase}: FLOPs": quantity(work.flops) for phase, work in x.work.items()}
        cells |= {f"{phase}: launches": str(work.launches) for phase, work in x.work.items()}
        for sent in cost.traffic(x.setup):
            label = f"{sent.phase}: sent, {sent.by}, {sent.what}"
            cells[label] = f"{quantity(sent.bytes, 'B')} in {sent.messages}"
        cells["sent"] = quantity(x.sent, "B")
        memory = cost.memory(x.setup)
        cells |= {f"memory: {name}": quantity(size, "B") for name, size in memory.items()}
        cells["memory"] = quantity(x.memory, "B")
        cells["one eager matrix"] = quantity(cost.eager_matrix(x.setup), "B")
        cells |= {"compute": seconds(x.compute), "waiting for messages": seconds(x.exposed)}
        cells |= {"step": seconds(x.compute + x.exposed), "products hide the traffic": verdict(x)}
        if x.hidden is not None:
            fewest = cost.smallest_hidden(x.setup, x.rates)
            cells["from samples a process on"] = "never" if fewest is None else str(fewest)
        columns.append(cells)
    kinds = ("forward: FLOPs", "backward: FLOPs", "forward: launches", "backward: launches", "forward: sent",
             "backward: sent", "sent", "memory: ", "memory")  # fmt: skip
    labels = sorted(
        dict.fromkeys(label for cells in columns for label in cells),
        key=lambda label: next((i for i, kind in enumerate(kinds) if label.startswith(kind)), len(kinds)),
    )
    return [(label, *(cells.get(label, "") for cells in columns)) for label in labels]


def as_text(options: argparse.Namespace, found: Sequence[Estimate]) -> list[str]:
    widths = ", ".join(map(str, options.width))
    lines = [f"{options.loss}, {widths} features in {options.dtype}: modelled, not measured", ""]
    lines += [f"  {line}" for line in rates_in_words(options, found)]
    if len(options.batch) * len(options.processes) > 1:
        right = [i for i in range(len(HEADER)) if i not in LEFT]
        return [*lines, "", *aligned(HEADER, table(found), right)]
    setup = found[0].setup
    rows = setup.problems()[0].rows[setup.rank]
    lines.append(f"  a batch of {found[0].batch}: {setup.own} samples, {rows} rows a process")
    header = ("per process and step", *(x.setup.exchange for x in found))
    return [*lines, "", *aligned(header, details(found), right=range(1, len(header)))]


def main(options: argparse.Namespace) -> int:
    if error := mistake(options):
        print(f"estimate: {error}", file=sys.stderr)
        return 2
    found = estimates(options)
    if options.json:
        print(json.dumps([x.as_json() for x in found], indent=2))
    else:
        print("\n".join(as_text(options, found)))
    return 0
