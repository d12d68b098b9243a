"""The parametrised tests that run on a push, and those that wait for `make test-full` (pytest -m full).

A test's cases are what its parameters make, but for the dtype. On a push

    every case runs in one dtype, in turn; the main case, the first of each op and backend, in all of them;
    of the temperatures those of TEMPERATURES run, where a test has both;
    where the kernels for GPUs, the emulator or the interpreter and their tests are those that the last whole
    run passed with (gates/tested.tsv), their main cases alone run.

What is asked for by a node id or -k runs as asked, and on a GPU everything runs. `make test-full` runs all
and, where all passed, writes gates/tested.tsv by `tests/matrix.py`.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import recorded

ROOT = Path(__file__).resolve().parents[1]
TESTED = recorded.FOLDER / "tested.tsv"
TEMPERATURES = (0.07, 0.01)  # the papers', and the lowest
MAIN_OF = ("op", "kernels", "backend", "api")  # each value of these has a main case
HOPPER = ("90", "cuda 90")  # whose kernels take half precision only

# By kernels: their tests, and what decides about them beside these.
KERNELS = {
    "csrc/cuda": (
        ("tests/cuda/*.py", "tests/losses/test_gpu_losses.py"),
        ("csrc/cuda/**/*", "csrc/*.h", "tests/emulator/*"),
    ),
    "cl_kernels/triton": (
        ("tests/triton/*.py", "tests/losses/test_gpu_losses.py"),
        ("cl_kernels/triton/**/*.py", "tests/interpreter.py"),
    ),
}
SUFFIXES = (".py", ".h", ".cpp", ".cu")
SHARED = ("tests/op_c*.py", "tests/soft_target_checks.py", "tests/comparisons.py")


def digests(root: Path = ROOT) -> dict[str, str]:
    """A digest of each kind of kernels with its tests."""
    found = {}
    for name, (tests, sources) in KERNELS.items():
        paths = {path for pattern in (*tests, *sources, *SHARED) for path in root.glob(pattern)}
        files = {path.relative_to(root).as_posix(): path for path in paths if path.suffix in SUFFIXES}
        texts = [(at, files[at].read_text(encoding="utf-8")) for at in sorted(files)]
        found[name] = recorded.digest(part for text in texts for part in text)
    return found


def tested(path: Path = TESTED) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return dict(line.split("\t") for line in lines)


def unchanged(root: Path = ROOT, path: Path = TESTED) -> set[str]:
    """The kinds of kernels that the last whole run passed with."""
    before = tested(path)
    return {name for name, made in digests(root).items() if before.get(name) == made}


@dataclass(frozen=True)
class Parameters:
    """A test's function and what it is called with."""

    function: str
    file: str
    values: Mapping[str, Any]

    @property
    def case(self) -> tuple[str, ...]:
        return tuple(
            f"{name}={_text(value)}" for name, value in sorted(self.values.items()) if name != "dtype"
        )

    @property
    def group(self) -> tuple[str, ...]:
        return (self.function, *(str(self.values[name]) for name in MAIN_OF if name in self.values))

    @property
    def kind(self) -> str | None:
        """The kernels that are tested, if they are a GPU's."""
        path = Path(self.file)
        by_triton = path.parent.name == "triton" or self.values.get("kernels") == "triton"
        if path.parent.name not in ("triton", "cuda") and path.name != "test_gpu_losses.py":
            return None
        return "cl_kernels/triton" if by_triton else "csrc/cuda"

    @property
    def skips(self) -> bool:
        """Whether its kernels do not take its dtype."""
        return self.values.get("kernels") in HOPPER and "float32" in str(self.values.get("dtype"))


