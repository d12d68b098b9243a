"""The reports of a benchmark, of results that were made up."""

from __future__ import annotations

import builtins
import math
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cl_kernels.bench import figures, html, markdown, plots, tables
from cl_kernels.bench.results import Accuracy, Line, Results, load, named, ours, ratio, save

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

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
            "versions": {"pytorch-metric-learning": "2.9.0", "lightly": None},
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

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

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
    return html.render(results)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def labelled(page: Page, start: str) -> list[str]:
    labels = [attrs["aria-label"] or "" for attrs in page.all("svg") if attrs.get("role") == "img"]
    return [label for label in labels if start in label]


def test_a_panel_each(page: Page) -> None:
    assert len(labelled(page, ": forward + backward against rows")) == 4  # SCE has one size
    assert len(labelled(page, ": peak memory against rows")) == 4
    assert len(labelled(page, ": time over that of cl_kernels")) == 7  # 5 in float32, 2 in bfloat16
    assert len(labelled(page, "Roofline, ")) == 2
    assert len(labelled(page, "inputs: error of the gradient")) == 6
    assert len(labelled(page, "inputs: error of the loss")) == 6
    assert len(page.all("figure")) == len(page.all("figcaption")) == 29
    assert all("role" in x or x.get("aria-hidden") == "true" for x in page.all("svg"))


def test_nothing_is_fetched(text: str, page: Page) -> None:
    assert not page.all("script") and not page.all("link") and not page.all("img")
    for _, attrs in page.found:
        for name, value in attrs.items():
            if name in ("src", "href", "xlink:href", "srcset", "data"):
                assert (value or "").startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text and "http" not in text


def test_ids_are_unique_and_there(text: str, page: Page) -> None:
    ids = Counter(attrs["id"] for _, attrs in page.found if "id" in attrs)
    assert max(ids.values()) == 1
    referred = {attrs["href"] for _, attrs in page.found if "href" in attrs}
    referred |= {"#" + x for x in re.findall(r"url\(#([^)]*)\)", text)}
    assert {x for x in referred if x} <= {f"#{x}" for x in ids}


def test_colours_are_the_themes(text: str, page: Page) -> None:
    light, dark = text.split("@media screen and (prefers-color-scheme: dark)")[:2]
    dark = dark[: dark.index("* {")]
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    assert {"paper", "ink", "ours-1", "series-1", "floor"} <= used <= set(plots.PALETTE)
    for name in used:
        assert f"--{name}: #" in light and f"--{name}: #" in dark
    for _, attrs in page.found:
        assert not re.search("#[0-9a-f]{6}", attrs.get("style") or "")


def contrast(one: str, other: str) -> float:
    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_contrast(theme: int) -> None:
    paper, band = plots.PALETTE["paper"][theme], plots.PALETTE["band"][theme]
    for name, colors in plots.PALETTE.items():
        if name not in ("paper", "band", "grid"):
            assert contrast(colors[theme], paper) >= (4.5 if name in ("ink", "soft", "ours-1") else 3.0), name
    assert contrast(plots.PALETTE["soft"][theme], band) >= 4.5


def test_variants_have_styles_of_their_own() -> None:
    names = ["cl_kernels triton", "cl_kernels cuda", "eager", "floor", "lightly", *map(str, range(14))]
    found = plots.styles(names)
    assert len({(style.color, style.marker) for style in found.values()}) == len(names)
    assert found["eager"] == plots.styles(["lightly", "eager"])["eager"]
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
    found = Page(html.render(Results(lines=[*mine, *lines], accuracy=accuracy)))
    assert not found.all("script")
    assert any(name in x for x in found.text("th"))
    assert any(name in x for x in found.text("title"))


def test_ratios_are_those_of_results(results: Results, page: Page) -> None:
    shown, written = page.text("td"), markdown.render(results)
    drawn = labelled(page, ": time over that of cl_kernels")
    count = 0
    for lines in results.headlines():
        mine = ours(lines)
        assert mine is not None
        for line in lines:
            if line.timed and line is not mine:
                expected = figures.ratio(ratio(line.both, mine.both))
                assert expected in shown and f"| {expected} |" in written
                assert any(f"{line.variant}: {expected} (middle half" in label for label in drawn)
                count += 1
    assert count == 29
    eager = named(results.headlines()[0], "eager")
    mine = ours(results.headlines()[0])
    assert eager is not None and mine is not None
    assert f"{figures.ratio(ratio(eager.both, mine.both))} the speed of eager" in page.text("h1")[0]


def test_what_was_not_timed(results: Results, page: Page) -> None:
    items = " ".join(page.text("li", "strong", "small"))
    for reason in (
        "out of memory",
        "not here: lightly is not installed",
        "wrong answer: gradient error 0.13",
    ):
        assert reason in items and reason in " ".join(page.text("td"))
    assert "float32, N = 512, 1024, 2048, 4096, 8192: NT-Xent" in items
    assert any("pytorch-metric-learning, N = 8192: out of memory" in x for x in page.text("title"))
    assert any("temperature 0.005: not finite (DimCL and SupCon)" in x for x in page.text("title"))
    wrong = next(x for x in results.lines if x.status.startswith("wrong"))
    row = next(x for x in tables.headlines(results)[2].rows if x.line is wrong)
    assert all(cell.text in ("", figures.MISSING) for cell in row.times)


