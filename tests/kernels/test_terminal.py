"""The conventions all verbs share: -v, -q, --json."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from typer.testing import CliRunner

from caprese_kernels import terminal


def greet(
    name: Annotated[str, typer.Argument(help="Whom to greet.")],
    times: Annotated[int, typer.Option(help="How often.", min=1)] = 1,
    as_json: terminal.AsJson = False,
) -> None:
    """Greet somebody."""
    terminal.notes().print("greeting")
    if as_json:
        terminal.print_json({"greetings": [name] * times})
    else:
        terminal.result().print(" ".join([name] * times))


def run(*arguments: str) -> tuple[int, str, str]:
    app = typer.Typer()
    app.command()(terminal.verb(greet))
    outcome = CliRunner().invoke(app, list(arguments))
    return outcome.exit_code, outcome.stdout, outcome.stderr


def test_a_verb_keeps_its_own_options() -> None:
    code, stdout, _ = run("--help")
    assert code == 0
    assert "--json" in stdout
    assert "--as-json" not in stdout
    assert "Greet somebody." in stdout
    assert "How often." in stdout
    assert run("you", "--times", "0")[0] == 2


def test_the_result_alone_goes_to_stdout() -> None:
    code, stdout, stderr = run("you", "--times", "2", "--json")
    assert (code, json.loads(stdout), stderr) == (0, {"greetings": ["you", "you"]}, "greeting\n")


def test_quiet_prints_the_result_only() -> None:
    assert run("you", "-q") == (0, "you\n", "")


def test_verbose_is_seen_by_the_verb() -> None:
    assert run("you", "-v")[0] == 0
    assert terminal.verbosity() == terminal.Verbosity.VERBOSE