def _text(value: Any) -> str:
    """The same in each process that collects."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


@dataclass
class Choice:
    kept: list[bool]
    left_out: Counter[str] = field(default_factory=Counter)  # by reason


def choose(tests: Sequence[Parameters], same: Iterable[str] = ()) -> Choice:
    """Which of the tests run on a push."""
    reasons = [""] * len(tests)
    functions: dict[str, list[int]] = {}
    for i, test in enumerate(tests):
        functions.setdefault(test.function, []).append(i)
    for members in functions.values():
        cases: dict[tuple[str, ...], list[int]] = {}
        main: dict[tuple[str, ...], tuple[str, ...]] = {}
        for i in _at_temperatures(tests, members, reasons):
            cases.setdefault(tests[i].case, []).append(i)
            main.setdefault(tests[i].group, tests[i].case)
        for turn, (case, dtypes) in enumerate(cases.items()):
            is_main = main[tests[dtypes[0]].group] == case
            if not is_main and tests[dtypes[0]].kind in set(same):
                _leave(dtypes, reasons, f"cases of {tests[dtypes[0]].kind}, as in the last whole run")
            elif not is_main and len(dtypes) > 1:
                fit = [i for i in dtypes if not tests[i].skips] or dtypes
                kept = fit[(turn + turn // len(fit)) % len(fit)]  # sizes and dtypes, of which there are three
                _leave([i for i in dtypes if i != kept], reasons, "further dtypes")
    return Choice([not reason for reason in reasons], Counter(filter(None, reasons)))


def _at_temperatures(tests: Sequence[Parameters], members: list[int], reasons: list[str]) -> list[int]:
    """The tests at the temperatures that matter, or all where a function lacks one of them."""
    if not set(TEMPERATURES) <= {tests[i].values.get("tau") for i in members}:
        return members
    kept = [i for i in members if tests[i].values.get("tau") in TEMPERATURES]
    _leave([i for i in members if i not in set(kept)], reasons, "further temperatures")
    return kept


def _leave(members: Iterable[int], reasons: list[str], reason: str) -> None:
    for i in members:
        reasons[i] = reason


def parameters(item: pytest.Item) -> Parameters:
    callspec = getattr(item, "callspec", None)
    values = dict(callspec.params) if callspec else {}
    return Parameters(item.nodeid.partition("[")[0], item.nodeid.partition("::")[0], values)


class Plugin:
    """Leaves tests out of a run, and says at its end how many and why."""

    def __init__(self, config: pytest.Config) -> None:
        self.lines: list[str] = []
        config.addinivalue_line("markers", "full: everything; -m full runs what a push leaves out too")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        for item in items:
            item.add_marker(pytest.mark.full)
        named = any("[" in argument for argument in config.args) or config.option.keyword
        on_gpu = os.environ.get("CL_KERNELS_TEST_DEVICE", "cpu") != "cpu"
        if named or on_gpu or re.search(r"\bfull\b", config.option.markexpr):
            return
        same = unchanged()
        choice = choose([parameters(item) for item in items], same)
        left = [item for item, kept in zip(items, choice.kept, strict=True) if not kept]
        for name in KERNELS:
            state = (
                "as the last whole run passed with: main cases alone"
                if name in same
                else "changed: every case"
            )
            self.lines.append(f"{name}: {state}")
        if left:
            why = ", ".join(f"{count} {reason}" for reason, count in sorted(choice.left_out.items()))
            self.lines.append(f"left for `make test-full`: {len(left)} of {len(items)} tests: {why}")
            items[:] = [item for item, kept in zip(items, choice.kept, strict=True) if kept]
            config.hook.pytest_deselected(items=left)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["matrix"] = self.lines

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """A worker of xdist has collected what all did."""
        self.lines = getattr(node, "workeroutput", {}).get("matrix", self.lines)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for line in self.lines:
            terminalreporter.write_line(line)


def main() -> int:
    """Called where the whole suite passed."""
    from emulator import build

    found = digests()
    if reason := build.obstacle():
        print(f"csrc/cuda is left as it was: {reason}")
        found["csrc/cuda"] = tested().get("csrc/cuda", "")
    TESTED.write_text("".join(f"{name}\t{made}\n" for name, made in sorted(found.items())), encoding="utf-8")
    print(f"{TESTED.relative_to(ROOT)}: what the whole suite passed with")
    return 0


if __name__ == "__main__":
    sys.exit(main())
