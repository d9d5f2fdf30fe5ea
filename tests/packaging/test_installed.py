"""The wheel's `caprese` in an empty folder: nothing of the checkout is needed."""

import json
import shutil
from pathlib import Path

import pytest

from caprese_kernels import __version__
from caprese_serve.demo import ADAPTERS, MODEL
from tests.support.packaging import ROOT, Caprese

# Everything that the extras install beside the dependencies, as modules.
EXTRAS = (
    "vllm", "transformers", "datasets", "tensorboard", "psutil", "accelerate", "ray", "openai", "httpx", "tokenizers",
    "matplotlib", "yaml", "scipy", "lm_eval", "math_verify",
)  # fmt: skip
RESULT = ROOT / "benchmarks/results/amd-epyc/parameters.json"


def test_the_wheel_is_what_runs(caprese: Caprese, site: Path) -> None:
    done = caprese("bench", "compare", "absent.json", "absent.json", "-v")
    assert done.returncode == 1
    files = [line.split('"')[1] for line in done.stderr.splitlines() if line.startswith("  File")]
    ours = [file for file in files if "caprese" in file]
    assert ours
    assert all(Path(file).is_relative_to(site) for file in ours)


def test_help_with_the_dependencies_alone(caprese: Caprese) -> None:
    done = caprese("--help", without=EXTRAS)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(verb in done.stdout for verb in ("demo", "distill", "inspect", "collect-env", "bench"))
    assert caprese("--version", without=EXTRAS).stdout == f"caprese {__version__}\n"
    benchmarks = caprese("bench", "--help", without=EXTRAS)
    assert (benchmarks.returncode, benchmarks.stderr) == (0, "")
    assert "latency" in benchmarks.stdout
    assert caprese("demo", "--help", without=EXTRAS).returncode == 0
    assert "--density" in caprese("distill", "--help", without=EXTRAS).stdout


def test_verbs_that_need_the_dependencies_alone(caprese: Caprese, tmp_path: Path) -> None:
    report = json.loads(caprese("inspect", str(ADAPTERS["griffin"]), "--json", without=EXTRAS).stdout)
    assert report["method"] == "griffin"
    found = json.loads(caprese("collect-env", "--json", without=EXTRAS).stdout)
    assert found["versions"]["caprese"] == __version__
    done = caprese("bench", "validate", str(RESULT), without=EXTRAS)
    assert (done.returncode, done.stderr) == (0, "")
    other = shutil.copy(RESULT, tmp_path / "other.json")
    done = caprese("bench", "compare", str(RESULT), str(other), without=EXTRAS)
    assert done.returncode == 0, done.stderr


def test_bench_parameters_with_the_dependencies_alone(caprese: Caprese, tmp_path: Path) -> None:
    done = caprese("bench", "parameters", "--quick", "--out", str(tmp_path / "out"), "--json", without=EXTRAS)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == json.loads((tmp_path / "out/parameters.json").read_text())["rows"]


def test_bench_parameters(caprese: Caprese, tmp_path: Path) -> None:
    done = caprese("bench", "parameters", "--quick", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/parameters.json").read_text())["rows"]
    assert "<svg" in (tmp_path / "out/parameters.html").read_text()


def test_distill_shows_its_plan_from_a_file(caprese: Caprese, tmp_path: Path) -> None:
    write_rows(tmp_path / "empty/rows.jsonl")
    settings = f"model: {MODEL}\ndata: rows.jsonl\nrank: 4\nstage: layer-wise\n"
    (tmp_path / "empty/distill.yaml").write_text(settings)
    done = caprese("distill", "--config", "distill.yaml", "--dry-run", "--json", timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rank"] == 4
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {"rows.jsonl", "distill.yaml"}


def write_rows(path: Path) -> None:
    """Twenty samples for `caprese distill --data`."""
    rows = [json.dumps({"prompt": f"{i}?", "response": f"{i}!"}) for i in range(20)]
    path.write_text("\n".join(rows))


@pytest.mark.parametrize(
    ("command", "extra"),
    [("demo", "demo"), ("bench residual", "bench"), (f"distill {MODEL} --data rows.jsonl", "distill")],
)
def test_a_missing_extra_is_named(caprese: Caprese, tmp_path: Path, command: str, extra: str) -> None:
    write_rows(tmp_path / "empty/rows.jsonl")
    done = caprese(*command.split(), without=EXTRAS)
    assert done.returncode == 1
    assert done.stderr.startswith("caprese: package ")
    assert done.stderr.endswith(f'pip install "caprese-vllm[{extra}]"\n')
    assert done.stderr.count("\n") == 1


def test_demo(caprese: Caprese, tmp_path: Path) -> None:
    """One variant through vLLM: the wheel has all files of the demo."""
    output = tmp_path / "demo.json"
    words = ["--math", "4", "--reading", "2", "--variants", "full", "--output", str(output), "--json"]
    done = caprese("demo", *words, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(output.read_text())
    assert [row["variant"] for row in json.loads(done.stdout)["rows"]] == ["Full"]
