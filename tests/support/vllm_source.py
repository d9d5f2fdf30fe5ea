"""compat.py's contract with vLLM, checked against a release's source by reading it: neither vLLM nor its torch runs."""

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from caprese_vllm.compat import Symbol

Function = ast.FunctionDef | ast.AsyncFunctionDef
Found = tuple[ast.AST, str]  # a definition, and the module that holds it
# Module, name and needs of symbols that no vLLM has, by what is missing.
MISSING: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "symbol": ("vllm.engine.arg_utils", "EngineArgs.gone", ()),
    "module": ("vllm.engine.gone", "EngineArgs.add_cli_args", ()),
    "parameter": ("vllm.engine.arg_utils", "EngineArgs.add_cli_args", ("gone",)),
    "field": ("vllm.engine.arg_utils", "EngineArgs", ("model", "gone")),
    "attribute": ("vllm.v1.worker.gpu_input_batch", "InputBatch", ("req_ids", "gone")),
    "property": ("vllm.platforms", "current_platform", ("gone",)),
}


class VllmSource:
    """A tree of vLLM's Python files; `root` holds the folder vllm."""

    def __init__(self, root: Path):
        self.root = root

    def problem(self, symbol: Symbol) -> str | None:
        """What the source lacks of the symbol; None if it has all that we rely on."""
        module, _, member = symbol.name.partition(".")
        found = self.definition(symbol.module, module)
        if found is None:
            return f"no {symbol.path}"
        node, home = found
        for part in filter(None, member.split(".")):
            inherited = self.member(node, home, part) if isinstance(node, ast.ClassDef) else None
            if inherited is None:
                return f"no {symbol.path}"
            node, home = inherited
        missing = [name for name in symbol.needs if not self.has(node, home, name)]
        return f"{symbol.path}: no {', '.join(missing)}" if missing else None

    def has(self, node: ast.AST, home: str, name: str) -> bool:
        """Whether a function has the parameter; a class, or the class of an annotated object, the attribute."""
        if isinstance(node, Function):
            given = node.args
            return name in [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        if isinstance(node, ast.AnnAssign):  # current_platform: Platform
            found = self.definition(home, ast.unparse(node.annotation).strip("'\""))
            return found is not None and self.has(*found, name)
        return isinstance(node, ast.ClassDef) and self.member(node, home, name) is not None

    def definition(self, module: str, name: str) -> Found | None:
        """The definition of a module's name, wherever it is imported from, and the module that holds it."""
        tree = self.tree(module)
        if tree is None:
            return None
        imported: tuple[str, str] | None = None
        starred = []
        for node in statements(tree.body):
            if isinstance(node, Function | ast.ClassDef) and node.name == name:
                return node, module
            if name in assigned(node):
                return node, module
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if alias.name == "*":
                        starred.append(self.imported_from(node, module))
                    elif (alias.asname or alias.name) == name:
                        imported = self.imported_from(node, module), alias.name
        places = [imported] if imported else [(other, name) for other in starred]
        return next(filter(None, (self.definition(*place) for place in places)), None)

    def member(self, node: ast.ClassDef, home: str, name: str) -> Found | None:
        """A class's attribute or method, of its instances too, or of a base class's."""
        for child in node.body:
            if (isinstance(child, Function) and child.name == name) or name in assigned(child):
                return child, home
        for inner in ast.walk(node):
            if f"self.{name}" in assigned(inner):
                return inner, home
        for base in node.bases:
            words = ast.unparse(base).partition("[")[0]
            found = self.definition(home, words.rpartition(".")[2])
            if found and isinstance(found[0], ast.ClassDef) and found[0] is not node:
                inherited = self.member(found[0], found[1], name)
                if inherited:
                    return inherited
        return None

    def tree(self, module: str) -> ast.Module | None:
        """None if there is no such module."""
        path = self.path(module)
        return _parse(path) if path else None

    def path(self, module: str) -> Path | None:
        """A module's file, or its package's."""
        place = self.root / module.replace(".", "/")
        return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.exists()), None)

    def imported_from(self, node: ast.ImportFrom, module: str) -> str:
        """The module of `from X import ...`, whose X may be relative."""
        if not node.level:
            return node.module or ""
        path = self.path(module)
        parts = module.split(".") if path and path.name == "__init__.py" else module.split(".")[:-1]
        parts = parts[: len(parts) - node.level + 1]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def text(self, symbol: Symbol) -> str | None:
        """The symbol's code without comments and layout, to compare releases."""
        module, _, member = symbol.name.partition(".")
        found = self.definition(symbol.module, module)
        for part in filter(None, member.split(".")):
            found = self.member(found[0], found[1], part) if found and isinstance(found[0], ast.ClassDef) else None
        return ast.unparse(found[0]) if found else None


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """A module's statements, also those under if TYPE_CHECKING and try."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            for part in (node.body, node.orelse, *(h.body for h in getattr(node, "handlers", []))):
                yield from statements(part)


def assigned(node: ast.AST) -> list[str]:
    """The names that a statement assigns, `self.x` among them."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    flat = [e for target in targets for e in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return [ast.unparse(target) for target in flat]


def fetch(version: str, folder: Path) -> Path:
    """The Python files of vLLM's wheel of that version, below `folder`, by pip; some 340 MB once."""
    place = folder / f"vllm-{version}"
    if not (place / "vllm").exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
        platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in (28, 31, 35)]
        subprocess.run([*pip, *platforms, f"vllm=={version}"], check=True)
        wheel = max(folder.glob(f"vllm-{version}-*.whl"), key=lambda path: path.stat().st_mtime)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place, [n for n in archive.namelist() if re.fullmatch(r"vllm/.*\.py", n)])
        wheel.unlink()
    return place
