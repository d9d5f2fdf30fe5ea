"""From settings to adapters on disk: resumption, and a one-line error for every mistake."""

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM
from typer.testing import CliRunner

from caprese_distill import checkpoint, cli, loading
from caprese_distill.blocks import resolve_method
from caprese_distill.data.batches import BATCH_TOKENS
from caprese_distill.layer_wise.closed_form import distill_layer_wise
from caprese_distill.layer_wise.moments import Observer
from caprese_distill.layer_wise.passes import run_pass
from caprese_kernels.adapters import Adapters
from caprese_kernels.errors import CapreseError
from tests.support.distill import ModelDir, WriteRows, make_rows, make_samples, run_distill
from tests.support.models import make_model, make_tokenizer

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("name", "method", "dtype", "layers"),
    [
        ("llama", "griffin", "float32", [0, 1]),
        ("qwen2", "cats", "bfloat16", [0, 1, 2, 3]),
        ("gemma2", "griffin", "float16", [0, 1]),
    ],
)
def test_the_command_writes_adapters(
    model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path, name: str, method: str, dtype: str, layers: list[int]
) -> None:
    app, output, data = typer.Typer(), tmp_path / "new" / "a.safetensors", write_rows(make_rows(22))
    app.command("distill")(cli.distill)
    words = [str(model_dir(name)), "--data", str(data), "--output", str(output), "--method", method]
    words += ["--stage", "layer-wise", "--rank", "8", "--dtype", dtype, "--device", "cpu"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    adapters = Adapters.load(output)
    assert output.stat().st_mode == data.stat().st_mode  # a server under another account may read it
    assert (adapters.config.method, adapters.config.density, adapters.config.rank) == (method, 0.5, 8)
    assert adapters.config.layers == layers
    assert str(adapters.dtype) == f"torch.{dtype}"
    assert adapters.config.base_model.name_or_path == str(model_dir(name))
    training = adapters.config.training
    assert (training["stage"], training["solver"], training["samples"], training["samples_held_out"]) == (
        "layer-wise",
        "closed-form",
        22,
        2,
    )
    assert training["tokens"] > 22 * 20
    assert training["data"]["file"] == "data.jsonl"
    assert len(training["data"]["sha256"]) == 64
    assert training["data"]["instruction"] == "Please reason step by step."
    assert "data.jsonl: 22 of 22 rows, prompts from 'prompt', responses from 'response'" in result.output
    assert training["command"].startswith("caprese distill ")
    assert set(training["versions"]) == {"torch", "transformers", "python"}
    assert list(training["errors"]) == [str(i) for i in layers]
    for errors in training["errors"].values():
        assert 0 < errors["remaining"] < 1
        assert errors["error_after"] == pytest.approx(errors["remaining"] * errors["error_before"])
    assert "remaining" in result.output
    assert sorted(p.name for p in output.parent.iterdir()) == [
        "README.md",
        "a.safetensors",
    ]  # no checkpoint, nothing partial


def test_a_linear_error_is_recovered(model_dir: ModelDir, tmp_path: Path) -> None:
    """A gate that is constant makes the block linear; loud neurons make every prompt keep the same half.

    Then E = x W with W = c W_1 W_2 over the other half, of which rank F/2 leaves nothing.
    """
    model = AutoModelForCausalLM.from_pretrained(make_model("llama-bias", tmp_path / "m", intermediate_size=16))
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.gate_proj.weight.zero_()
        mlp.gate_proj.bias.fill_(1.0)
        mlp.up_proj.bias.zero_()
        mlp.up_proj.weight[:8] *= 20
    info, method = resolve_method(model.config, "m", "griffin", density=0.5, rank=8, layers=[0])
    adapters = distill_layer_wise(model, make_samples(40), info, method)
    errors = adapters.config.training["errors"]["0"]
    assert errors["error_before"] > 1e-4
    assert errors["remaining"] < 1e-4
    c = float(torch.nn.functional.silu(torch.ones(())))
    lost = c * mlp.up_proj.weight[8:].t() @ mlp.down_proj.weight[:, 8:].t()
    found = adapters.left[0] @ adapters.right[0]
    assert (found - lost).norm() < 0.02 * lost.norm()


@pytest.mark.parametrize("method", ["griffin", "cats"])
def test_an_interrupted_run_continues_to_the_same_bits(
    model_dir: ModelDir,
    write_rows: WriteRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    method: str,
) -> None:
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 64)
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0.0)
    data = write_rows(make_rows(12))

    def run(output: Path, density: float = 0.5) -> None:
        run_distill(str(model_dir("llama")), data, output, method=method, rank=8, density=density)

    run(tmp_path / "whole.safetensors")
    expect, calls = Observer.expect, 0

    def interrupted(self: Observer, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        expect(self, *args)

    output = tmp_path / "parts.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Observer, "expect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(output)
    assert not output.exists()
    assert checkpoint.resume_path(output).exists()
    other = checkpoint.resume_path(tmp_path / "other.safetensors")
    other.write_bytes(checkpoint.resume_path(output).read_bytes())
    assert "interrupted; the same command continues from the last checkpoint" in capsys.readouterr().err
    run(output)
    assert "going on after batch" in " ".join(capsys.readouterr().err.split())  # lines break where paths are long
    assert not checkpoint.resume_path(output).exists()
    whole, parts = load_file(tmp_path / "whole.safetensors"), load_file(output)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)

    run(tmp_path / "other.safetensors", density=0.25)  # the checkpoint of another command
    said = " ".join(capsys.readouterr().err.split())
    assert "run with other density; starting anew (kept: " in said
    assert other.with_name(f"{other.name}.kept-1").read_bytes(), "the other command can have it back"
    run(tmp_path / "anew.safetensors", density=0.25)
    other_bits, anew = load_file(tmp_path / "other.safetensors"), load_file(tmp_path / "anew.safetensors")
    assert all(torch.equal(other_bits[key], anew[key]) for key in anew)


