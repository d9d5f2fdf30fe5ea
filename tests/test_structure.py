"""Where tests keep what they share: in tests/support, or in a module beside them that pytest does not collect.

And the Makefile's list of slow tests, which `make check` leaves out: each entry names tests that exist.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent


def imported_modules(path: Path) -> Iterator[str]:
    """Every dotted name that the file imports, `from a import b` as a and as a.b; relative imports too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))


def is_test_module(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "conftest" or (last.startswith("test_") and (name.startswith("tests.") or last == name))


def test_no_module_imports_a_test_module() -> None:
    importing = {}
    for path in sorted(TESTS.rglob("*.py")):
        found = sorted(set(filter(is_test_module, imported_modules(path))))
        if found:
            importing[path.relative_to(TESTS).as_posix()] = found
    assert not importing, "move what is shared to tests/support"


def test_every_slow_test_exists() -> None:
    """A renamed file that stays in the list would slow `make check` down, or skip other tests than it says."""
    (value,) = re.findall(r"^SLOW := ((?:.*\\\n)*.*)", (TESTS.parent / "Makefile").read_text(), re.MULTILINE)
    entries = value.replace("\\", " ").split()
    assert "tests/engine" in entries
    assert len(entries) == len(set(entries))
    for entry in entries:
        path, _, function = entry.partition("::")
        assert (TESTS.parent / path).exists(), entry
        if function:
            tree = ast.parse((TESTS.parent / path).read_text())
            assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, entry
