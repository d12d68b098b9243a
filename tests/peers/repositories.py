"""The papers' repositories, which are not on a package registry: clones of them in the folder that
CL_KERNELS_REPOSITORIES names, each under its name here.

    git clone https://github.com/HobbitLong/SupContrast
    CL_KERNELS_REPOSITORIES=$PWD python -m pytest tests/peers

The commits are those that the adapters were compared with. Single files are loaded, without what else their
package imports; without the folder there is nothing to compare.
"""

from __future__ import annotations

import ast
import importlib.util
import linecache
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

COMMITS = {
    "SupContrast": ("https://github.com/HobbitLong/SupContrast", "66a8fe53880d"),
    "self-contrastive-learning": (
        "https://github.com/raymin0223/self-contrastive-learning",
        "5e7c2c57804c",
    ),
    "eztorch": ("https://github.com/juliendenize/eztorch", "d8354719d9a4"),
    "DimCL": ("https://github.com/thanhkaist/DimCL", "1306a3786c56"),
    "solo-learn": ("https://github.com/vturrisi/solo-learn", "9187ea39c2c3"),
}
GATHERING = ("get_rank", "GatherLayer", "gather", "concat_all_gather_no_grad")


def clone(repository: str) -> Path | None:
    """Where a repository is, if it is there."""
    folder = os.environ.get("CL_KERNELS_REPOSITORIES")
    path = Path(folder or "") / repository
    return path if folder and path.is_dir() else None


def load(repository: str, path: str, name: str | None = None) -> ModuleType:
    """A file of a repository as a module, under a made-up name unless told, and not in sys.modules."""
    root = clone(repository)
    assert root is not None
    title = name or f"{repository}/{path}".replace("/", "_").replace("-", "_").removesuffix(".py")
    return load_file(root / path, title)


def load_file(path: Path, name: str) -> ModuleType:
    linecache.checkcache(str(path))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_commit(repository: str, commit: str, path: str) -> str:
    """A file as it was."""
    command = ["git", "-C", str(clone(repository)), "show", f"{commit}:{path}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def load_solo(repository: str, files: Sequence[str]) -> dict[str, ModuleType]:
    """Files of solo/losses of solo-learn or of DimCL, by name."""
    with solo_utils(repository):
        return {file: load(repository, f"solo/losses/{file}.py") for file in files}


@contextmanager
def solo_utils(repository: str) -> Iterator[None]:
    """Inside, `solo.utils.misc` has the repository's functions that gather, and no more."""
    root = clone(repository)
    assert root is not None
    path = root / "solo/utils/misc.py"
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in GATHERING]
    misc = ModuleType("solo.utils.misc")
    vars(misc).update(torch=torch, dist=torch.distributed, __file__=str(path))
    exec(compile(tree, str(path), "exec"), vars(misc))
    stand_ins = {
        "solo": ModuleType("solo"),
        "solo.utils": ModuleType("solo.utils"),
        "solo.utils.misc": misc,
        "ipdb": ModuleType("ipdb"),  # a debugger, which DimCL imports
    }
    with only_here("solo", "ipdb"):
        sys.modules.update(stand_ins)
        yield


@contextmanager
def only_here(*roots: str) -> Iterator[dict[str, ModuleType]]:
    """sys.modules, whose modules of these packages are after it what they were before."""

    def those() -> dict[str, ModuleType]:
        return {name: x for name, x in sys.modules.items() if name.partition(".")[0] in roots}

    before = those()
    try:
        yield sys.modules
    finally:
        for name in those():
            del sys.modules[name]
        sys.modules.update(before)
