"""The reports of a benchmark, of results that were made up."""

from __future__ import annotations

import base64
import math
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from cl_kernels.bench import figures, panels, plots, report, tables
from cl_kernels.bench.results import FLOOR, Accuracy, Line, Results, load, ratio, save

LOSSES = {
    # loss: (title, rows of the headline, columns or None, width, products of the floor)
    "supcon": ("SupCon", 8192, None, 128, 4),
    "nt_xent": ("NT-Xent", 8192, None, 128, 4),
    "sce": ("SCE", 512, 65537, 256, 8),
    "dimcl": ("DimCL", 4096, None, 256, 4),
    "clip": ("CLIP", 4096, None, 512, 8),
}
SLOWER = {
    "cl_kernels": 1.0,
    "eager": 9.0,
    "torch.compile": 5.0,
    "pytorch-metric-learning": 13.0,
    "lightly": 8.0,
    "linear_cross_entropy": 3.0,
    "floor": 0.8,
}
MATRICES = {"eager": 5.0, "torch.compile": 2.0, "pytorch-metric-learning": 9.0, "lightly": 4.0}
PEAK = {"float32": 163e9, "bfloat16": 410e9}


def samples(seconds: float, seed: str, rounds: int = 7) -> tuple[float, ...]:
    drawn = random.Random(seed)
    return tuple(seconds * math.exp(drawn.gauss(0.0, 0.03)) for _ in range(rounds))


def a_line(loss: str, variant: str, rows: int, dtype: str = "float32", headline: bool = True) -> Line:
    title, _, columns, width, products = LOSSES[loss]
    columns = columns or rows
    flops, seed = float(products * rows * columns * width), f"{loss} {variant} {rows} {dtype}"
    slower = SLOWER[variant] * (1 if variant in ("cl_kernels", "floor") else rows**0.15 / 4)
    seconds = slower * flops / PEAK[dtype] / 0.7 + 3e-4 * (variant != "floor")
    itemsize = 4 if dtype == "float32" else 2
    matrices = MATRICES.get(variant, 0.0) * rows * columns * itemsize
    return Line(
        loss=loss,
        title=title,
        rows=rows,
        columns=columns,
        width=width,
        dtype=dtype,
        temperature=0.1,
        variant=variant,
        headline=headline,
        flops=flops,
        bytes=2.0 * itemsize * (rows + columns) * width,
        forward=() if variant == "floor" else samples(0.4 * seconds, seed + "f"),
        backward=() if variant == "floor" else samples(0.6 * seconds, seed + "b"),
        both=samples(seconds, seed),
        memory=None if variant == "floor" else matrices + 3.0 * rows * width * itemsize + 4e6,
        loss_error=None if variant == "floor" else 2e-7 if dtype == "float32" else 3e-3,
        gradient_error=None if variant == "floor" else 4e-7 if dtype == "float32" else 4e-3,
        note="no self mask" if (variant, loss) == ("linear_cross_entropy", "supcon") else "",
    )


def untimed(line: Line, status: str) -> Line:
    return replace(
        line,
        status=status,
        forward=(),
        backward=(),
        both=(),
        memory=None,
        loss_error=None,
        gradient_error=None,
    )


