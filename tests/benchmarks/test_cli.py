"""`caprese bench`: its verbs, their help, and how it runs without the `caprese` command."""

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from caprese_bench.cli import VERBS


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_help_and_the_common_options(name: str) -> None:
    verb = VERBS[name]
    function = getattr(import_module(verb.module), verb.attribute)
    assert verb.summary() == " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
    assert verb.summary()
    options = {option for parameter in verb.load(name).params for option in parameter.opts}
    assert {"-v", "-q", "--verbose", "--quiet"} <= options


@pytest.mark.parametrize("command", [["-m", "caprese_bench", "latency"], ["benchmarks/latency.py"]])
def test_it_runs_without_entry_points(command: list[str]) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, *command, "--setups", "x"], capture_output=True, text=True, cwd=root, timeout=300
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("caprese: --setups: expected")
