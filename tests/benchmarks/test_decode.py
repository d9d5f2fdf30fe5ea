"""The decode step: equal to transformers', its bytes, its variants compared with the reference, and what it imports."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from caprese_bench.engine import decode
from caprese_bench.engine import models as engine_models
from caprese_bench.engine.decode_ff import DecodeBlocks
from caprese_bench.engine.decode_model import DecodeDimensions, DecodeModel
from caprese_bench.engine.models import ARCHS, write_arch
from caprese_bench.kernels.floor import Weights, step_bytes
from caprese_bench.paper import families
from caprese_bench.results import schemas
from caprese_kernels import cpu, reference
from caprese_kernels.errors import CapreseError

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHS, "tiny", TINY)


def test_archs_are_the_published_shapes() -> None:
    """As in paper/families.py, which is checked against the Hub's own counts."""
    names = {"qwen": "Qwen2.5 ", "llama": "Llama 3.1 ", "gemma": "Gemma 2 "}
    published = {name: of for family in families.FAMILIES.values() for name, of in family.models.items()}
    for arch, config in ARCHS.items():
        if arch == "tiny":
            continue
        size = arch.rpartition("-")[2].upper()
        wanted = asdict(published[names[arch.partition("-")[0].rstrip("2.5")] + size])
        wanted["head_dim"] = config.get("head_dim", wanted["head_dim"])
        assert {key: config.get(key, wanted["head_dim"]) for key in wanted} == wanted


@pytest.mark.parametrize("arch", ["qwen2.5-0.5b", "qwen2.5-14b", "llama-3.1-8b", "tiny"])
def test_the_floor_is_that_of_the_whole_model(arch: str, tmp_path: Path) -> None:
    whole = Weights.of(AutoConfig.from_pretrained(write_arch(arch, tmp_path)))
    ours = DecodeDimensions.of(arch).weights()
    assert step_bytes(ours, context=7) == step_bytes(whole, context=7)
    assert (ours.ff, ours.gate, ours.kv) == (whole.ff, whole.gate, whole.kv)


def test_other_layers_are_refused() -> None:
    with pytest.raises(CapreseError, match="a Qwen 2 or Llama shape"):
        DecodeDimensions.of("gemma-2-9b")


@pytest.mark.parametrize("biased", [True, False])
@torch.inference_mode()
def test_the_step_is_transformers(monkeypatch: pytest.MonkeyPatch, biased: bool) -> None:
    if not biased:
        monkeypatch.setitem(ARCHS, "tiny", TINY | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    context, batch = 9, 3
    ours = DecodeModel(DecodeDimensions.of("tiny"), 8, context, batch, "cpu", torch.float32)
    settings = dict(ARCHS["tiny"])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.rope_parameters = {"rope_type": "default", "rope_theta": TINY["rope_theta"]}
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    sizes = ours.sizes
    parts = [n * sizes.head_size for n in (sizes.heads, sizes.kv_heads, sizes.kv_heads)]
    cache = DynamicCache(config=config)
    for i, layer in enumerate(theirs.model.layers):
        for projection, weight in zip("qkv", ours.qkv[i].split(parts), strict=True):
            getattr(layer.self_attn, f"{projection}_proj").weight.copy_(weight)
        bias = ours.qkv_bias[i]
        if bias is not None:
            for projection, part in zip("qkv", bias.split(parts), strict=True):
                getattr(layer.self_attn, f"{projection}_proj").bias.copy_(part)
        layer.self_attn.o_proj.weight.copy_(ours.out[i])
        block, f = ours.blocks[i], sizes.neurons
        layer.mlp.gate_proj.weight.copy_(block.gate_up_plus[:f])
        layer.mlp.up_proj.weight.copy_(block.gate_up_plus[f : 2 * f])
        layer.mlp.down_proj.weight.copy_(block.down_plus[:f].t())
        cache.update(ours.keys[i][:, :, :-1].clone(), ours.values[i][:, :, :-1].clone(), i)
    theirs.lm_head.weight.copy_(ours.head)
    seen: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    for layer in theirs.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: states.append(args[0][:, 0]))
    positions = torch.full((batch, 1), context - 1)
    output = theirs(inputs_embeds=ours.x[:, None], past_key_values=cache, position_ids=positions)
    tokens = ours.step(lambda layer, x: reference.dense_ff(x, ours.plain(layer)), seen)
    for mine, expected in zip(seen, states, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)  # float32 sums of other orders, four layers
    assert torch.equal(tokens, output.logits[:, -1].argmax(dim=1))