def made_up() -> Results:
    """Five losses, two dtypes, a sweep; a peer not installed, one wrong, one out of memory; errors of NaN."""
    lines = []
    for loss, (_, headline, columns, _, _) in LOSSES.items():
        peers = [x for x in SLOWER if x != "lightly" or loss == "nt_xent"]
        for rows in (headline,) if columns else (512, 1024, 2048, 4096, 8192):
            for variant in peers:
                line = a_line(loss, variant, rows, headline=rows == headline)
                if variant == "lightly":
                    line = untimed(line, "not here: lightly is not installed")
                elif (loss, variant) == ("sce", "torch.compile"):
                    line = untimed(line, "wrong answer: gradient error 0.13 <b>&")
                elif (loss, variant, rows) == ("supcon", "pytorch-metric-learning", 8192):
                    line = untimed(line, "out of memory")
                lines.append(line)
    for loss in ("supcon", "clip"):
        for variant in ("cl_kernels", "eager", "torch.compile", "floor"):
            lines.append(a_line(loss, variant, LOSSES[loss][1], "bfloat16"))
    accuracy = []
    scales = {"float32": 1e-7, "bfloat16": 2e-3, "float16": 3e-4}
    for loss, (title, *_) in LOSSES.items():
        for variant in ("cl_kernels", "eager", "torch.compile"):
            for dtype, scale in scales.items():
                for temperature in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
                    for inputs in ("random", "converged"):
                        drawn = random.Random(f"{loss} {variant} {dtype} {temperature} {inputs}")
                        worse = {"cl_kernels": 1.0, "eager": 2.0, "torch.compile": 2.5}[variant]
                        error = worse * scale * temperature**-0.5 * math.exp(drawn.gauss(0, 0.3))
                        if inputs == "converged":
                            error *= 8 if variant != "cl_kernels" else 2
                        lost = (
                            variant != "cl_kernels" and temperature <= 0.005 and loss in ("supcon", "dimcl")
                        )
                        accuracy.append(
                            Accuracy(
                                loss,
                                title,
                                256,
                                64,
                                variant,
                                dtype,
                                temperature,
                                inputs,
                                None if lost else error / 3,
                                None if lost else error,
                            )
                        )
    return Results(
        machine={
            "device": "AMD EPYC <Zen 4>",
            "kind": "cpu",
            "cores": 2,
            "threads": 2,
            "governor": "performance",
            "load_before": 0.84,
            "load_after": 2.1,
            "memory_bytes": 16_600_000_000,
            "torch": "2.13.0+cpu",
            "python": "3.11.2",
            "commit": "def5ae9",
            "pytorch-metric-learning": "2.9.0",
            "lightly": None,
        },
        command="python -m cl_kernels bench --html report.html",
        date="2026-11-23T14:05:10",
        seconds=512.0,
        ceilings={**PEAK, "copy": 21.3e9},
        lines=lines,
        accuracy=accuracy,
    )


