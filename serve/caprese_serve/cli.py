"""The `caprese` command. Verbs import what they need when they run, so that help is quick and extras stay optional."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from caprese_kernels import __version__
from caprese_kernels.errors import CapreseError

app = typer.Typer(
    name="caprese",
    help="Sparse feed-forward decoding with distilled low-rank recovery, for vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Console script: a user's mistake is one line on stderr and exit code 1, Ctrl-C one line and 130."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `with` blocks end
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells turn off in a script's background jobs
    try:
        app()
    except CapreseError as error:
        print(f"caprese: {error}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as stopped:
        if stopped.code == 128 + signal.SIGINT:
            print("caprese: interrupted", file=sys.stderr)
        raise


@contextmanager
def _needs(extra: str) -> Iterator[None]:
    """Turns a missing third-party package into the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("caprese_"):
            raise
        raise CapreseError(
            f"package {error.name}",
            expected=f"the extra [{extra}] installed",
            found="no such package",
            fix=f'pip install "caprese-vllm[{extra}]"',
        ) from None


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


@app.command()
def demo(
    math: Annotated[int, typer.Option(min=1, help="Held-out word problems for each variant.")] = 300,
    reading: Annotated[int, typer.Option(min=1, help="Held-out reading questions for each variant.")] = 100,
    variants: Annotated[
        str, typer.Option(help="Comma-separated, of: full, griffin, caprese-griffin, cats, caprese-cats.")
    ] = "full,griffin,caprese-griffin,cats,caprese-cats",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 32,
    output: Annotated[Path, typer.Option(help="Where the results go, with their provenance.")] = Path("out/demo.json"),
) -> None:
    """Compare the full model, GRIFFIN, CATS and Caprese through `vllm serve`, on a tiny reasoning model."""
    with _needs("serve"):
        from .demo.run import run

        run(math=math, reading=reading, variants=variants.split(","), concurrency=concurrency, output=output)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def distill(context: typer.Context) -> None:
    """Make adapters for a model: `caprese distill --help`."""
    with _needs("distill"):
        if find_spec("transformers") is None:  # the verb itself imports it late
            raise ModuleNotFoundError(name="transformers")
        from caprese_distill import cli

        verb = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        verb.command()(cli.distill)
        verb(context.args, prog_name="caprese distill")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Measure speed, accuracy and exactness: `caprese bench --help`."""
    with _needs("bench"):
        from caprese_bench import cli

        cli.app(context.args)(context.args, prog_name="caprese bench")


@app.command()
def inspect(
    file: Annotated[str, typer.Argument(help="Adapter file, directory that holds one, or Hub id.")],
    model: Annotated[str | None, typer.Option(help="Directory or Hub id of a model that it should fit.")] = None,
    as_json: AsJson = False,
) -> None:
    """Validate an adapter as the server does, and show what it holds."""
    from . import inspection

    report = inspection.inspect(file, model)
    print(json.dumps(report, indent=2)) if as_json else Console().print(inspection.render(report))


@app.command()
def collect_env(as_json: AsJson = False) -> None:
    """Show versions, hardware and whether vLLM knows the plugin; goes into bug reports."""
    from . import environment

    found = environment.collect()
    print(json.dumps(found, indent=2)) if as_json else Console().print(environment.render(found))
