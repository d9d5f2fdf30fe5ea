"""What the verbs of `caprese bench` share: options from a dataclass, JSON on stdout; and which need no extras."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from caprese_bench import all as everything
from caprese_bench.recovery.parameters import parameters
from caprese_bench.results import lists
from caprese_bench.results.compare import compare
from caprese_bench.results.settings import ResumableSettings, options_of
from caprese_bench.results.validate import validate
from caprese_kernels import terminal
from caprese_kernels.errors import CapreseError

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
OPTIONAL = (
    *("vllm", "transformers", "tokenizers", "jinja2", "datasets", "accelerate", "matplotlib", "yaml", "scipy"),
    *("psutil", "openai", "httpx", "lm_eval", "math_verify", "fastapi", "ray"),
)
# Runs `caprese` with the arguments sys.argv[1:], without the optional packages.
WITHOUT_EXTRAS = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))
from caprese_serve.cli import main
main()
"""


@dataclass(frozen=True, kw_only=True)
class Example(ResumableSettings):
    rounds: Annotated[int, typer.Option(min=2, help="Rounds.")] = 5


seen: list[Example] = []


@options_of(Example)
def example(settings: Example) -> None:
    """An example."""
    seen.append(settings)


@pytest.mark.parametrize("wrapped", [lambda verb: verb, terminal.verb], ids=["bare", "with -v and -q"])
def test_a_dataclass_gives_a_verbs_options(wrapped: Callable[..., Any]) -> None:
    app = typer.Typer()
    app.command()(wrapped(example))
    runner = CliRunner()
    done = runner.invoke(app, ["--rounds", "3", "--resume", "--json", "--out", "here"])
    assert done.exit_code == 0, done.output
    assert seen.pop() == Example(rounds=3, resume=True, as_json=True, out=Path("here"))
    assert runner.invoke(app, []).exit_code == 0
    assert seen.pop() == Example()
    assert runner.invoke(app, ["--rounds", "1"]).exit_code == 2
    printed = runner.invoke(app, ["--help"]).output
    assert "An example." in printed
    assert printed.index("--rounds") < printed.index("--out")
    example(rounds=4)
    assert seen.pop().rounds == 4


def test_lists() -> None:
    assert lists.names("--x", "b, a", ("a", "b")) == ["b", "a"]
    with pytest.raises(CapreseError, match="--x: expected some of a, b; found 'c'; correct the list"):
        lists.names("--x", "a,c", ("a", "b"))
    with pytest.raises(CapreseError, match="--x: expected one of a, b; found 'c'"):
        lists.one_name("--x", "c", ("a", "b"))
    assert lists.counts("--x", " 4,1") == [4, 1]
    assert lists.counts("--x", "") == []
    assert lists.numbers("--x", "3,1,1.5,3", 1, 3) == [1, 1.5, 3]


def written(tmp_path: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> Any:
    parameters(quick=True, out=tmp_path, **options)
    captured = capsys.readouterr()
    assert "Written:" in captured.err
    return captured.out


def test_json_on_stdout_is_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = json.loads(written(tmp_path, capsys, as_json=True))
    assert printed == json.loads((tmp_path / "parameters.json").read_text())
    assert "Llama 3.2 1B" in written(tmp_path, capsys)
    path = tmp_path / "parameters.json"
    validate(files=[path], as_json=True)
    assert json.loads(capsys.readouterr().out) == [{"file": str(path), "rows": 6}]
    compare(path, path, as_json=True)
    compared = json.loads(capsys.readouterr().out)
    assert [row["added B/A"] for row in compared["rows"]] == [1.0] * 6
    assert compared["name"] == "parameters"
    validate(schema="parameters")
    assert json.loads(capsys.readouterr().out)["properties"]["rows"]


def without_extras(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`caprese ARGUMENTS` in `folder`, with only the base dependencies."""
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_base_dependencies_are_enough_outside_a_checkout(tmp_path: Path) -> None:
    done = without_extras(tmp_path, "bench", "parameters", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["rows"]) == 6
    assert "without plots" in done.stderr
    path = tmp_path / "out/bench/parameters.json"
    assert "Without plots" in path.with_suffix(".html").read_text()
    committed = next(RESULTS.glob("*/parameters.json"))
    done = without_extras(tmp_path, "bench", "compare", str(committed), str(path), "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == 6
    assert all(row[f"{figure} B/A"] == 1 for row in rows for figure in ("added", "added_of_model", "cut_cats"))
    done = without_extras(tmp_path, "bench", "validate", str(path), *map(str, RESULTS.glob("*/*.json")))
    assert done.returncode == 0, done.stderr
    assert f"{path}: 6 rows, valid" in done.stdout
    done = without_extras(tmp_path, "bench", "parameters", "--model", str(tmp_path))
    assert done.returncode == 1
    assert 'pip install "caprese-vllm[bench]"' in done.stderr


def test_all_reports_each_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(everything, "_run", lambda step, settings: 3)
    with pytest.raises(CapreseError, match="none of parameters, prefix"):
        everything.all_benchmarks(only="prefix,parameters", as_json=True, out=tmp_path)
    printed = json.loads(capsys.readouterr().out)
    assert [(step["verb"], step["status"]) for step in printed["steps"]] == [
        ("parameters", "exit code 3"),
        ("prefix", "exit code 3"),
    ]
    assert Path(printed["report"]) == tmp_path / "report.html"
    monkeypatch.setattr(everything, "_run", lambda step, settings: parameters(quick=True, out=settings.out) or 0)
    everything.all_benchmarks(only="parameters", out=tmp_path)
    assert "valid" in capsys.readouterr().out
    assert "figure 6" in (tmp_path / "report.html").read_text()
    with pytest.raises(CapreseError, match="--only: expected some of parameters, residual"):
        everything.all_benchmarks(only="parameter", out=tmp_path)
