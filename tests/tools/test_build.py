"""Building and installing: why an extension was not built is told, a source distribution is whole, and
README's installation works as written."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from cl_kernels import build_record, extension

ROOT = Path(__file__).resolve().parents[2]
BUILT_FROM = ("LICENSE", "MANIFEST.in", "README.md", "cl_kernels", "csrc", "pyproject.toml", "setup.py")
NOT_SOURCES = shutil.ignore_patterns("__pycache__", "*.so", build_record.FILE)
NOT_DISTRIBUTED = {".gitignore"}
BROKEN = "int broken = undeclared;\n"
WHOLE = 'extern "C" void* PyInit__C() { return nullptr; }\n'

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source checkout")


def copy_of(names: tuple[str, ...], folder: Path) -> Path:
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=NOT_SOURCES)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run(*command: str, cwd: Path, **environment: str) -> str:
    ours = ("CL_KERNELS_", "TRITON_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def setup(folder: Path, *arguments: str, **environment: str) -> str:
    return run(sys.executable, "setup.py", "--quiet", *arguments, cwd=folder, **environment)


INFO = """
import runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in str(finder.__module__)]
sys.argv[1:] = ["info"]
runpy.run_module("cl_kernels", run_name="__main__")
"""


def info(folder: Path) -> str:
    """`python -m cl_kernels info` of the package there, without the extensions of an editable install."""
    return run(sys.executable, "-W", "ignore", "-c", INFO, cwd=folder)


def with_sources(text: str, folder: Path) -> None:
    """A C++ extension of one file."""
    shutil.rmtree(folder / "csrc", ignore_errors=True)
    (folder / "csrc").mkdir()
    (folder / "csrc" / "extension.cpp").write_text(text)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return copy_of(BUILT_FROM, tmp_path / "checkout")


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")), reason="there is no C++ compiler")
def test_a_failed_compilation_is_told_until_one_succeeds(checkout: Path) -> None:
    with_sources(BROKEN, checkout)
    shown = setup(checkout, "build_ext", "--inplace")
    assert "installing WITHOUT compiled kernels: the compilation failed: csrc/extension.cpp:1:" in shown
    told = info(checkout)
    assert re.search(r"extension +none: .* was not built, because the compilation failed: csrc/ext", told)
    assert "‘undeclared’" in told or "'undeclared'" in told
    with_sources(WHOLE, checkout)
    assert "error" not in setup(checkout, "build_ext", "--inplace")
    assert build_record.reason(checkout / "cl_kernels", "cl_kernels._C") is None
    assert list((checkout / "cl_kernels").glob("_C.*"))
    with_sources(BROKEN, checkout)
    setup(checkout, "build_ext", "--inplace")
    assert not list((checkout / "cl_kernels").glob("_C.*"))  # of the build before
    assert build_record.reason(checkout / "cl_kernels", "cl_kernels._C") is not None


def test_a_wheel_tells_why_it_has_no_extension(checkout: Path) -> None:
    setup(checkout, "bdist_wheel", CL_KERNELS_SKIP_BUILD="1")
    (wheel,) = (checkout / "dist").glob("*.whl")
    installed = checkout.parent / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    assert "was not built, because CL_KERNELS_SKIP_BUILD is set" in info(installed)
    # One of a build that goes on to compile has the reasons of that build alone.
    (checkout / "dist" / wheel.name).unlink()
    setup(checkout, "bdist_wheel", CXX="no-such-compiler")
    (wheel,) = (checkout / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        reasons = json.loads(archive.read(f"cl_kernels/{build_record.FILE}"))
    assert "'no-such-compiler' is not on PATH" in reasons["cl_kernels._C"]


def test_reasons_of_what_was_built_are_not_kept(tmp_path: Path) -> None:
    package = tmp_path / "package"
    assert build_record.reason(package, "a") is None
    build_record.write(package, {"a": "there is no compiler", "b": None})
    assert build_record.reason(package, "a") == "there is no compiler"
    assert build_record.reason(package, "b") is None
    build_record.write(package, {"a": None, "b": None})
    assert build_record.reason(package, "a") is None and not (package / build_record.FILE).exists()
    (package / build_record.FILE).write_text("{")
    assert build_record.reason(package, "a") is None


def test_the_reason_is_in_what_a_missing_extension_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CL_KERNELS_NO_EXTENSION", raising=False)
    monkeypatch.setattr(extension, "_is_built", lambda name: False)
    monkeypatch.setattr(build_record, "reason", lambda package, name: f"{name} needs nvcc")
    assert extension._load("cl_kernels._cuda") == (
        None,
        "the compiled extension cl_kernels._cuda was not built, because cl_kernels._cuda needs nvcc",
    )


def test_a_checkout_in_which_nothing_was_built(checkout: Path) -> None:
    """It imports, and says why there are no kernels."""
    assert f"was not built, because nothing was compiled in the checkout {checkout}" in info(checkout)


def git_files(*options: str) -> set[str]:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    listed = run("git", "ls-files", "-z", *options, cwd=ROOT)
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


def test_a_source_distribution_has_every_tracked_file(tmp_path: Path) -> None:
    tracked = git_files() - NOT_DISTRIBUTED
    untracked = git_files("--others", "--exclude-standard")
    checkout = copy_of(tuple(sorted(tracked | untracked)), tmp_path)  # without what an earlier build left
    setup(checkout, "sdist", CL_KERNELS_SKIP_BUILD="1")
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {file.name.partition("/")[2] for file in files if file.isfile()}
    assert not tracked - names, "MANIFEST.in leaves these out"
    made = {name for name in names if name.startswith("cl_kernels.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert not names - tracked - untracked - made


def installation() -> list[str]:
    """README's commands for an environment that has torch."""
    text = (ROOT / "README.md").read_text()
    found = re.search(r"To use the package in an environment.*?```console\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return [line.partition("#")[0].strip() for line in found[1].splitlines()]


def wheel_of(package: str, folder: Path) -> None:
    """A wheel of what is installed here, so that pip need not fetch it."""
    installed = importlib.metadata.distribution(package)
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{package}-{installed.version}-py3-none-any.whl", "w") as wheel:
        for file in installed.files or []:
            if ".." not in file.parts and file.suffix != ".pyc":
                wheel.write(file.locate(), file.as_posix())


def test_the_documented_installation(checkout: Path, tmp_path: Path) -> None:
    """In a fresh environment that sees the torch of this one; without the network, and without compiling."""
    pytest.importorskip("ensurepip")
    if int(importlib.metadata.version("setuptools").partition(".")[0]) >= 82:
        pytest.skip("README asks for setuptools below 82, and pip is not to fetch one")
    commands = installation()
    assert [command.split()[0] for command in commands] == ["pip", "pip", "cd", "python", "python"]
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", str(environment), cwd=tmp_path)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "here.pth").write_text("\n".join(site.getsitepackages()))  # after its own
    wheel_of("setuptools", tmp_path / "wheels")
    script = "\n".join(["set -e", *commands]).replace("cl_kernels check", "cl_kernels check --losses dimcl")
    told = run(
        *("bash", "-c", script), cwd=checkout, PATH=f"{environment / 'bin'}:{os.environ['PATH']}",
        PIP_CONFIG_FILE=os.devnull, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path / "wheels"),
        CL_KERNELS_SKIP_BUILD="1", PYTHONWARNINGS="ignore",
    )  # fmt: skip
    assert "was not built, because CL_KERNELS_SKIP_BUILD is set" in told
    installed = environment.glob("lib/python*/site-packages/cl_kernels/__init__.py")
    assert len(list(installed)) == 1