def test_moments_resume_to_the_bit_from_any_batch(
    model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 80)
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0.0)
    model, samples = AutoModelForCausalLM.from_pretrained(model_dir("qwen2")), make_samples(12)
    info, method = resolve_method(model.config, "m", "griffin", 0.5, 4)
    whole = run_pass(model, samples, info, method)
    save, resume = checkpoint.save, tmp_path / "r"

    def dying(*args: Any) -> None:
        save(*args)
        raise RuntimeError("killed")

    monkeypatch.setattr(checkpoint, "save", dying)
    deaths = 0
    while True:
        try:
            parts = run_pass(model, samples, info, method, resume)
            break
        except RuntimeError:
            deaths += 1
    assert deaths == whole.batches
    for i in method.layers:
        assert torch.equal(whole.fit[i].xx, parts.fit[i].xx)
        assert torch.equal(whole.held_out[i].xe, parts.held_out[i].xe)
        assert torch.equal(whole.fit[i].rows, parts.fit[i].rows)


def test_a_damaged_checkpoint_is_ignored(
    model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "a.safetensors"
    checkpoint.resume_path(output).write_bytes(b"half a file")
    left = tmp_path / "..a.safetensors.resume.x.partial"
    left.mkdir()
    (left / "new").write_bytes(b"killed while writing")
    run_distill(str(model_dir("llama")), write_rows(make_rows(3)), output, rank=2)
    assert "cannot be read (SafetensorError); starting anew" in " ".join(capsys.readouterr().err.split())
    Adapters.load(output)
    assert not list(tmp_path.glob(".*"))


def test_density_one_gives_zero_adapters(model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path) -> None:
    for method in ("griffin", "cats"):
        run_distill(
            str(model_dir("llama")),
            write_rows(make_rows(3)),
            tmp_path / "a.safetensors",
            method=method,
            density=1.0,
            rank=2,
        )
        found = Adapters.load(tmp_path / "a.safetensors")
        assert not any(t.any() for t in (*found.left.values(), *found.right.values()))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "teal"}, "'griffin' or 'cats'; found 'teal'"),
        ({"density": 0.0}, "density.*greater than 0; found 0.0"),
        ({"density": 1.5}, "density.*less than or equal to 1; found 1.5"),
        ({"density": float("nan")}, "density"),
        ({"density": 0.001}, "at least one of 97 neurons"),
        ({"rank": 0}, "rank: expected greater than or equal to 1; found 0"),
        ({"rank": 65}, "rank: expected 1 to 64, the hidden size; found 65"),
        ({"layers": "first"}, "layers: expected first-half, all, or indices"),
        ({"layers": "0,9"}, "layers: expected one or more different indices from 0 to 3"),
        ({"layers": "1,1"}, "layers: expected one or more different indices"),
        ({"max_length": 5}, r"2 or more usable.*found 0 of 3 \(3 longer than 5 tokens\)"),
        ({"learning_rate": 0.0}, "learning_rate: expected greater than 0; found 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number; found nan"),
        (
            {"solver": "adam", "layer_wise_learning_rate": -1.0},
            "layer_wise_learning_rate: expected greater than 0; found -1.0",
        ),
        ({"tensorboard": Path("/proc/version/logs")}, "--tensorboard: expected a directory; found a file"),
        (
            {"solver": "adam", "weighting": "gradient"},
            "weighting: expected --solver closed-form; found --solver adam",
        ),
        ({"temperature": 0.5}, "temperature: expected --generate with it; found none"),
        ({"engine": "[1]", "generate": True}, r"engine: expected a JSON object; found '\[1\]'"),
        ({"engine": "{", "generate": True}, r"engine: expected a JSON object \(.*\); found '{'"),
        ({"max_length": 5, "generate": True}, r"0 of 3 \(3 prompt too long for a response within 5 tokens\)"),
        ({"response_column": "text"}, "a column 'text'; found the columns prompt, response; correct --response-column"),
        ({"model": "/no/such/model"}, "model: expected a directory or a Hub id"),
        ({"output": Path("/proc/none/a.safetensors")}, "expected a file that can be written"),
        ({"output": Path("/tmp")}, "found a directory"),
        ({"data": Path("/no/such.jsonl")}, "expected a readable file; found No such file"),
    ],
)
def test_mistakes_raise_one_line_errors(
    model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    given = {
        "model": str(model_dir("llama")),
        "data": write_rows(make_rows(3)),
        "output": tmp_path / "a",
        "rank": 4,
    } | options
    with pytest.raises(CapreseError, match=match) as error:
        run_distill(**given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "a").exists()


def test_no_sample_is_longer_than_the_model_has_positions(
    model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path
) -> None:
    data = write_rows([{"prompt": "one", "response": "two " * 600}] * 3)
    with pytest.raises(CapreseError, match=r"2 or more usable.*found 0 of 3 \(3 longer than 512 tokens\)"):
        run_distill(str(model_dir("llama")), str(data), tmp_path / "a", rank=4)


def test_mistakes_leave_nothing_behind(
    model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a directory; and mistakes found before the model's weights are needed do not read them."""
    output, data = tmp_path / "new" / "a.safetensors", write_rows(make_rows(6))
    broken = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
    broken.model.layers[1].mlp.down_proj.weight.data[3, 5] = float("inf")
    broken.save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "empty.jsonl").write_text("\n")
    before = sorted(tmp_path.rglob("*"))

    def refused(match: str, model: Path, data: Path, **options: Any) -> None:
        with pytest.raises(CapreseError, match=match) as error:
            run_distill(str(model), str(data), output, rank=4, **options)
        assert "\n" not in str(error.value)
        assert sorted(tmp_path.rglob("*")) == before

    refused("activations of layer 1: expected finite values; found NaN or Inf", tmp_path / "m", data)
    monkeypatch.setattr(loading, "load_model", None)
    refused("expected two rows or more; found none", model_dir("llama"), tmp_path / "empty.jsonl")
    refused(r"found 0 of 6 \(6 longer than 5 tokens\)", model_dir("llama"), data, max_length=5)
    refused("FF block of layer 0: expected a gated FF block.*found no module mlp of OPT", model_dir("opt"), data)


@pytest.mark.parametrize("stage", ["layer-wise", "end-to-end"])
def test_a_full_disk_raises_and_leaves_nothing_unfinished(
    model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path, stage: str
) -> None:
    """The system refuses to write more than a page to any file, as a full disk would."""
    output = tmp_path / "new" / "a.safetensors"
    words = ["distill", str(model_dir("llama")), "--data", str(write_rows(make_rows(6))), "--output", str(output)]
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
    code += f"sys.argv[1:] = {[*words, '--rank', '32', '--epochs', '1', '--stage', stage]!r}\n"
    code += "from caprese_serve.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("caprese: ")]
    assert "expected a file that can be written; found" in line
    assert "File too large" in line
    assert "Traceback" not in done.stderr
    assert [path.name for path in output.parent.iterdir()] == [".a.safetensors.prior"]  # of a page or less, finished


def test_a_checkpoint_without_room(
    model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    output = tmp_path / "new" / "a.safetensors"
    monkeypatch.setattr(checkpoint, "save_file", full)
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(CapreseError, match=r"expected room for .* beside the output; found .*No space left on device"):
        run_distill(str(model_dir("llama")), str(write_rows(make_rows(6))), output, rank=4)
    assert not output.parent.exists(), "a folder that the run made and left empty is removed"


def test_unloadable_models(model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path) -> None:
    data = write_rows(make_rows(3))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CapreseError, match="that transformers loads; found"):
        run_distill(str(empty), data, tmp_path / "a")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (empty / name).write_bytes((model_dir("llama") / name).read_bytes())
    with pytest.raises(CapreseError, match="that transformers loads; found OSError"):
        run_distill(str(empty), data, tmp_path / "a", rank=4)
    (empty / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CapreseError, match="that transformers loads; found SafetensorError"):
        run_distill(str(empty), data, tmp_path / "a", rank=4)


def test_missing_weights_are_refused(model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
    state = {key: value for key, value in model.state_dict().items() if "layers.1.mlp.up_proj" not in key}
    model.save_pretrained(tmp_path / "m", state_dict=state)
    make_tokenizer().save_pretrained(tmp_path / "m")
    with pytest.raises(CapreseError, match=r"1 weights are missing, first model.layers.1.mlp.up_proj.weight"):
        run_distill(str(tmp_path / "m"), write_rows(make_rows(3)), tmp_path / "a", rank=4)


def test_other_ff_blocks_are_refused_by_name() -> None:
    small = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    mixtral = MixtralForCausalLM(
        MixtralConfig(
            **small,
            intermediate_size=32,
            num_key_value_heads=2,
            num_local_experts=2,
            architectures=["MixtralForCausalLM"],
        )
    )
    info, method = resolve_method(mixtral.config, "m", "griffin", 0.5, 4)
    with pytest.raises(
        CapreseError, match=r"FF block of layer 0: expected a gated FF block.*found MixtralSparseMoeBlock"
    ):
        run_pass(mixtral, make_samples(2), info, method)
    opt = OPTForCausalLM(OPTConfig(**small, ffn_dim=32, word_embed_proj_dim=32, architectures=["OPTForCausalLM"]))
    info, method = resolve_method(opt.config, "m", "griffin", 0.5, 4)
    with pytest.raises(
        CapreseError, match=r"FF block of layer 0: expected a gated FF block.*found no module mlp of OPT"
    ):
        run_pass(opt, make_samples(2), info, method)


@pytest.mark.parametrize("where", ["embedding", "block"])
def test_non_finite_activations_name_sample_and_layer(model_dir: ModelDir, where: str) -> None:
    model, samples = AutoModelForCausalLM.from_pretrained(model_dir("llama")), make_samples(5)
    for sample in samples:
        sample.ids.clamp_(max=298)
    samples[2].ids[-1] = 299
    with torch.no_grad():
        if where == "embedding":
            model.model.embed_tokens.weight[299] = float("nan")
        else:
            model.model.layers[1].mlp.down_proj.weight[3, 5] = float("inf")
    info, method = resolve_method(model.config, "m", "griffin", 0.5, 4)
    line, layer = ("line 3", 0) if where == "embedding" else ("line", 1)
    with pytest.raises(
        CapreseError, match=f"activations of layer {layer}: expected finite values; found NaN or Inf.*{line}"
    ):
        run_pass(model, samples, info, method)


def test_ids_beyond_the_vocabulary_are_refused(model_dir: ModelDir) -> None:
    model, samples = AutoModelForCausalLM.from_pretrained(model_dir("llama")), make_samples(3)
    samples[1].ids[0] = 300
    info, method = resolve_method(model.config, "m", "griffin", 0.5, 4)
    with pytest.raises(CapreseError, match=r"token ids below 300.*found 300 in the sample of line 2"):
        run_pass(model, samples, info, method)


def test_importing_is_light() -> None:
    """`caprese --help` must not wait for torch or transformers."""
    code = "import sys, caprese_distill.cli; print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_whole_package_is_free_of_vllm() -> None:
    code = "import sys, caprese_distill.layer_wise.closed_form, caprese_distill.cli; print('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
