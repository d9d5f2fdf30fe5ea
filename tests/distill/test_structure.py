"""The floors of caprese_distill: imports point down; no function takes more than eight parameters."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import caprese_distill

ROOT = Path(caprese_distill.__file__).parent
# From the bottom; a folder is one floor. A module imports from lower floors, or from its own folder.
FLOORS = [
    {"progress"},
    {"blocks", "head", "kept", "loading", "options", "placement", "schedule"},
    {"command_line", "config", "data", "settings_file"},
    {"calibration", "checkpoint", "inputs"},
    {"selection"},
    {"applied", "prior", "quality", "student"},
    {"end_to_end", "layer_wise"},
    {"work"},
    {"scale"},
    {"stage_files"},
    {"memory", "stages", "timing"},
    {"plan"},
    {"result"},
    {"report"},
    {"card"},
    {"push"},
    {"calibrate", "evaluate", "job"},
    {"cli"},
]
MAX_PARAMETERS = 8


def modules() -> dict[str, ast.Module]:
    """The syntax tree of every module but the packages' __init__, by name: "data.samples"."""
    paths = [path for path in ROOT.rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in paths}


def imported(name: str, tree: ast.Module, known: set[str]) -> Iterator[str]:
    """The modules of this package that the module `name` imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = name.split(".")[: -node.level]
            target = ".".join([*package, *([node.module] if node.module else [])])
            yield from [target] if target in known else [f"{target}.{alias.name}".lstrip(".") for alias in node.names]


def test_imports_point_down() -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    trees = modules()
    graph = {name: set(imported(name, tree, set(trees))) for name, tree in trees.items()}
    assert set(graph["cli"]) == {"command_line", "config", "job", "report", "settings_file"}
    for name, targets in graph.items():
        assert targets <= set(trees), name
        for target in targets:
            source_top, target_top = name.partition(".")[0], target.partition(".")[0]
            assert source_top == target_top or floor[target_top] < floor[source_top], f"{name} imports {target}"
    tuple(TopologicalSorter(graph).static_order())  # CycleError for a circle


def test_functions_have_few_parameters() -> None:
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                arguments = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                count = len([each for each in arguments if each not in ("self", "cls")])
                assert count <= MAX_PARAMETERS, f"{name}.{node.name} has {count} parameters"