class Page(HTMLParser):
    """The elements of a page: every start tag has its end tag, and nothing ends that did not start."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input", "source"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.found if name == tag]

    def text(self, *tags: str) -> list[str]:
        return [text for tag, text in self.texts if tag in tags]


@pytest.fixture(scope="module")
def results() -> Results:
    return made_up()


@pytest.fixture(scope="module")
def text(results: Results) -> str:
    return report.html(results)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def panels_of(page: Page, what: str) -> list[dict[str, str | None]]:
    return [attrs for attrs in page.all("img") if what in (attrs["alt"] or "")]


def words(uri: str | None) -> list[str]:
    """The texts of an SVG image in a URI."""
    start, _, content = (uri or "").partition(",")
    assert start == "data:image/svg+xml;base64"
    root = ElementTree.fromstring(base64.b64decode(content))
    return ["".join(x.itertext()).strip() for x in root.iter("{http://www.w3.org/2000/svg}text")]


def drawn(page: Page, what: str) -> list[list[str]]:
    return [words(attrs["src"]) for attrs in panels_of(page, what)]


def test_a_panel_each(page: Page) -> None:
    assert len(panels_of(page, ": forward + backward against rows")) == 4  # SCE has one size
    assert len(panels_of(page, ": peak memory against rows")) == 4
    assert len(panels_of(page, ": time over that of cl_kernels")) == 7  # 5 in float32, 2 in bfloat16
    assert len(panels_of(page, "Roofline, ")) == 2
    assert len(panels_of(page, "inputs: error of the gradient")) == 6
    assert len(panels_of(page, "inputs: error of the loss")) == 6
    assert len(page.all("figure")) == len(page.all("figcaption")) == 29
    assert all("alt" in x for x in page.all("img"))


def test_each_panel_is_drawn_for_light_and_for_dark_paper(page: Page) -> None:
    dark = [attrs["srcset"] for attrs in page.all("source")]
    assert len(dark) == len(page.all("img"))
    for light, other in zip(page.all("img"), dark, strict=True):
        assert words(light["src"]) == words(other) and light["src"] != other
    for uri, theme in ((page.all("img")[0]["src"], 0), (dark[0], 1)):
        svg = base64.b64decode((uri or "").partition(",")[2]).decode()
        assert panels.PALETTE["ink"][theme] in svg and panels.PALETTE["ink"][1 - theme] not in svg


def test_axes_have_units_and_ticks(page: Page) -> None:
    for found in drawn(page, ": forward + backward against rows"):
        assert {"512", "1024", "2048", "4096", "8192", "rows N", "100 ms", "1 s"} <= set(found)
    for found in drawn(page, ": peak memory against rows"):
        assert {"10 MB", "100 MB", "1 GB", "this machine’s memory, 16.6 GB"} <= set(found)
    for found in drawn(page, "Roofline, float32"):
        assert {"100 G", "10 G", "1000", "torch.mm, 163 GFLOP/s", "copy, 21.3 GB/s"} <= set(found)
    for found in drawn(page, "float32, random inputs: error of the gradient"):
        assert {"1e-6", "1e-7", "0.1", "1", "unit roundoff of float32"} <= set(found)


def test_nothing_is_fetched(text: str, page: Page) -> None:
    assert not page.all("script") and not page.all("link")
    for _, attrs in page.found:
        for name, value in attrs.items():
            if name in ("src", "href", "srcset", "data"):
                assert (value or "").startswith(("#", "data:image/svg+xml;base64,"))
    assert "@import" not in text and "http" not in text and "url(" not in text


def test_links_lead_somewhere(page: Page) -> None:
    ids = Counter(attrs["id"] for _, attrs in page.found if "id" in attrs)
    assert max(ids.values()) == 1
    assert {attrs["href"] for attrs in page.all("a")} <= {f"#{x}" for x in ids}


def test_colours_are_the_themes(text: str) -> None:
    light, dark = text.split("@media screen and (prefers-color-scheme: dark)")[:2]
    dark = dark[: dark.index("* {")]
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    assert {"paper", "ink", "ours-1"} <= used <= set(panels.PALETTE)
    for name in used:
        assert f"--{name}: #" in light and f"--{name}: #" in dark


def contrast(one: str, other: str) -> float:
    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_contrast(theme: int) -> None:
    paper, band = panels.PALETTE["paper"][theme], panels.PALETTE["band"][theme]
    for name, colors in panels.PALETTE.items():
        if name not in ("paper", "band", "grid"):
            assert contrast(colors[theme], paper) >= (4.5 if name in ("ink", "soft", "ours-1") else 3.0), name
    assert contrast(panels.PALETTE["soft"][theme], band) >= 4.5


def test_variants_have_styles_of_their_own() -> None:
    names = ["cl_kernels triton", "cl_kernels cuda", "eager", "floor", "lightly", *map(str, range(14))]
    found = panels.styles(names)
    assert len({(style.color, style.marker) for style in found.values()}) == len(names)
    assert found["eager"] == panels.styles(["lightly", "eager"])["eager"]
    others = [style.width for name, style in found.items() if not name.startswith("cl_kernels")]
    assert found["cl_kernels cuda"].width > max(others)


def test_strings_are_escaped(text: str, page: Page) -> None:
    assert "gradient error 0.13 &lt;b&gt;&amp;" in text and "<b>" not in text
    assert ("dd", "AMD EPYC <Zen 4>") in page.texts


def test_hostile_names_are_escaped() -> None:
    name = '<script>alert("1")</script> $x_1$ & \u201c'
    lines = [replace(a_line("supcon", v, n), variant=name) for v in ("eager",) for n in (512, 1024)]
    mine = [a_line("supcon", "cl_kernels", n) for n in (512, 1024)]
    accuracy = [Accuracy("supcon", name, 8, 8, name, "float32", t, "random", 1e-7, None) for t in (0.1, 1.0)]
    found = Page(report.html(Results(lines=[*mine, *lines], accuracy=accuracy)))
    assert not found.all("script")
    assert any(name in x for x in found.text("th"))
    assert any(name[:23] in x for shown in drawn(found, ": time over") for x in shown)


def test_ratios_are_those_of_results(results: Results, page: Page) -> None:
    shown, written = page.text("td"), report.markdown(results)
    marks = drawn(page, ": time over that of cl_kernels")
    count = 0
    for key in dict.fromkeys(line.key for line in results.lines if line.headline):
        lines = {line.variant: line for line in results.lines if line.key == key}
        mine = lines.pop("cl_kernels")
        for line in lines.values():
            if line.timed:
                expected = figures.ratio(ratio(line.both, mine.both))
                assert expected in shown and f"| {expected} |" in written
                assert any(line.variant in found and expected in found for found in marks)
                count += 1
    assert count == 29
    eager, mine = (
        next(x for x in results.lines if x.variant == v and x.rows == 8192) for v in ("eager", "cl_kernels")
    )
    assert f"{figures.ratio(ratio(eager.both, mine.both))} the speed of eager" in page.text("h1")[0]


def test_figures_beside_ours_and_the_floor(results: Results) -> None:
    found = tables.lines(results)
    for (_, work), key in zip(
        found.groupby("key", sort=False), dict.fromkeys(x.key for x in results.lines), strict=True
    ):
        lines = {x.variant: x for x in results.lines if x.key == key}
        assert list(work.variant) == list(lines)
        mine, floor = lines["cl_kernels"], lines[FLOOR]
        assert work[work.mine].variant.tolist() == ["cl_kernels"]
        for row in work.itertuples():
            line = lines[row.variant]
            same = {"nan_ok": True}
            expected = math.nan if line is mine else ratio(line.both, mine.both)
            assert row.ratio == pytest.approx(expected, **same)
            assert row.share == pytest.approx(
                math.nan if line is floor else ratio(floor.both, line.both), **same
            )
            assert row.seconds == pytest.approx(line.seconds, **same)
            assert not row.low > row.ratio and not row.ratio > row.high


def test_our_fastest_variant_is_what_others_are_compared_with() -> None:
    slow, fast = (
        replace(a_line("supcon", "cl_kernels", 512), variant=f"cl_kernels {x}", both=(y, y, y))
        for x, y in (("cuda", 2.0), ("triton", 1.0))
    )
    found = tables.lines(bare([slow, fast, replace(a_line("supcon", "eager", 512), both=(6.0, 3.0))]))
    assert found.mine.tolist() == [False, True, False]
    assert found.ratio.tolist() == pytest.approx([2.0, math.nan, 4.5], nan_ok=True)


def test_what_was_not_timed(results: Results, page: Page) -> None:
    items = " ".join(page.text("li", "strong", "small"))
    for reason in (
        "out of memory",
        "not here: lightly is not installed",
        "wrong answer: gradient error 0.13",
    ):
        assert reason in items and reason in " ".join(page.text("td"))
    assert "float32, N = 512, 1024, 2048, 4096, 8192: NT-Xent" in items
    assert "out of memory" in drawn(page, "SupCon, float32, D = 128: forward + backward")[0]
    assert "wrong answer" in drawn(page, "SCE 512 × 65537 × 256, float32: time over")[0]
    assert all("NaN" in found for found in drawn(page, "inputs: error of the"))
    found, timed, _ = tables.measured(tables.lines(results))
    wrong = found[found.headline & found.why.str.startswith("wrong")]
    assert len(wrong) == 1 and set(wrong[timed].to_numpy().ravel()) <= {"", figures.MISSING}


def test_extrapolation(page: Page) -> None:
    grown = [replace(a_line("supcon", "eager", n), memory=20.0 * n**2) for n in (512, 1024, 2048)]
    assert plots.growth(tables.lines(bare(grown))) == pytest.approx(20.0)
    assert plots.growth(tables.lines(bare(grown[:1]))) is None
    assert plots.growth(tables.lines(bare(replace(x, columns=7) for x in grown))) is None

    def shown(limit: float | None) -> str:
        return " ".join(
            words(plots.memories(tables.lines(bare(grown)), panels.styles(["eager"]), limit)[0].images[0])
        )

    assert "eager runs out at N ≈ 30000, extrapolated" in shown(20.0 * 30000**2)
    assert "extrapolated" not in shown(20.0 * 1500**2)
    assert "extrapolated" not in shown(None)


def test_same_twice(results: Results) -> None:
    one, other = (
        plots.speedups(tables.lines(results), panels.styles(tables.variants(results)))[0] for _ in range(2)
    )
    assert one.images == other.images


def bare(lines: Iterable[Line] = (), **rest: Any) -> Results:
    return Results(lines=list(lines), **rest)


@pytest.mark.parametrize(
    "few",
    [
        bare(),
        bare([a_line("supcon", "cl_kernels", 512)]),
        bare([a_line("supcon", "eager", 512)]),
        bare([replace(a_line("supcon", "cl_kernels", 512), both=(1.0,), forward=(), backward=())]),
        bare([untimed(a_line("supcon", v, n), "out of memory") for v in SLOWER for n in (1, 2)]),
        bare([replace(a_line("clip", v, 512), memory=0.0, bytes=0.0) for v in SLOWER]),
        bare([replace(a_line("clip", v, 512), flops=None) for v in SLOWER], ceilings={"copy": 1e9}),
        bare([replace(a_line("clip", v, 512), graph=(1e-5,), headline=False) for v in SLOWER]),
        bare(accuracy=[Accuracy("clip", "CLIP", 8, 8, "eager", "int8", 0.1, "odd", 0.0, None)]),
        bare(machine={"load_before": 9.0, "cores": 2, "kind": "cuda"}),
    ],
)
def test_few_results(few: Results) -> None:
    found = Page(report.html(few))
    assert found.text("h1") == [tables.summary(tables.lines(few))]
    assert report.markdown(few).startswith("# Benchmark of cl_kernels")
    assert bool(tables.busy(few)) == ("load_before" in few.machine)


def test_results_from_a_file(tmp_path: Path) -> None:
    lines = [a_line("supcon", "cl_kernels", 512), replace(a_line("supcon", "eager", 512), flops=None)]
    few = bare(lines, machine={"cores": 2, "governor": None}, ceilings={"float32": 1e11})
    save(few, tmp_path / "results.json")
    again = load(tmp_path / "results.json")
    assert report.html(again) == report.html(few)
    assert report.markdown(again) == report.markdown(few)


def test_cuda_graphs_have_a_column() -> None:
    lines = [replace(a_line("supcon", "cl_kernels", 512), graph=(2e-5, 2e-5))]
    found = Page(report.html(bare(lines, machine={"kind": "cuda"})))
    assert "CUDA graph" in found.text("th") and "20.0 µs" in found.text("td")
    assert any("allocator" in x for x in found.text("li"))


def test_markdown_has_the_same_figures(results: Results, page: Page) -> None:
    written = report.markdown(results).replace("\\", "")
    found, timed, rest = tables.measured(tables.lines(results))
    for row in found[found.headline].to_dict("records"):
        assert f"| {row['work']} | {row['dtype']} | cl_kernels |" in written and row["why"] in written
        for column in rest if row["why"] else (*timed, *rest):
            cell, _, spread = row[column].partition("\n")
            assert not cell or (cell in written and cell in page.text("td"))
            assert spread in written
    for cell in tables.errors(tables.accuracy(results)).to_numpy().ravel():
        text, _, lost = cell.partition("\n")
        assert text in written and text in page.text("td") and lost in written
    assert "NaN in 2 of 5" in written
    lines = written.splitlines()
    for start in (i for i, line in enumerate(lines) if line.startswith("| ---")):
        width = lines[start].count(" | ")
        rows = [x for x in lines[start:] if x][: len(lines)]
        assert lines[start - 1].count(" | ") == width == rows[1].count(" | ")


def test_figures() -> None:
    assert [figures.time(x) for x in (4.12e-4, 0.21, 2.154, 9.9996e-5, 1.234e-5, 0.99996)] == [
        "0.412 ms",
        "210 ms",
        "2.15 s",
        "0.100 ms",
        "12.3 µs",
        "1.00 s",
    ]
    assert figures.time(0.2051, 0.2138) == "205–214 ms"
    assert figures.rate(163.2e9) == "163 GFLOP/s"
    assert figures.rate(1.5e12) == "1.50 TFLOP/s"
    assert figures.bandwidth(21.3e9) == "21.3 GB/s"
    assert [figures.size(x) for x in (42.1e6, 999.9e6, 0, 12)] == ["42.1 MB", "1.00 GB", "0 B", "12.0 B"]
    assert figures.ratio(12.23) == "12.2×"
    assert figures.error(3.14e-7) == "3.1e-07"
    assert [figures.plain(x) for x in (0.1, 1000.0, 1.5, 1.23e7)] == ["0.1", "1000", "1.5", "1.23e+07"]
    for of in (figures.time, figures.rate, figures.bandwidth, figures.size, figures.ratio, figures.error):
        assert {of(None), of(math.nan), of(math.inf)} == {figures.MISSING}
