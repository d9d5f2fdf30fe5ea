"""Settings: from Python, YAML and the command line; what a hostile file can do; the help; the recorded command."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from caprese_distill import DistillConfig, Result, cli, distill
from caprese_distill.command_line import given_options
from caprese_distill.options import Group, flag, negative_flag
from caprese_distill.settings_file import load_config, read_settings
from caprese_kernels.errors import CapreseError
from caprese_kernels.terminal import verb
from tests.support.distill import ModelDir, WriteRows, make_rows, run_command

EXAMPLE = """\
# caprese distill --config distill.yaml
model: Qwen/Qwen2.5-1.5B-Instruct
data: openai/gsm8k:main
output: adapters.safetensors
method: cats
density: 0.5
rank: 128
layers: [0, 1, 2]
samples: 5000
generate: true
temperature: 0.6
engine: {tensor_parallel_size: 4}
learning_rate: 2e-4
gradient_checkpointing: no
dtype: bfloat16
"""
GIVEN = {"model": "m", "data": "d"}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "distill.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_a_yaml_file_has_every_option(write: Any) -> None:
    config = load_config(DistillConfig, {}, write(EXAMPLE))
    assert config == DistillConfig(
        model="Qwen/Qwen2.5-1.5B-Instruct",
        data="openai/gsm8k:main",
        method="cats",
        rank=128,
        layers=[0, 1, 2],
        samples=5000,
        generate=True,
        temperature=0.6,
        engine={"tensor_parallel_size": 4},
        learning_rate=2e-4,
        gradient_checkpointing=False,
        dtype="bfloat16",
    )
    every = {name: getattr(config, name) for name in DistillConfig.options()}
    assert load_config(DistillConfig, {}, write(json.dumps(every, default=str))) == config


def test_flags_override_the_file(write: Any) -> None:
    config = load_config(DistillConfig, {"rank": 8, "gradient_checkpointing": True, "layers": "3,4"}, write(EXAMPLE))
    assert (config.rank, config.gradient_checkpointing, config.layers) == (8, True, [3, 4])
    assert config.samples == 5000
    assert load_config(DistillConfig, GIVEN) == DistillConfig(**GIVEN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak: 8", "distill.yaml, key 'rnak': expected one of model, dtype, .*did you mean 'rank'?"),
        ("rank: many", "distill.yaml, key 'rank': expected a valid integer; found 'many'; correct it"),
        ("rank: 0", "key 'rank': expected greater than or equal to 1; found 0"),
        ("rank: true", "key 'rank': expected a number; found True"),
        ("rank: [8]", r"key 'rank': expected a valid integer; found \[8\]"),
        ("rank:", "key 'rank': expected a valid integer; found None"),
        ("density: .nan", "key 'density': expected a finite number; found nan"),
        ("stage: both", "key 'stage': expected 'layer-wise' or 'end-to-end'; found 'both'"),
        ("layers: half", "key 'layers': expected first-half, all, or indices as 0,1,2; found 'half'"),
        ("layers: [0, x]", r"key 'layers': expected first-half, all, or indices as 0,1,2; found \[0, 'x'\]"),
        ("engine: [1]", r"key 'engine': expected a JSON object; found \[1\]"),
        ("instruction: 2024-01-01", "key 'instruction': expected a valid string; found datetime.date"),
        ("data: 2024-99-99", "settings .*distill.yaml: expected YAML; found"),
        ("temperature: 0.5", "key 'temperature': expected --generate with it; found none; add --generate"),
        ("solver: adam\nnum_workers: 2", "key 'solver': expected closed-form with --num-workers"),
        ("device_map: auto\nnum_workers: 2", "key 'device_map': expected one process, which uses all the GPUs"),
        ("rank: 8\nrank: 9", "expected every key once; found 'rank' 2 times"),
        ("8: rank", "expected a mapping from options to values, as `rank: 256`; found"),
        ("- rank", r"expected a mapping from options to values, as `rank: 256`; found \['rank'\]"),
        ("", "expected a mapping from options to values, as `rank: 256`; found None"),
        ("rank: 8\n  seed: 1", "expected YAML; found mapping values are not allowed here in line 2"),
        ("rank: !!python/object/apply:os.system [exit]", "expected YAML; found could not determine a constructor"),
        ("a: &a [1]\nb: *a", r"expected YAML without aliases; found \*a in line 2"),
        ("a: &a {<<: *a}", "expected YAML without aliases"),
        ("engine: " + "[" * 9 + "]" * 9, "expected values nested at most 8 deep; found more"),
        ("engine: " + "[" * 30_000, "expected values nested at most 8 deep; found more"),
        ("# " + "x" * 70_000, "YAML file of at most 65536 bytes; found more than 65,536 bytes"),
        ("rank: " + "9" * 5000, "expected YAML; found Exceeds the limit"),
        (b"rank: \xff\xfe", "expected YAML; found"),
        (b"rank: \x00", "expected YAML; found"),
        ("rank: 8\n---\nrank: 9", "expected YAML; found but found another document in line 2"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(write: Any, text: str | bytes, message: str) -> None:
    with pytest.raises(CapreseError, match=message) as error:
        load_config(DistillConfig, GIVEN, write(text))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


def test_aliases_of_aliases_do_not_grow(write: Any) -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30))
    with pytest.raises(CapreseError, match="YAML without aliases"):
        read_settings(write(text))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(
        CapreseError, match=r"settings .*none.yaml: expected a readable YAML file of .*; found No such file"
    ):
        load_config(DistillConfig, GIVEN, tmp_path / "none.yaml")
    with pytest.raises(CapreseError, match=r"expected a readable YAML file of .*; found a directory"):
        load_config(DistillConfig, GIVEN, tmp_path)


def test_wrong_flags_are_named_as_flags(write: Any) -> None:
    for flags, message in (
        ({"max_length": 0}, "--max-length: expected greater than or equal to 1; found 0"),
        ({"engine": "[1]", "generate": True}, r"--engine: expected a JSON object; found '\[1\]'"),
        ({"device_map": "balanced"}, "--device-map: expected 'auto'; found 'balanced'"),
        (
            {"weighting": "gradient", "solver": "adam"},
            "--weighting: expected --solver closed-form; found --solver adam",
        ),
    ):
        with pytest.raises(CapreseError, match=f"^{message}"):
            load_config(DistillConfig, GIVEN | flags, write("rank: 8"))
    with pytest.raises(CapreseError, match=r"^MODEL: expected a value: Model directory or Hub id; found none"):
        load_config(DistillConfig, {}, write("data: d"))


def test_a_config_cannot_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        DistillConfig(**GIVEN).rank = 3  # type: ignore[misc]


def test_the_recorded_command_makes_the_same_config(write: Any) -> None:
    config = load_config(DistillConfig, {}, write(EXAMPLE))
    words = config.command()
    assert words[:3] == ["caprese", "distill", "Qwen/Qwen2.5-1.5B-Instruct"]
    assert "--no-gradient-checkpointing" in words
    assert "--layer-wise-batch" not in words  # without --solver adam
    assert parsed(*words[2:]) == config
    adam = DistillConfig(**GIVEN, solver="adam", layer_wise_batch=7, instruction="", tensorboard=Path("logs"))
    assert "--tensorboard" not in adam.command()
    assert parsed(*adam.command()[2:]) == adam.model_copy(update={"tensorboard": None})


def parsed(*words: str) -> DistillConfig:
    """The settings that the command makes of these words."""
    found = []

    def watch(context: typer.Context, config: Path | None, dry_run: bool, as_json: bool, **_: Any) -> None:
        found.append(load_config(DistillConfig, given_options(context, DistillConfig), config))

    watch.__signature__ = cli.distill.__signature__  # type: ignore[attr-defined]
    watch.__annotations__ = cli.distill.__annotations__
    app = typer.Typer()
    app.command()(watch)
    outcome = CliRunner().invoke(app, list(words))
    assert outcome.exit_code == 0, outcome.output
    return found[0]


def test_every_option_is_a_flag_that_overrides_the_file(write: Any) -> None:
    file = str(write(EXAMPLE))
    assert parsed("--config", file) == load_config(DistillConfig, {}, Path(file))
    changed = parsed("other", "--config", file, "--gradient-checkpointing", "--rank", "8", "--layers", "all")
    assert (changed.model, changed.gradient_checkpointing, changed.rank, changed.layers) == ("other", True, 8, "all")
    assert changed.samples == 5000
    off = parsed("--config", str(write("model: m\ndata: d\ngenerate: true")), "--no-generate")
    assert off.generate is False


@pytest.mark.parametrize("words", [[], ["m"], ["--data", "d"], ["m", "--data", "d", "--no-such-option"]])
def test_wrong_usage_is_exit_code_2(words: list[str]) -> None:
    assert run_command(*words)[0] == 2


def test_the_help_has_every_flag_whole_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    code, shown, _ = run_command("--help")
    assert code == 0
    words = set(re.findall(r"--[\w-]+", shown))
    expected = {flag(name) for name in DistillConfig.options() if name != "model"} | {"--config", "--dry-run", "--json"}
    assert expected | {"--no-gradient-checkpointing", "--verbose", "--quiet"} <= words
    assert "--no-generate" not in words
    assert "…" not in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
    panels = re.findall(r"╭─ (\w+) ─", shown)
    assert panels == ["Arguments", "Options", *Group]


def test_the_registered_function_is_plain() -> None:
    """`caprese` registers it with verb(); `typer.Typer().command()(distill)` works, too."""
    for function in (cli.distill, verb(cli.distill)):
        app = typer.Typer()
        app.command("distill")(function)
        outcome = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"})
        assert outcome.exit_code == 0
        assert flag("layer_wise_learning_rate") in outcome.stdout
        assert negative_flag("gradient_checkpointing") in outcome.stdout


def test_settings_and_command_need_no_torch() -> None:
    heavy = ("torch", "transformers", "ray", "vllm", "datasets")
    for modules in ("caprese_distill.config", "caprese_distill.cli"):
        code = f"import sys, {modules}; from caprese_distill import DistillConfig; DistillConfig(model='m', data='d')\n"
        code += f"print([m for m in {heavy} if m in sys.modules])"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_from_python_to_an_adapter(model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path) -> None:
    output = tmp_path / "out" / "a.safetensors"
    config = DistillConfig(
        model=str(model_dir("llama")), data=str(write_rows(make_rows(12))), output=output, rank=4, epochs=1, batch=4
    )
    result = distill(config, Console(quiet=True))
    assert isinstance(result, Result)
    assert (result.adapter, result.card, result.responses) == (output, output.parent / "README.md", None)
    assert sorted(result.errors) == result.adapters.config.layers == [0, 1]
    assert all(0 < errors.error_after < errors.error_before for errors in result.errors.values())
    assert len(result.held_out_errors) == 2
    assert result.resources is not None
    assert result.resources.peak_bytes["host"] > 0
    assert result.adapters.config.training["command"] == shlex.join(config.command())
    stored = load_file(output)
    assert all((stored[name] == tensor).all() for name, tensor in result.adapters.tensors().items())


def test_json_on_stdout(model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path, write: Any) -> None:
    output = tmp_path / "out" / "a.safetensors"
    settings = {"model": str(model_dir("llama")), "data": str(write_rows(make_rows(12))), "rank": 4, "epochs": 1}
    words = ["--config", str(write(json.dumps(settings))), "--output", str(output), "--json"]
    code, shown, remarks = run_command(*words, "--dry-run")
    assert code == 0
    plan = json.loads(shown)
    assert (plan["rank"], plan["layers"], plan["samples"], plan["samples_held_out"]) == (4, [0, 1], 12, 1)
    assert set(plan["seconds"]) == {"priors", "original model", "closed form", "end to end"}
    assert plan["peak_bytes"] > plan["adapter_bytes"] > 0
    assert "12 of 12 rows" in remarks
    assert not output.parent.exists()
    code, shown, remarks = run_command(*words, "-q")
    assert code == 0
    assert remarks == ""
    result = json.loads(shown)
    assert (result["adapter"], result["card"]) == (str(output), str(output.parent / "README.md"))
    assert result["bytes"] == output.stat().st_size
    assert result["config"]["rank"] == 4
    assert set(result["config"]["training"]["errors"]) == {"0", "1"}


def test_a_dry_run_cannot_generate() -> None:
    with pytest.raises(CapreseError, match=r"--dry-run: expected data with responses, .*; found --generate"):
        run_command("m", "--data", "d", "--dry-run", "--generate")
