"""Models whose attention is quantized and whose FF blocks are not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from caprese_kernels.errors import CapreseError
from tests.support.engine import engine, generate, greedy
from tests.support.equality import Case, check, differing, new_case
from tests.support.hf_reference import HFReference
from tests.support.models import random_prompts

ModelDir = Callable[[str], Path]
NEW_TOKENS = 12
# On CPUs vLLM multiplies int8 matrices with oneDNN. Without VNNI, it adds two products of a byte in 0..255 and a weight
# in 16 bits, saturating: with weights up to 127, sums of up to 169,721 were off by up to 47,140 on an AVX2 machine.
# 2 x 255 x 63 fits, and the result was exact there: tests with these weights hold on every machine.
LARGEST_WEIGHT = 63


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of integers, as int8, and the scale of each."""
    scale = weight.abs().amax(dim=1, keepdim=True) / LARGEST_WEIGHT
    return (weight / scale).round().to(torch.int8), scale


def int8_model(model_dir: Path, directory: Path, ignore: list[str]) -> Path:
    """Write the model as compressed-tensors has it, W8A8: rows of weights, and of activations as they come, in int8."""
    shutil.copytree(model_dir, directory)
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(model_dir / "model.safetensors").items():
        tensors[name] = weight
        if name.endswith("_proj.weight") and not any(part in name for part in ignore):
            tensors[name], tensors[f"{name}_scale"] = quantize(weight)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    activations = {**weights, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *(f"re:.*{part}.*" for part in ignore)],
        "config_groups": {"group_0": group},
    }
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": quantization}))
    return directory


def int8_linear(linear: nn.Linear) -> Any:
    weight, scale = quantize(linear.weight.detach())

    def forward(x: Tensor) -> Tensor:
        step = x.abs().amax(dim=-1, keepdim=True) / 127
        return ((x / step).round().double() @ weight.double().t()).float() * step * scale.t()

    return forward


# check_cpu_sgl_kernel in vllm/model_executor/layers/utils.py chooses that kernel, whatever the model's dtype.
takes_float32 = pytest.mark.skipif(
    torch.cpu._is_amx_tile_supported(),
    reason="with AMX, vLLM's int8 layers refuse float32, in which this test compares",
)


@takes_float32
@pytest.mark.parametrize("method", ["griffin", "cats"])
def test_quantized_attention(model_dir: ModelDir, tmp_path: Path, method: str) -> None:
    case = new_case(model_dir, tmp_path, "llama", method, True)
    case.model = HFReference(case.model_dir)  # which the loop below changes
    for layer in case.model.model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = getattr(layer.self_attn, name)
            linear.forward = int8_linear(linear)
    # A value between two integers, to within float32's rounding, may become either, which moves logits by some 1e-2.
    clear = [
        p for p in random_prompts((1, 7, 9, 20, 21, 33, 34), seed=51) if min(case.one(p, NEW_TOKENS).margins) > 2e-2
    ]
    prompts = clear[:4]
    assert len(prompts) == 4
    expected = case.expected(prompts, NEW_TOKENS)
    assert differing(expected, Case(case.model_dir, method, case.adapter).expected(prompts, NEW_TOKENS))
    assert differing(expected, case.expected(prompts, NEW_TOKENS, method=None)) == len(prompts)
    quantized = int8_model(case.model_dir, tmp_path / "int8", ignore=["mlp"])
    with engine(quantized, case.caprese) as llm:
        model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
        assert type(model.model.layers[0].self_attn.o_proj.quant_method) is not UnquantizedLinearMethod
        check(generate(llm, prompts, greedy(NEW_TOKENS)), expected, f"attention in int8, {method}")


def test_a_quantized_block_is_named(model_dir: ModelDir, tmp_path: Path) -> None:
    """One FF block of several is quantized: refused when the model is built, if it should run sparse."""
    rest = [f"layers.{i}.mlp" for i in (0, 2, 3)]
    quantized = int8_model(model_dir("llama"), tmp_path / "int8", ignore=rest)
    with (
        pytest.raises(CapreseError, match=r"FF block of layer 1: .*CompressedTensorsLinearMethod"),
        engine(quantized, {"method": "griffin"}),
    ):
        pass
    with engine(quantized, {"method": "griffin", "layers": [0, 2]}) as llm:
        assert llm.collective_rpc("caprese_report")[0]["layers"] == [0, 2]
