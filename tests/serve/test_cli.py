"""The `caprese` command: verbs, what they print, and how mistakes end."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from caprese_kernels import __version__
from caprese_kernels.adapters import Adapters
from caprese_serve import environment, provenance
from caprese_serve.demo import MODEL
from tests.support.adapters import BASE

ADAPTERS = MODEL.with_name("adapters")
Caprese = Callable[..., int]
Captured = pytest.CaptureFixture[str]


def write_model(directory: Path, **changes: object) -> Path:
    """A model directory of which only the config matters."""
    directory.mkdir()
    config = {"architectures": [BASE["architecture"]], "model_type": "llama", "num_attention_heads": 2}
    (directory / "config.json").write_text(json.dumps(config | BASE | changes))
    return directory


def refused(caprese: Caprese, capsys: Captured, *arguments: object) -> str:
    """The one line on stderr with which a command ends."""
    assert caprese(*arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("caprese: ")
    assert err.count("\n") == 1
    return err


def test_console_script_is_installed() -> None:
    script = Path(sys.executable).with_name("caprese")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"caprese {__version__}\n"


def test_help_names_every_verb(caprese: Caprese, capsys: Captured) -> None:
    assert caprese("--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(verb in shown for verb in ("demo", "distill", "inspect", "collect-env", "bench"))
    assert "Validate an adapter file as the server does" in shown
    assert "Measure speed, accuracy and exactness" in shown
    assert "Exit codes: 0 success; 1 an error" in shown


def test_unknown_verb_is_a_usage_error(caprese: Caprese, capsys: Captured) -> None:
    assert caprese("inspekt") == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "No such command 'inspekt'. Did you mean 'inspect'?" in shown


def test_distill_shows_its_own_options(caprese: Caprese, capsys: Captured) -> None:
    assert caprese("distill", "--help") == 0
    assert "--density" in capsys.readouterr().out


def test_demo_without_its_extra(caprese: Caprese, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("caprese_serve.demo.run", "caprese_serve.demo.client", "caprese_serve.client"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "openai", None)  # importing it then fails
    assert 'pip install "caprese-vllm[demo]"' in refused(caprese, capsys, "demo")


def test_inspect_shows_the_adapter(caprese: Caprese, capsys: Captured, adapter_file: Path) -> None:
    assert caprese("inspect", adapter_file) == 0
    shown = capsys.readouterr().out
    for expected in ("tests/tiny", "griffin, density 0.5, rank 2", "2 of 4: 0-1", "float32", "layer-wise"):
        assert expected in shown


def test_inspect_shows_training_errors_as_a_table(caprese: Caprese, capsys: Captured) -> None:
    assert caprese("inspect", ADAPTERS / "griffin.safetensors") == 0
    shown = capsys.readouterr().out
    assert "{" not in shown
    columns = ["layer", "norm of L R", "error without L R", "with L R", "remaining", "remaining (fitted)"]
    table = shown[shown.index("layer  norm") :].splitlines()
    assert table[0].split("  ")[0] == columns[0]
    assert all(column in table[0] for column in columns)
    assert len(table) == 3
    assert all(re.fullmatch(r"[01]( +[\d.]+)( +[\d.]+%){4}", line.rstrip()) for line in table[1:])


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "registered"),
        ("other,caprese", "registered"),
        ("other", "registered, but kept out by VLLM_PLUGINS='other': vLLM serves dense and ignores"),
        ("", "registered, but kept out by VLLM_PLUGINS='': vLLM serves dense and ignores"),
    ],
)
def test_collect_env_says_what_keeps_the_plugin_out(
    caprese: Caprese, capsys: Captured, monkeypatch: pytest.MonkeyPatch, value: str | None, found: str
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_PLUGINS", value)
    assert caprese("collect-env") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"vLLM plugin {found}" in shown
    assert ("kept out" in shown) == ("kept out" in found)


def test_inspect_json(caprese: Caprese, capsys: Captured, adapter_file: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    assert caprese("inspect", tmp_path, "--model", model, "--json") == 0  # the directory stands for its one adapter
    report = json.loads(capsys.readouterr().out)
    assert report["file"] == str(adapter_file)
    assert report["bytes"] == adapter_file.stat().st_size
    assert report["base_model"] == BASE
    assert (report["method"], report["density"], report["rank"], report["layers"]) == ("griffin", 0.5, 2, [0, 1])
    assert report["dtype"] == "float32"
    assert report["parameters"] == 2 * 2 * (8 * 2)
    assert report["share_of_ff_parameters"] == 64 / (3 * 8 * 20 * 4)
    assert report["norms"] == {"0": pytest.approx(2.0), "1": pytest.approx(2.0)}  # sqrt(2) times a 2 x 2 identity
    assert report["training"] == {"stage": "layer-wise", "samples": 7}
    assert report["fits_model"] == str(model)


def test_inspect_without_transformers(
    caprese: Caprese, capsys: Captured, monkeypatch: pytest.MonkeyPatch, adapter_file: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert caprese("inspect", adapter_file, "--model", write_model(tmp_path / "model"), "--json") == 0


def test_inspect_refuses_another_base_model(
    caprese: Caprese, capsys: Captured, adapter_file: Path, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model", hidden_size=16)
    line = refused(caprese, capsys, "inspect", adapter_file, "--model", model)
    assert "expected hidden_size 8" in line
    assert "found hidden_size 16" in line


def test_inspect_refuses_what_a_server_refuses(
    caprese: Caprese, capsys: Captured, adapters: Adapters, adapter_file: Path, tmp_path: Path
) -> None:
    assert "nothing at" in refused(caprese, capsys, "inspect", tmp_path / "absent.safetensors")
    adapter_file.write_bytes(adapter_file.read_bytes()[:-8])
    assert "truncated" in refused(caprese, capsys, "inspect", adapter_file)
    torch.save(adapters.tensors(), adapter_file)
    assert "pickle" in refused(caprese, capsys, "inspect", adapter_file)
    adapter_file.write_text("")
    refused(caprese, capsys, "inspect", adapter_file, "--json")


def test_inspect_refuses_an_unreadable_model(
    caprese: Caprese, capsys: Captured, adapter_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    bad = write_model(tmp_path / "bad", num_attention_heads=3)
    for model in (tmp_path / "empty", bad):
        assert "config.json" in refused(caprese, capsys, "inspect", adapter_file, "--model", model)


def test_collect_env(caprese: Caprese, capsys: Captured) -> None:
    assert caprese("collect-env", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["caprese"] == __version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["cores"] >= 1
    assert found["memory_gib"] > 0
    assert found["vllm_plugin_registered"] is True
    assert caprese("collect-env") == 0
    assert found["versions"]["torch"] in capsys.readouterr().out


def test_quiet_and_verbose_exclude_each_other(caprese: Caprese, capsys: Captured) -> None:
    assert caprese("collect-env", "-q", "-v") == 2
    assert "not both" in capsys.readouterr().err


def test_verbose_prints_the_traceback_of_an_error(caprese: Caprese, capsys: Captured, tmp_path: Path) -> None:
    assert caprese("inspect", tmp_path / "absent.safetensors", "-v") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("caprese: ")


def test_terminated_while_it_works(tmp_path: Path) -> None:
    """SIGTERM ends a verb as an exception does: `with` blocks clean up."""
    code = (
        "import time, typer\nfrom contextlib import contextmanager\nfrom caprese_kernels import terminal\n"
        "app = typer.Typer()\n"
        "@app.command()\ndef wait() -> None:\n"
        "    try:\n        print('ready', flush=True)\n        time.sleep(60)\n"
        "    finally:\n        print('cleaned up', flush=True)\n"
        "terminal.run(app, 'caprese', [])"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(30) == 143
        assert process.stdout.read() == "cleaned up\n"


def test_shells_complete_verbs_and_options() -> None:
    def complete(*words: str) -> list[str]:
        environment = {"_CAPRESE_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words)}
        environment["COMP_CWORD"] = str(len(words) - 1)
        command = [sys.executable, "-m", "caprese_serve"]
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout.split()

    assert complete("caprese", "ins") == ["inspect"]
    assert complete("caprese", "bench", "comp") == ["compare"]
    assert "--model" in complete("caprese", "inspect", "--m")


def test_interrupt_ends_in_one_line(caprese: Caprese, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, "collect", interrupted)
    assert caprese("collect-env") == 130
    assert capsys.readouterr().err == "caprese: interrupted\n"


def test_provenance_is_json() -> None:
    written = json.loads(json.dumps(provenance.provenance()))
    assert set(written) == {"command", "git_commit", "source", "time", "hardware", "versions"}
