"""Verbs of other packages: found by their entry points, and unable to disturb ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from caprese_serve.cli import DISTRIBUTION, GROUP, Commands
from caprese_serve.verbs import Verb

Caprese = Callable[..., int]
Captured = pytest.CaptureFixture[str]

FRUIT = '''
"""Everything about fruit.

More, which the list of verbs does not show.
"""
import typer
import caprese_kernels.terminal

app = typer.Typer()

@app.command()
def ripe(): print("ripe")

@app.command()
def raw(): print("raw")

def peel(name: str, as_json: caprese_kernels.terminal.AsJson = False) -> None:
    """Peel a
    fruit."""
    caprese_kernels.terminal.notes().print("peeling")
    caprese_kernels.terminal.print_json([name]) if as_json else print(name)

def juice() -> None:
    """Press."""
    import juicer_absent
'''
ENTRY_POINTS = f"""
[{GROUP}]
fruit = fruit_verbs:app
peel = fruit_verbs:peel
juice = fruit_verbs:juice
inspect = fruit_verbs:peel
lost = fruit_verbs_absent:lost
broken = fruit_verbs_broken:broken
fails = fruit_verbs_fails:fails
"""


@pytest.fixture
def fruit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another distribution with verbs, of which some cannot be loaded."""
    site = tmp_path / "site"
    metadata = site / "fruit-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fruit\nVersion: 1.0\nProvides-Extra: juice\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    (site / "fruit_verbs.py").write_text(FRUIT)
    (site / "fruit_verbs_broken.py").write_text("def broken(:")
    (site / "fruit_verbs_fails.py").write_text("1 / 0\ndef fails() -> None:\n    'Fail.'")
    monkeypatch.syspath_prepend(site)


@pytest.mark.usefixtures("fruit")
def test_help_lists_them_and_warns_of_broken_ones(caprese: Caprese, capsys: Captured) -> None:
    assert caprese("--help") == 0
    out, err = capsys.readouterr()
    shown = " ".join(out.replace("│", "").split())
    for line in ("fruit Everything about fruit.", "peel Peel a fruit.", "juice Press.", "fails Fail.", "distill Make"):
        assert line in shown
    assert "More, which" not in shown
    assert sorted(err.splitlines()) == [
        "caprese: warning: no verb broken of fruit: SyntaxError: invalid syntax (<unknown>, line 1)",
        "caprese: warning: no verb lost of fruit: ModuleNotFoundError: no module fruit_verbs_absent",
    ]


@pytest.mark.usefixtures("fruit")
def test_a_function_becomes_a_verb_with_the_common_options(caprese: Caprese, capsys: Captured) -> None:
    assert caprese("peel", "plum", "--json") == 0
    assert capsys.readouterr() == ('[\n  "plum"\n]\n', "peeling\n")
    assert caprese("peel", "plum", "-q") == 0
    assert capsys.readouterr() == ("plum\n", "")


@pytest.mark.usefixtures("fruit")
def test_a_typer_becomes_a_group(caprese: Caprese, capsys: Captured) -> None:
    assert caprese("fruit", "raw") == 0
    assert capsys.readouterr().out == "raw\n"
    assert caprese("fruit", "boiled") == 2


@pytest.mark.usefixtures("fruit")
@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("juice", 'package juicer_absent: expected the extra [juice] of fruit installed; found no such package; pip '
                  'install "fruit[juice]"'),
        ("fails", "caprese fails: expected fruit_verbs_fails:fails, a command of fruit; found ZeroDivisionError: "
                  "division by zero; reinstall fruit, or report this to its authors"),
    ],
)  # fmt: skip
def test_one_that_cannot_run_is_one_line(caprese: Caprese, capsys: Captured, verb: str, message: str) -> None:
    assert caprese(verb) == 1
    assert capsys.readouterr().err == f"caprese: {message}\n"


@pytest.mark.usefixtures("fruit")
def test_none_replaces_ours() -> None:
    verb = Commands().verbs()["inspect"]
    assert (verb.distribution, verb.module) == (DISTRIBUTION, "caprese_serve.commands")


def test_a_missing_module_of_ours_is_a_bug_and_no_missing_extra() -> None:
    verb = Verb("caprese_bench.results.compare", "compare", DISTRIBUTION, "bench")
    assert verb.missing_extra(ModuleNotFoundError(name="caprese_bench.absent")) is None
    assert "[bench]" in str(verb.missing_extra(ModuleNotFoundError(name="scipy.stats")))


def test_without_any_installed_package(caprese: Caprese, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caprese_serve.cli.entry_points", lambda group: [])
    assert caprese("--help") == 0
    assert "caprese-vllm is not installed" in capsys.readouterr().err
