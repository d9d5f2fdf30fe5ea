"""What all verbs of the `caprese` command share: how much they print, JSON output, and exit codes.

A verb prints its result to stdout (a table, or JSON with `--json`) and everything else (the plan, progress, warnings)
to stderr through `notes()`, so that `caprese VERB --json > result.json` always writes clean JSON. Both show text as it
is: no markup, no escape sequence of a file, path or server reaches the terminal.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import Annotated, Any, NoReturn, get_type_hints

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from .errors import CapreseError, printable, quote

PIPE_WIDTH = 150  # columns of a table that is not printed to a terminal
WRONG_USAGE = 2
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
EXIT_CODES = (
    "Exit codes: 0 success; 1 an error, printed as one line on stderr (with -v after its traceback); 2 wrong usage, "
    f"such as an unknown option; {INTERRUPTED} interrupted (Ctrl-C); {TERMINATED} terminated (SIGTERM)."
)


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Verbosity(IntEnum):
    QUIET = -1
    NORMAL = 0
    VERBOSE = 1


_LOG_LEVELS = {
    Verbosity.QUIET: logging.ERROR,
    Verbosity.NORMAL: logging.WARNING,
    Verbosity.VERBOSE: logging.DEBUG,
}
_verbosity = Verbosity.NORMAL

AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print the result as JSON; everything else goes to stderr.", rich_help_panel="Output"),
]


class PlainConsole(Console):
    """A console that takes no text for markup or emoji codes, and escapes what a terminal would obey.

    Styles come from `rich.text.Text`, or from `style=`.
    """

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, lines=True), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, lines=True))


def verbosity() -> Verbosity:
    """What -q or -v of the running command chose."""
    return _verbosity


def set_verbosity(chosen: Verbosity) -> None:
    """Apply -q or -v to `notes()` and to the log messages of this project's packages."""
    global _verbosity
    _verbosity = chosen
    logging.getLogger("vllm.caprese").setLevel(_LOG_LEVELS[chosen])


def notes() -> PlainConsole:
    """The console for plans, progress and remarks: stderr; prints nothing with -q."""
    return PlainConsole(stderr=True, quiet=_verbosity == Verbosity.QUIET)


def result() -> PlainConsole:
    """The console for a verb's result: stdout, wide enough for tables where it is not a terminal."""
    console = PlainConsole()
    if not console.is_terminal:
        console.width = max(console.width, PIPE_WIDTH)
    return console


def print_json(value: Any) -> None:
    """Print a result as indented JSON on stdout."""
    print(json.dumps(value, indent=2))


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """`function` as a command with -v and -q besides its own options: `app.command("inspect")(verb(inspect))`."""

    @functools.wraps(function)
    def run_verb(*args: Any, verbose: bool, quiet: bool, **options: Any) -> None:
        if verbose and quiet:
            raise typer.BadParameter("give either --verbose or --quiet, not both")
        set_verbosity(Verbosity.QUIET if quiet else Verbosity.VERBOSE if verbose else Verbosity.NORMAL)
        function(*args, **options)

    flags = {
        "verbose": _flag("--verbose", "-v", help="Print more, and the traceback of an error."),
        "quiet": _flag("--quiet", "-q", help="Print the result and errors only."),
    }
    # typer reads the signature; annotations that `from __future__ import annotations` left as strings are resolved
    # here, against the function's own module.
    types = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    own = [p.replace(annotation=types.get(p.name, p.annotation)) for p in parameters]
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter(name, keyword, default=False, annotation=flag) for name, flag in flags.items()]
    run_verb.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    run_verb.__annotations__ = {**types, **flags}
    return run_verb


def _flag(*names: str, help: str) -> Any:
    return Annotated[bool, typer.Option(*names, help=help, rich_help_panel="Output")]


def run(app: typer.Typer, prog_name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line (default: this process's arguments) and exit with one of `EXIT_CODES`.

    A `CapreseError` is one line on stderr, with -v after its traceback; other exceptions are bugs and pass through.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # an exception, so that `with` blocks clean up
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in a script's background jobs
    arguments = sys.argv[1:] if arguments is None else arguments
    for number, argument in enumerate(arguments, start=1):
        if _CONTROL.search(argument):  # typer would repeat it as it is
            fix = "rename the file, or correct the option"
            error = CapreseError(
                f"argument {number}", expected="text without control characters", found=quote(argument), fix=fix
            )
            print(f"caprese: {error}", file=sys.stderr)
            sys.exit(WRONG_USAGE)
    try:
        app(arguments, prog_name=prog_name)
    except CapreseError as error:
        if _verbosity == Verbosity.VERBOSE:
            traceback.print_exception(error)
        print(f"caprese: {error}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as stopped:
        if stopped.code == INTERRUPTED:
            print("caprese: interrupted", file=sys.stderr)
        raise
    sys.exit(0)
