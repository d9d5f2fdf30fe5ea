"""The `caprese` command. Its verbs are the entry points of the group `caprese.commands`, from any installed package:

    [project.entry-points."caprese.commands"]
    distill = "caprese_distill.cli:distill"

- The entry point names a function, which becomes the command with -v and -q added (`caprese_kernels.terminal.verb`), or
  a `typer.Typer`, which becomes a group of commands.
- Its line in `caprese --help` is the first paragraph of the docstring of the function, or, for a group, of its module;
  it is read from the source, and nothing is imported for it but the packages that hold the module.
- The module is imported when the verb runs. If a package that the verb imports is missing, the error says to install
  the extra of the verb's name, here [distill], if the distribution has one.
- Results, notes, JSON and exit codes are as in `caprese_kernels.terminal`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Annotated

import typer

from caprese_kernels import __version__, terminal

from .verbs import LazyGroup, Verb

GROUP = "caprese.commands"
DISTRIBUTION = "caprese-vllm"


class Commands(LazyGroup):
    """The verbs of all installed packages."""

    def verbs(self) -> Mapping[str, Verb]:
        """This project's own verbs, then those of others, which cannot replace one of ours."""
        verbs = [(point.name, Verb.of(point)) for point in entry_points(group=GROUP)]
        ours = {name: verb for name, verb in verbs if verb.distribution == DISTRIBUTION}
        if not ours:
            note = f"no verbs, because {DISTRIBUTION} is not installed: run pip install, or make setup in a checkout"
            print(f"caprese: warning: {note}", file=sys.stderr)
        return ours | {name: verb for name, verb in verbs if name not in ours}


app = typer.Typer(
    cls=Commands,
    help="Sparse feed-forward decoding with distilled low-rank recovery, for vLLM.",
    epilog=terminal.EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The console script `caprese`."""
    terminal.run(app, "caprese")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"caprese {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