def test_points_carry_their_figures(results: Results, page: Page) -> None:
    titles = page.text("title")
    for line in results.lines:
        if line.timed and line.loss != "sce":
            start = f"{line.variant}, N = {line.rows}: {figures.time(line.seconds)} (middle half"
            assert line.dtype == "bfloat16" or any(x.startswith(start) for x in titles)


def test_extrapolation(page: Page) -> None:
    grown = [replace(a_line("supcon", "eager", n), memory=20.0 * n**2) for n in (512, 1024, 2048)]
    assert tables.growth(grown) == pytest.approx(20.0)
    assert tables.growth(grown[:1]) is None
    assert tables.growth([replace(x, columns=7) for x in grown]) is None
    panels = plots.memories(Results(machine={"memory_bytes": 20.0 * 30000**2}, lines=grown))
    assert "eager runs out at N ≈ 30000, extrapolated" in panels[0].svg
    held = plots.memories(Results(machine={"memory_bytes": 20.0 * 1500**2}, lines=grown))
    assert "extrapolated" not in held[0].svg
    assert "extrapolated" not in plots.memories(Results(lines=grown))[0].svg


def test_same_twice(results: Results) -> None:
    assert plots.speedups(results)[:2] == plots.speedups(results)[:2]


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
        bare([replace(a_line("clip", v, 512), flops=math.nan) for v in SLOWER], ceilings={"copy": 1e9}),
        bare([replace(a_line("clip", v, 512), graph=(1e-5,), headline=False) for v in SLOWER]),
        bare(accuracy=[Accuracy("clip", "CLIP", 8, 8, "eager", "int8", 0.1, "odd", 0.0, None)]),
        bare(machine={"load_before": [9.0, 1.0, 1.0], "cores": 2, "kind": "cuda", "tf32": False}),
    ],
)
def test_few_results(few: Results) -> None:
    found = Page(html.render(few))
    assert found.text("h1") == [tables.summary(few)]
    assert markdown.render(few).startswith("# Benchmark of cl_kernels")
    assert bool(tables.busy(few)) == ("load_before" in few.machine)


def test_results_from_a_file(tmp_path: Path) -> None:
    """JSON has no NaN: what was NaN comes back as None."""
    pytest.importorskip("pytest_benchmark")
    lines = [a_line("supcon", "cl_kernels", 512), replace(a_line("supcon", "eager", 512), flops=math.nan)]
    few = bare(lines, machine={"cores": 2, "governor": None}, ceilings={"float32": 1e11})
    save(few, tmp_path / "results.json")
    again = load(tmp_path / "results.json")
    assert html.render(again) == html.render(few)
    assert markdown.render(again) == markdown.render(few)


def test_cuda_graphs_have_a_column() -> None:
    lines = [replace(a_line("supcon", "cl_kernels", 512), graph=(2e-5, 2e-5))]
    found = Page(html.render(bare(lines, machine={"kind": "cuda"})))
    assert "CUDA graph" in found.text("th") and "20.0 µs" in found.text("td")
    assert any("allocator" in x for x in found.text("li"))


def test_markdown_has_the_same_figures(results: Results, page: Page) -> None:
    written = markdown.render(results).replace("\\", "")
    for table in tables.headlines(results):
        assert f"| {table.work} | {table.dtype} | cl_kernels |" in written
        for row in table.rows:
            cells = row.rest if row.status else (*row.times, *row.rest)
            for cell in cells:
                assert not cell.text or (cell.text in written and cell.text in page.text("td"))
                assert cell.detail in written
            assert row.status in written
    for entry in tables.accuracy(results):
        assert all(cell.text in written and cell.text in page.text("td") for cell in entry.cells)
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
    assert figures.times(0.2051, 0.2138) == "205–214 ms"
    assert figures.rate(163.2e9) == "163 GFLOP/s"
    assert figures.rate(1.5e12) == "1.50 TFLOP/s"
    assert figures.bandwidth(21.3e9) == "21.3 GB/s"
    assert [figures.size(x) for x in (42.1e6, 999.9e6, 0, 12)] == ["42.1 MB", "1.00 GB", "0 B", "12.0 B"]
    assert figures.ratio(12.23) == "12.2×"
    assert figures.error(3.14e-7) == "3.1e-07"
    assert figures.error(None, "NaN") == "NaN"
    assert [figures.short(x) for x in ("1.00 ms", "0.100", "1000", "1.50×")] == [
        "1 ms",
        "0.1",
        "1000",
        "1.5×",
    ]
    assert figures.duration(512) == "8 min 32 s"
    for of in (figures.time, figures.rate, figures.bandwidth, figures.size, figures.ratio, figures.error):
        assert {of(None), of(math.nan), of(math.inf)} == {figures.MISSING}


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, results: Results) -> None:
    found = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return found(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"cl_kernels\[bench\]"):
        html.render(results)
    assert markdown.render(results)
