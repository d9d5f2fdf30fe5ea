"""What the sdist and the wheel contain, and what their metadata says."""

import ast
import os
import re
import shutil
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

import pytest

from caprese_kernels import __version__
from tests.support.packaging import NOT_COPIED, ROOT, build

PACKAGES = ("caprese_vllm", "caprese_kernels", "caprese_distill", "caprese_serve", "caprese_bench")
IN_TREE = {
    "caprese_vllm": ROOT / "caprese_vllm",
    "caprese_kernels": ROOT / "kernels/caprese_kernels",
    "caprese_distill": ROOT / "distill/caprese_distill",
    "caprese_serve": ROOT / "serve/caprese_serve",
    "caprese_bench": ROOT / "benchmarks/caprese_bench",
}
# Distributions of modules with another name, and modules that come with another requirement.
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "triton": "torch",
    "fastapi": "vllm",
    "starlette": "vllm",
    "prometheus_client": "vllm",
    "cuda": "torch",  # cuda-bindings, with its CUDA builds
    "pyarrow": "datasets",
    "pydantic_core": "pydantic",
}
# The extras that each package's code may need, beside the dependencies.
EXTRAS: dict[str, set[str]] = {
    "caprese_kernels": set(),
    "caprese_vllm": {"cuda"},
    "caprese_distill": {"distill", "ray", "cuda"},
    "caprese_serve": {"demo", "distill", "playground"},
    "caprese_bench": {"bench"},
}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def distribution(site: Path) -> Distribution:
    (metadata,) = site.glob("caprese_vllm-*.dist-info")
    return PathDistribution(metadata)


def test_the_wheel_has_every_file_of_the_packages(wheel: Path) -> None:
    held = {name for name in contents(wheel) if ".dist-info/" not in name}
    wanted = {
        f"{package}/{path.relative_to(folder)}"
        for package, folder in IN_TREE.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == wanted
    assert {f"{package}/py.typed" for package in PACKAGES} <= held


def test_the_sdist_is_enough_to_test_and_to_build(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    for folder in ("tests", "tools", "deploy", "docs", "requirements", "benchmarks/results"):
        left_out = {".html", ".csv", ".pyc"} if folder == "benchmarks/results" else {".pyc"}
        wanted = {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix not in left_out}
        wanted = {
            path for path in wanted if not {"build", "earlier"} & set(path.parts) and ".egg-info" not in str(path)
        }
        assert wanted == {p.relative_to(source) for p in (source / folder).rglob("*") if p.is_file()}
    for name in ("Makefile", "README.md", "LICENSE", "benchmarks/latency.py", ".ci/run", ".dockerignore"):
        assert (source / name).read_bytes() == (ROOT / name).read_bytes()
    assert sdist.stat().st_size < 5e6
    rebuilt, original = contents(build("wheel", source, tmp_path / "wheel")), contents(wheel)
    assert rebuilt.keys() == original.keys()
    for name in rebuilt.keys() - {f"caprese_vllm-{__version__}.dist-info/RECORD"}:
        assert rebuilt[name] == original[name], name


def test_a_wheel_built_twice_is_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From two copies of the tree, made at different times, with the date that reproducible builds set."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1767225600")
    wheels = []
    for number in (1, 2):
        copy = Path(shutil.copytree(ROOT, tmp_path / f"tree{number}", ignore=NOT_COPIED, copy_function=shutil.copyfile))
        for path in copy.rglob("*"):
            os.utime(path, (1.7e9 + number, 1.7e9 + number))
        wheels.append(build("wheel", copy, tmp_path / f"wheel{number}").read_bytes())
    assert wheels[0] == wheels[1]


def test_metadata(distribution: Distribution) -> None:
    assert distribution.version == __version__
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in distribution.metadata.get_all("Classifier", [])
    scripts = distribution.entry_points.select(group="console_scripts")
    assert {point.name: point.value for point in scripts} == {"caprese": "caprese_serve.cli:main"}


def requirements(distribution: Distribution, extra: str | None) -> set[str]:
    """The names of the distributions that the dependencies, or those of an extra, ask for."""
    found: set[str] = set()
    for line in distribution.requires or []:
        name, extras, condition = re.fullmatch(r"([\w.-]+)(?:\[([\w,-]+)\])?[^;]*(?:; (.*))?", line).groups()  # type: ignore[union-attr]
        if condition != (None if extra is None else f'extra == "{extra}"'):
            continue
        if name == "caprese-vllm":
            found = found.union(*(requirements(distribution, each) for each in extras.split(",")))
        else:
            found.add(name)
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_extras_bring_what_the_code_imports(distribution: Distribution, package: str) -> None:
    known = requirements(distribution, None).union(*(requirements(distribution, each) for each in EXTRAS[package]))
    for path in IN_TREE[package].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module or "")
            for name in {each.partition(".")[0] for each in names} - sys.stdlib_module_names - set(PACKAGES):
                if name != "_typeshed":  # only type checkers have it
                    assert DISTRIBUTIONS.get(name, name).replace("_", "-") in known, f"{path} imports {name}"


def test_extras_of_verbs(distribution: Distribution) -> None:
    """The extra that an error names is the verb's, and enough for it."""
    verbs = distribution.entry_points.select(group="caprese.commands").names
    metadata = Parser().parsestr(distribution.read_text("METADATA") or "")
    plain = {"inspect", "doctor", "collect-env"}
    assert verbs - plain == {"serve", "playground", "demo", "distill", "calibrate", "evaluate", "bench"}
    assert verbs & set(metadata.get_all("Provides-Extra", [])) == verbs - plain
    assert {"starlette", "uvicorn", "httpx", "openai"} == requirements(distribution, "playground")
    for verb in ("calibrate", "evaluate"):
        assert requirements(distribution, verb) == requirements(distribution, "distill")
    assert {"vllm", "openai", "httpx"} <= requirements(distribution, "demo")
    assert requirements(distribution, "distill") | requirements(distribution, "demo") < requirements(
        distribution, "bench"
    )
