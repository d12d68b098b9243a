"""The examples of the docstrings run, and give what they show."""

from __future__ import annotations

import doctest
import inspect

import pytest

import cl_kernels as clk

FUNCTIONS = [name for name in clk.__all__ if inspect.isfunction(getattr(clk, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_example(name: str) -> None:
    function = getattr(clk, name)
    (example,) = doctest.DocTestFinder(recurse=False).find(function, name, globs={})
    assert example.examples, f"{name} has no example"
    output: list[str] = []
    assert doctest.DocTestRunner().run(example, out=output.append).failed == 0, "".join(output)