def test_every_variant_on_a_tiny_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = ",".join(decode.VARIANTS)
    decode.decode(arch="tiny", context=16, batch="1,3", rank=8, repeats=3, variants=every, out=tmp_path)
    assert schemas.check(tmp_path / "decode.json") == 2 * len(decode.VARIANTS)
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    sizes = DecodeDimensions.of("tiny").weights()
    for row in rows:
        full = next(r for r in rows if (r["batch"], r["variant"]) == (row["batch"], "Full"))
        assert row["ratio"] == pytest.approx(row["time_ms"] / full["time_ms"])
        assert row["predicted_ratio"] == pytest.approx(row["mb_a_step"] / full["mb_a_step"])
        assert (row["samples"], row["error"] < 9e-3) == (3, True)
    of = {(row["batch"], row["variant"]): row["mb_a_step"] * 1e6 for row in rows}
    assert of[1, "Full"] == step_bytes(sizes, context=16)
    assert of[1, "GRIFFIN"] == pytest.approx(of[1, "Full"] - 2 * 2 * 0.5 * sizes.ff)
    assert of[1, "Caprese (GRIFFIN)"] == pytest.approx(of[1, "GRIFFIN"] + 2 * 2 * 2 * 64 * 8)
    assert of[1, "CATS"] == pytest.approx(of[1, "Full"] - 4 * 2 * 0.5 * (sizes.ff - sizes.gate), rel=0.01)
    # Three requests of their own selections need more of the same layers.
    assert of[3, "Full"] - of[3, "GRIFFIN"] < 0.4 * (of[1, "Full"] - of[1, "GRIFFIN"])
    assert "caprese" not in capsys.readouterr().err
    # A core is the same for all requests, and a tail of a fifth is their own.
    assert of[1, "Core"] == of[1, "Core and tail"] == of[1, "GRIFFIN"]
    assert of[1, "Caprese (core, all layers)"] == of[1, "Caprese (GRIFFIN, all layers)"]
    assert of[3, "Full"] - of[3, "Core"] == pytest.approx(of[1, "Full"] - of[1, "Core"])
    assert of[3, "Core"] < of[3, "Core and tail"] < of[3, "GRIFFIN"]
    decode.decode(arch="tiny", context=16, batch="1,3", rank=8, repeats=3, variants=every, out=tmp_path, resume=True)
    again = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert again == rows


@pytest.mark.parametrize("name", ["griffin", "caprese", "cats", "lora", "core", "core-tail", "caprese-core"])
def test_a_wrong_variant_is_refused(name: str) -> None:
    def wrong_core(*arguments: Any) -> Any:
        return cpu.core_ff(*arguments) * 1.1

    def wrong(*arguments: Any, **more: Any) -> Any:
        y = getattr(cpu, "cats_ff" if name == "cats" else "griffin_ff")(*arguments, **more)
        return (y[0] * 1.1, y[1]) if name == "cats" else y * 1.1

    with torch.inference_mode():
        model = DecodeModel(DecodeDimensions.of("tiny"), 8, 16, 2, "cpu", torch.bfloat16)
        backend: Any = SimpleNamespace(
            NAME="cpu", griffin_ff=wrong, cats_ff=wrong, core_ff=wrong_core, plan_layers=cpu.plan_layers
        )
        blocks = DecodeBlocks(model, backend, 0.5, lambda layer, x: reference.dense_ff(x, model.plain(layer)))
        variant = decode.VARIANTS[name]
        ff = blocks.feed_forward(variant)
        if name == "lora":
            first = blocks.lora[0]
            first.b_down.mul_(1.5)
            real = first.forward(cpu, blocks.inputs[0], blocks.keep[0], blocks.slots)
            first.b_down.div_(1.5)
            ff = lambda layer, x: real if layer == 0 else x  # noqa: E731
        with pytest.raises(CapreseError, match=r"an output within 0\.009 of the reference"):
            blocks.check(variant, ff)


def test_torch_is_enough(tmp_path: Path) -> None:
    """As on a machine with torch and triton alone: no vLLM, pydantic or transformers."""
    code = f"""
import sys
from dataclasses import asdict
from pathlib import Path
for name in ("vllm", "pydantic", "transformers", "openai", "httpx", "datasets"):
    sys.modules[name] = None
from caprese_bench.engine import decode, models
from caprese_bench.kernels import bench
models.ARCHS["tiny"] = {TINY!r}
decode.decode(arch="tiny", context=16, batch="1", rank=8, repeats=3, out=Path({str(tmp_path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "decode.html").exists()


def test_users_mistakes() -> None:
    assert engine_models.ARCHS
    for arguments, message in (
        ({"arch": "gpt-5"}, "--arch: expected one of qwen2.5-0.5b"),
        ({"arch": "tiny", "variants": "full,dense"}, "--variants: expected some of full"),
        ({"arch": "tiny", "variants": "griffin"}, "full among them"),
        ({"arch": "tiny", "batch": "0"}, "--batch: expected"),
    ):
        with pytest.raises(CapreseError, match=message):
            decode.decode(**arguments)
