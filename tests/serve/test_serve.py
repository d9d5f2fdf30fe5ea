"""`caprese serve`: what it checks, and the command that it becomes."""

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from caprese_serve import serve
from caprese_serve.demo import ADAPTERS, MODEL
from caprese_serve.server import vllm_program
from tests.support.models import make_adapter

Caprese = Callable[..., int]
Captured = pytest.CaptureFixture[str]
GRIFFIN, CATS = ("--caprese-weights", str(ADAPTERS["griffin"])), ("--caprese-weights", str(ADAPTERS["cats"]))


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


def dry_run(caprese: Caprese, capsys: Captured, *words: object) -> tuple[list[str], str]:
    """The printed command after `vllm serve`, and the notes on stderr."""
    assert caprese("serve", *words, "--dry-run") == 0
    out, err = capsys.readouterr()
    command = shlex.split(out)
    assert command[:2] == [vllm_program(), "serve"]
    return command[2:], " ".join(err.split())


def refused(caprese: Caprese, capsys: Captured, *words: object) -> str:
    assert caprese("serve", *words) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("caprese: ")
    assert err.count("\n") == 1
    return err


def test_it_becomes_vllm_serve(caprese: Caprese, monkeypatch: pytest.MonkeyPatch) -> None:
    """With vLLM's own flags as they are: short ones, those that other verbs take for themselves, and values with -."""
    became = []

    def execv(program: str, words: list[str]) -> None:
        became.append((program, words))

    monkeypatch.setattr(os, "execv", execv)
    flags = ["-tp", "2", "-q", "fp8", "-O3", "--api-key=-v", "--port", "8001", "--enable-lora", "--no-enable-lora"]
    assert caprese("serve", MODEL, *GRIFFIN, *flags) == 0
    vllm = vllm_program()
    assert became == [(vllm, [vllm, "serve", str(MODEL), *GRIFFIN, *flags])]


def test_it_says_what_will_be_served(caprese: Caprese, capsys: Captured) -> None:
    words, notes = dry_run(caprese, capsys, MODEL, *GRIFFIN, "--caprese-config.density", "0.25")
    assert words == [str(MODEL), *GRIFFIN, "--caprese-config.density", "0.25"]
    assert "warning: density 0.25 is served with an adapter distilled at 0.5" in notes
    assert f"adapter {GRIFFIN[1]} fits: method griffin, density 0.25, rank 48, layers 0-1" in notes
    _, notes = dry_run(caprese, capsys, MODEL, "--caprese-config", '{"method": "cats"}')
    assert "no adapter, the plain baseline: method cats, density 0.5, rank 0, layers 0-3" in notes


# Ways to say density 0.1 with the CATS adapter; FILE stands for a YAML file of the third entry.
WAYS: list[tuple[str, list[str], str | None]] = [
    ("dotted", [*CATS, "--caprese-config.density", "0.1"], None),
    ("underscores", ["--caprese_weights", CATS[1], "--caprese_config", '{"density": 0.1}'], None),
    ("additional", [f"--additional-config.caprese.weights={CATS[1]}", "--caprese-config.density=0.1"], None),
    ("yaml", ["--config", "FILE"], f"caprese-weights: {CATS[1]}\ncaprese-config:\n  density: 0.1\nport: 8001\n"),
    ("yaml, nested", ["--config", "FILE"], f"additional-config: {{caprese: {{weights: {CATS[1]}, density: 0.1}}}}\n"),
    ("yaml, overruled", ["--config", "FILE", *CATS, "--caprese-config.density", "0.1"], "caprese-weights: absent\n"),
]


@pytest.mark.parametrize(("words", "text"), [way[1:] for way in WAYS], ids=[way[0] for way in WAYS])
def test_flags_are_read_as_vllm_reads_them(tmp_path: Path, words: list[str], text: str | None) -> None:
    """Compared with the parser of `vllm serve` itself."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from caprese_vllm import plugin

    plugin.register()
    (tmp_path / "serve.yaml").write_text(text or "")
    words = [str(tmp_path / "serve.yaml") if word == "FILE" else word for word in words]
    model, settings, elsewhere = serve.read([str(MODEL), *words])
    assert (model, elsewhere) == (str(MODEL), None)
    assert settings == {"weights": CATS[1], "density": 0.1}
    parser = FlexibleArgumentParser()
    make_arg_parser(parser.add_subparsers().add_parser("serve"))
    known = parser.parse_args(["serve", str(MODEL), *words])
    assert known.additional_config["caprese"] == settings
    assert AsyncEngineArgs.from_cli_args(known).additional_config["caprese"] == settings


def test_the_model_can_come_from_the_file(caprese: Caprese, capsys: Captured, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(f"model: {MODEL}\ncaprese-weights: {GRIFFIN[1]}\n")
    words, notes = dry_run(caprese, capsys, "--config", file)
    assert words == ["--config", str(file)]
    assert "fits: method griffin" in notes


def test_what_vllm_would_refuse_or_ignore(
    caprese: Caprese, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "expected --caprese-weights or --caprese-config; found neither" in refused(caprese, capsys, MODEL)
    assert "a model first" in refused(caprese, capsys, *GRIFFIN)
    assert "nothing at" in refused(caprese, capsys, MODEL, "--caprese-weights", tmp_path / "absent.safetensors")
    assert "expected a JSON object" in refused(caprese, capsys, MODEL, "--caprese-config", "griffin")
    assert "densty" in refused(caprese, capsys, MODEL, *GRIFFIN, "--caprese-config.densty", "0.5")
    assert "FileNotFoundError" in refused(caprese, capsys, MODEL, "--config", tmp_path / "absent.yaml")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS: expected caprese in the list" in refused(caprese, capsys, MODEL, *GRIFFIN)


def test_an_adapter_of_another_model(caprese: Caprese, capsys: Captured, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((MODEL / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    line = refused(caprese, capsys, other, *GRIFFIN)
    assert "was made for another model" in line
    assert "found intermediate_size 64" in line


def test_a_model_that_only_vllm_can_read(caprese: Caprese, capsys: Captured, tmp_path: Path) -> None:
    """The adapter is checked all the same."""
    for flags in (("--trust-remote-code",), ("--revision", "main"), ("--hf-overrides", '{"a": 1}')):
        _, notes = dry_run(caprese, capsys, "no/such-model", *GRIFFIN, *flags)
        assert f"with {flags[0]}, only vLLM can check the model" in notes
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(make_adapter(MODEL, tmp_path / "good.safetensors", "griffin").read_bytes()[:-4])
    assert "truncated" in refused(caprese, capsys, "no/such-model", "--caprese-weights", bad, "--trust-remote-code")
