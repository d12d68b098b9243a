"""The examples of the docstrings run, and give what they show."""

from __future__ import annotations

import doctest
import inspect

import pytest

import cl_kernels as clk

NAMES = [name for name in clk.__all__ if inspect.isfunction(getattr(clk, name)) or name == "KeyQueue"]


@pytest.mark.parametrize("name", NAMES)
def test_example(name: str) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(clk, name), name, globs={})
    assert example.examples, f"{name} has no example"
    output: list[str] = []
    assert doctest.DocTestRunner().run(example, out=output.append).failed == 0, "".join(output)
