"""The structure of the code: who imports whom, how much a function takes, names, docstrings."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import cl_kernels

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(cl_kernels.__file__).resolve().parent
FOLDERS = ("cl_kernels", "gates", "tests", "bench", "examples")
MOST_PARAMETERS = 10
MANY_KEYWORDS = {
    "cl_kernels/integrations/eztorch.py: compute_sce_token_loss",
    "cl_kernels/losses/info_nce.py: info_nce_loss",
    "cl_kernels/losses/sce.py: sce_loss",
    "cl_kernels/losses/selfcon.py: selfcon_loss",
    "cl_kernels/losses/supcon.py: supcon_loss",
    "cl_kernels/losses/supcon.py: __init__",
    "cl_kernels/reference.py: supcon_loss",
}
"""The losses that have more options than a function should take; kernels are another matter."""

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source checkout")


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def sources() -> list[Path]:
    return [ROOT / "setup.py", *(path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py")))]


@functools.cache
def modules() -> dict[str, Path]:
    """The files of the package by dotted name; a package's own stands for its __init__."""
    parts = {path: path.relative_to(PACKAGE.parent).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
    return {".".join(x for x in names if x != "__init__"): path for path, names in parts.items()}


def nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All that runs: not what stands under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from nodes(child)


def absolute(module: str, dots: int, name: str | None) -> str:
    """The full name of what a module calls by dots and a name."""
    inside = module.split(".") + ["__init__"] * modules()[module].match("__init__.py")
    return ".".join([*inside[:-dots], *filter(None, [name])])


def imported(module: str) -> Iterator[str]:
    """Modules of the package that a module imports, at its top or later, by statement or by name."""
    for node in nodes(tree(modules()[module])):
        if isinstance(node, ast.ImportFrom) and node.level:
            origin = absolute(module, node.level, node.module)
            names = [f"{origin}.{alias.name}" for alias in node.names]
            yield from (name if name in modules() else origin for name in names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            target = node.args[0].value if isinstance(node.args[0], ast.Constant) else ""
            if dots := len(target) - len(target.lstrip(".")):
                yield absolute(module, dots, target[dots:])


def test_imports_have_no_circle() -> None:
    graph = {module: set(imported(module)) for module in modules()}
    assert "cl_kernels.dispatch" in graph["cl_kernels.tools.check"]
    assert "cl_kernels.triton.lse" in graph["cl_kernels.triton.contrastive"]
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_imports_inside_the_package_are_relative() -> None:
    found = []
    for module, path in modules().items():
        for node in ast.walk(tree(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            found += [f"{module}: {name}" for name in names if name.split(".")[0] == "cl_kernels"]
    assert not found


ELSEWHERE = """
import importlib.util, sys, torch
from torch.nn.functional import cross_entropy

init, folder = sys.argv[1:]
spec = importlib.util.spec_from_file_location("elsewhere", init, submodule_search_locations=[folder])
package = sys.modules["elsewhere"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
q, k = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
loss, logits = package.clip_loss(q, k, logit_scale=2.0), 2 * q @ k.T
expected = (cross_entropy(logits, torch.arange(5)) + cross_entropy(logits.T, torch.arange(5))) / 2
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(torch.autograd.grad(loss, q), torch.autograd.grad(expected, q))
assert "cl_kernels" not in sys.modules
"""


def test_the_package_loads_from_anywhere_under_any_name(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ELSEWHERE, str(PACKAGE / "__init__.py"), str(PACKAGE)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def jitted(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef))


def test_functions_take_few_parameters() -> None:
    found = set()
    for path in sources():
        for function in functions(path):
            taken = function.args
            count = len([*taken.posonlyargs, *taken.args, *taken.kwonlyargs])
            if count > MOST_PARAMETERS and not jitted(function):
                found.add(f"{path.relative_to(ROOT)}: {function.name}")
    assert found == MANY_KEYWORDS


def test_docstrings_stand_by_themselves() -> None:
    """They begin with a noun or a verb, not as the rest of a sentence that the name began."""
    found = []
    for path in sources():
        for node in ast.walk(tree(path)):
            text = node.value if isinstance(node, ast.Expr) else None
            if isinstance(text, ast.Constant) and re.match(r"(Of|What)\b", str(text.value)):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert "\n".join(found) == ""


def test_kernels_have_names_of_their_own() -> None:
    paths = sorted((PACKAGE / "triton").glob("*.py"))
    names = [function.name for path in paths for function in functions(path) if jitted(function)]
    kernels = Counter(name for name in names if name.endswith("_kernel"))
    assert kernels and not [name for name, count in kernels.items() if count > 1 or name == "_kernel"]


def test_files_of_the_benchmark_are_short() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in (PACKAGE / "bench").rglob("*.py")}
    assert lines and not {name: count for name, count in lines.items() if count > 400}
