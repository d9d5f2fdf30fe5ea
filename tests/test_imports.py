"""Who imports whom: the packages' arrows, the floors inside caprese_bench, no circles; and what an import costs."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

# What each package may import of the others; at the top of a module or inside a function makes no difference.
ARROWS = {
    "caprese_kernels": set(),
    "caprese_distill": {"caprese_kernels"},
    "caprese_vllm": {"caprese_kernels"},
    "caprese_serve": {"caprese_kernels", "caprese_vllm"},
    "caprese_bench": {"caprese_kernels", "caprese_vllm", "caprese_distill", "caprese_serve"},
}
# The parts of caprese_bench, lowest first: each may import those before it.
FLOORS = (
    "results", "paper", "kernels", "hugging_face", "lora", "engine", "evaluation", "recovery", "all", "cli", "__main__",
)  # fmt: skip
# Imports every module of the package argv[1] while the packages argv[2:] cannot be imported.
IMPORT_ALL = """
import importlib, pkgutil, sys
for name in sys.argv[2:]:
    sys.modules[name] = None
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, sys.argv[1] + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
# Imports argv[1:] and prints which heavy packages were loaded with them.
IMPORT_LIGHT = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(*(name for name in ("vllm", "torch", "transformers", "openai", "pydantic", "rich") if name in sys.modules))
"""


@cache
def modules() -> dict[str, Path]:
    """Every module of the project's packages, by name."""
    found = {}
    for package in ARROWS:
        folder = Path(import_module(package).__path__[0])
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(name: str) -> frozenset[str]:
    """The project's modules that a module imports anywhere in its code, but for type checkers."""
    path = modules()[name]
    tree = ast.parse(path.read_text())
    skipped = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    for_checkers = {id(inner) for node in skipped for inner in ast.walk(node)}
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in for_checkers:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            members = (f"{base}.{alias.name}" for alias in node.names)
            found.update(member if member in modules() else base for member in members)
    return frozenset(each for each in found if each.partition(".")[0] in ARROWS and each != name)


def python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_import_names_a_module() -> None:
    """Else the tests below see less than they should."""
    assert {each for name in modules() for each in imports(name)} <= set(modules())
    assert "caprese_kernels.errors" in imports("caprese_kernels.terminal")
    assert "caprese_serve.inspection" in imports("caprese_serve.commands"), "an import inside a function"


def test_packages_import_downward() -> None:
    for name in modules():
        package = name.partition(".")[0]
        upward = {each for each in imports(name) if each.partition(".")[0] not in ARROWS[package] | {package}}
        assert not upward, name


def test_no_circles() -> None:
    graph = {name: imports(name) for name in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_floors_of_the_benchmarks() -> None:
    for name in modules():
        package, _, inner = name.partition(".")
        if package != "caprese_bench" or not inner:
            continue
        below = FLOORS[: FLOORS.index(inner.partition(".")[0]) + 1]
        for each in imports(name):
            if each.startswith("caprese_bench."):
                assert each.split(".")[1] in below, f"{name} imports {each}"


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        ("caprese_kernels", ["vllm", "transformers", "openai", "httpx", "jinja2"]),
        ("caprese_distill", ["vllm", "openai", "fastapi"]),
        ("caprese_serve", ["vllm", "transformers", "jinja2", "fastapi"]),
    ],
)
def test_every_module_needs_only_its_own_extra(package: str, absent: list[str]) -> None:
    python(IMPORT_ALL, package, *absent)


def test_packages_without_any_extra() -> None:
    python(
        "import sys; sys.modules.update(dict.fromkeys(sys.argv[1:]))\n"
        "import caprese_kernels.adapters, caprese_distill, caprese_serve.cli, caprese_vllm.plugin",
        *("vllm", "transformers", "openai", "httpx", "jinja2", "fastapi", "triton"),
    )


def test_installing_the_plugin_costs_other_vllm_users_nothing() -> None:
    assert python(IMPORT_LIGHT, "caprese_vllm", "caprese_vllm.plugin") == ""


@pytest.mark.parametrize(
    "module",
    ["caprese_serve.cli", "caprese_serve.commands", "caprese_bench.cli", "caprese_distill.cli", "caprese_distill"],
)
def test_commands_are_found_without_their_packages(module: str) -> None:
    loaded = python(IMPORT_LIGHT, module).split()
    assert not {"vllm", "torch", "transformers", "openai"} & set(loaded)


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from caprese_serve.cli import main\n"
        "try: main()\n"
        "except SystemExit: print('loaded', {'vllm', 'torch', 'transformers', 'openai'} & set(sys.modules))"
    )
    assert python(code, *arguments).splitlines()[-1] == "loaded set()"
