"""The modules of the plugin and of the kernels import each other in one direction only."""

import ast
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest


def imports(source: Path, package: str) -> set[str]:
    """Names of the package's own top-level modules that the file imports, inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level == 1 and node.module is None:
                found |= {alias.name for alias in node.names}
            elif node.level == 1 or (node.module or "").startswith(f"{package}."):
                found.add((node.module or "").removeprefix(f"{package}.").split(".")[0])
    return found


@pytest.mark.parametrize("package", ["caprese_vllm", "caprese_kernels"])
def test_no_import_runs_in_a_circle(package: str) -> None:
    sources = [p for p in Path(import_module(package).__path__[0]).glob("*.py") if p.stem != "__init__"]
    graph = {source.stem: imports(source, package) - {"__version__"} for source in sources}
    assert any(graph.values())
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, with the circle
    assert set(order) >= set(graph)
