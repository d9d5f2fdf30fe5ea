"""Groups of commands that import a command when it is asked for, and take its help from its source without importing.

So `caprese --help` costs neither torch nor transformers, and a verb whose packages are missing disturbs no other.
"""

from __future__ import annotations

import ast
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from caprese_kernels import terminal
from caprese_kernels.errors import CapreseError, printable

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


@dataclass(frozen=True)
class Verb:
    """Where a command is defined: a function, or a `typer.Typer` for a group of commands."""

    module: str
    attribute: str
    distribution: str  # what to install for it, as pip names it
    extra: str | None = None  # the distribution's extra with the packages that the command needs

    @classmethod
    def of(cls, point: EntryPoint) -> Verb:
        """The command that an entry point names. Its extra is the one of the same name, if there is such."""
        assert point.dist is not None  # true of every entry point that `entry_points` returns
        extras = point.dist.metadata.get_all("Provides-Extra") or []
        return cls(point.module, point.attr, point.dist.name, point.name if point.name in extras else None)

    def summary(self) -> str:
        """The command's help in one line: the first paragraph of the docstring of the function, or, for a group, of
        its module. Raises ImportError, SyntaxError or OSError if there is no source to read."""
        spec = find_spec(self.module)
        source = getattr(spec.loader, "get_source", lambda name: None)(self.module) if spec else None
        if source is None:
            raise ModuleNotFoundError(f"no module {self.module}", name=self.module)
        tree = ast.parse(source)
        function = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == self.attribute)
        docstring = ast.get_docstring(next(function, tree)) or ""
        return " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())

    def load(self, name: str) -> Any:
        """Import the command. Raises CapreseError if that fails."""
        try:
            found = getattr(import_module(self.module), self.attribute)
        except Exception as error:  # the code may be a third party's, and raise anything
            raise self.missing_extra(error) or CapreseError(
                f"caprese {name}",
                expected=f"{self.module}:{self.attribute}, a command of {self.distribution}",
                found=f"{type(error).__name__}: {error}",
                fix=f"reinstall {self.distribution}, or report this to its authors",
            ) from error
        if isinstance(found, typer.Typer):
            return get_command(found)
        app = typer.Typer(add_completion=False)
        app.command(name)(terminal.verb(found))
        return get_command(app)

    def missing_extra(self, error: Exception) -> CapreseError | None:
        """What to install, if `error` says that a third-party package is missing."""
        package = (getattr(error, "name", None) or "").partition(".")[0]
        if not isinstance(error, ModuleNotFoundError) or self.extra is None or package.startswith("caprese_"):
            return None
        return CapreseError(
            f"package {package}",
            expected=f"the extra [{self.extra}] of {self.distribution} installed",
            found="no such package",
            fix=f'pip install "{self.distribution}[{self.extra}]"',
        )


class LazyGroup(TyperGroup, ABC):
    """A group whose commands `verbs` lists: `typer.Typer(cls=...)` takes a subclass that defines it."""

    @abstractmethod
    def verbs(self) -> Mapping[str, Verb]:
        """The commands by name, in the order of --help."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._verbs = self.verbs()
        # Stand-ins, to be listed and completed; `resolve_command` replaces the one that runs.
        self.commands.update({name: TyperCommand(name) for name in self._verbs})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The stand-in, with its help; None, after a warning, if the verb's source cannot be read."""
        command = super().get_command(ctx, cmd_name)
        if command is not None and command.help is None:
            try:
                command.help = self._verbs[cmd_name].summary()
            except Exception as error:  # as in `Verb.load`
                verb = self._verbs[cmd_name]
                reason = f"{type(error).__name__}: {error}"
                warning = f"caprese: warning: no verb {cmd_name} of {verb.distribution}: {reason}"
                print(printable(warning), file=sys.stderr)
                return None
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is asked for, imported."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and name in self._verbs:
            command = self._verbs[name].load(name)
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Raises CapreseError, naming the extra to install, if a package that it needs is missing."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            verb = self._verbs.get(ctx.invoked_subcommand or "")
            if verb is None or (missing := verb.missing_extra(error)) is None:
                raise
            raise missing from error
