"""Every text model of vLLM's registry is in the table of architectures, or left out for a reason.

Those of the table, built by vLLM itself, have FF blocks that are exactly what the plugin takes them for.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import activation
from vllm.model_executor.model_loader.base_loader import initialize_model
from vllm.model_executor.models import registry
from vllm.utils.torch_utils import set_default_torch_dtype

from caprese_kernels import reference
from caprese_kernels.config import UNGATED_ARCHITECTURES, BaseModelInfo
from caprese_vllm.architectures import ARCHITECTURES, Names, _is_chain, activation_of_module, find_block
from caprese_vllm.blocks import _repack
from caprese_vllm.ranks import Ranks
from tests.support import equality, models
from tests.support.engine import transformers_kept

# Text models that do not name experts in vLLM's source, and are not supported.
LEFT_OUT = {
    "no gate, and an activation that the kernels lack": ["Apertus", "Arcee", "Jais2", "Nemotron"],
    "no gate, and biases that are added outside the block, or none in tensor-parallel layers": ["Falcon", "GPTBigCode"],
    "no intermediate size in its config": ["Bloom"],
    "recurrent layers": ["FalconMamba", "FalconH1", "Lfm2", "Mamba", "Mamba2", "OlmoHybrid", "Zamba2"],
    "layers that differ in size": ["DeciLM", "Gemma3n"],
    "a block runs several times for one token": ["HrmText", "IQuestLoopCoder"],
    "vLLM's attention on a CPU does not run it": ["Rnj1", "Step1"],
    "vLLM does not fuse gate and up": ["Glm"],
    "its config is the checkpoint's own code": ["ChatGLMModel", "ChatGLM", "Nanbeige", "TeleChat2"],
    "multimodal": ["HCXVisionV2", "MuseGlimmer", "Emu3", "HunYuanVL", "VibeVoiceAsr"],
    "mixture of experts, by its parent class": ["MistralLarge3"],
}

LLAMA: dict[str, Any] = {"model_type": "llama"}
# vLLM reads only the architecture's name: where transformers has no config of its own, a similar one serves.
LIKE: dict[str, dict[str, Any]] = {
    "ExaoneForCausalLM": {**LLAMA, "activation_function": "silu", "num_layers": 4, "layer_norm_epsilon": 1e-5},
    "Gemma4ForCausalLM": {"model_type": "gemma4_text", "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0},
    "GraniteSWAForCausalLM": {"model_type": "granite_swa"},
    "MiniCPMForCausalLM": {"model_type": "minicpm3"},
    "Plamo3ForCausalLM": {
        **LLAMA,
        "layer_types": ["full_attention"] * models.LAYERS,
        "interleaved_sliding_window": [None] * models.LAYERS,
        "sliding_window_pattern": 1,
        "rope_local_theta": 1e4,
    },
    "VaultGemmaForCausalLM": {"model_type": "vaultgemma", "query_pre_attn_scalar": 32},
    "TeleFLMForCausalLM": {**LLAMA, "use_mup": False, "mlp_bias": True},
}


def stem(architecture: str) -> str:
    return architecture.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration")


def tiny_configs() -> dict[str, dict[str, Any]]:
    """A config for every architecture of the table; those of the tests by tokens first."""
    found: dict[str, dict[str, Any]] = {}
    for settings in models.ARCHITECTURES.values():
        config = AutoConfig.for_model(settings["model_type"])
        name = registry_name(config.model_type)
        found.setdefault(name, settings)
    return {name: found.get(name) or LIKE.get(name) or LLAMA for name in ARCHITECTURES}


def registry_name(model_type: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def test_every_text_model_is_accounted_for() -> None:
    left_out = [name for names in LEFT_OUT.values() for name in names]
    assert len(left_out) == len(set(left_out))
    everything = registry._TEXT_GENERATION_MODELS | registry._TRANSFORMERS_SUPPORTED_MODELS
    assert not [name for name in ARCHITECTURES if name not in everything or stem(name) in left_out]
    unknown = [
        name
        for name, (module, cls) in everything.items()
        if name not in ARCHITECTURES and stem(name) not in left_out and "MoE" not in cls + source(module)
    ]
    assert not unknown, "new text models of vLLM: support them, or leave them out with a reason"
    assert not set(left_out) - {stem(name) for name in everything}


def source(module: str) -> str:
    """The text of a module of vLLM's models, or of all in a package."""
    models_dir = Path(registry.__file__).parent
    if module == "transformers":  # for all architectures that vLLM has no model of its own for
        return ""
    if "." not in module:
        return (models_dir / f"{module}.py").read_text()
    package = models_dir.parents[2].joinpath(*module.split("."))
    return "".join(file.read_text() for file in sorted(package.rglob("*.py")))


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One rank, which vLLM's layers ask for."""
    init_distributed_environment(1, 0, f"file://{tmp_path_factory.mktemp('rank')}/rendezvous", 0, "gloo")
    yield
    cleanup_dist_env_and_memory()


def build(architecture: str, directory: Path, **settings: Any) -> tuple[nn.Module, BaseModelInfo]:
    """vLLM's model, with random weights, and its dimensions."""
    settings = models.COMMON | settings
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.architectures, config.dtype = [architecture], torch.float32
    config.save_pretrained(directory)
    vllm_config = EngineArgs(
        model=str(directory), dtype="float32", max_model_len=64, enforce_eager=True, skip_tokenizer_init=True
    ).create_engine_config()
    with transformers_kept(), set_current_vllm_config(vllm_config), set_default_torch_dtype(torch.float32):
        ensure_model_parallel_initialized(1, 1)
        model = initialize_model(vllm_config).eval()
    served = BaseModelInfo.from_hf(vllm_config.model_config.hf_text_config, str(directory))
    served.architecture = vllm_config.model_config.architectures[0]
    assert served.architecture == architecture
    return model, served


@pytest.mark.usefixtures("distributed", "inspected_in_process")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_compute_what_the_plugin_assumes(architecture: str, tmp_path: Path) -> None:
    """Packed and computed by the kernels' definition, each is the module that vLLM built."""
    model, served = build(architecture, tmp_path, **tiny_configs()[architecture])
    generator = torch.Generator().manual_seed(0)
    for layer in range(served.num_hidden_layers):
        block = find_block(model, layer, served)
        packed = _repack(block, 0, Ranks())
        for linear in (block.up, block.down):
            for weight in linear.parameters():
                weight.data.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5)
            linear.quant_method.process_weights_after_loading(linear)
        x = torch.randn(5, served.hidden_size, generator=generator)
        expected = block.run(x)[0] if block.names.inline else block.module(x)
        assert expected.std() > 1e-2
        torch.testing.assert_close(reference.dense_ff(x, packed), expected, rtol=1e-4, atol=1e-5)


def test_the_ungated_ones_are_those_that_the_kernels_know() -> None:
    assert {name for name, names in ARCHITECTURES.items() if not names.gated} == UNGATED_ARCHITECTURES


def test_each_is_shown_by_tokens_or_by_structure() -> None:
    """docs/compatibility.md says which."""
    by_tokens = {
        registry_name(models.ARCHITECTURES[name]["model_type"])
        for name in [*equality.ARCHITECTURES, *(name for name, _ in equality.MORE_CASES)]
    }
    rows = (Path(__file__).parents[2] / "docs/compatibility.md").read_text().splitlines()
    for shown, names in (("tokens", by_tokens), ("structure", set(ARCHITECTURES) - by_tokens)):
        (row,) = [row for row in rows if f"shown by {shown}" in row]
        assert sorted(row.split("|")[1].split("`")[1::2]) == sorted(names)


class Linear(nn.Linear):
    return_bias, skip_bias_add = False, False


class Gated(nn.Module):
    """What all blocks do; the cases below do a little more."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.act_fn, self.down_proj = Linear(4, 12), nn.ReLU(), Linear(12, 4)
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Any) -> Any:
        return self.down_proj(self.act_fn(self.gate_up_proj(x)))


MORE: dict[str, Callable[[Gated, Any], Any]] = {
    "multiplier": lambda self, x: 2 * Gated.forward(self, x),
    "residual": lambda self, x: x + Gated.forward(self, x),
    "twice": lambda self, x: Gated.forward(self, Gated.forward(self, x)),
    "no activation": lambda self, x: self.down_proj(self.gate_up_proj(x)),
    "clamp": lambda self, x: self.down_proj(self.act_fn(self.gate_up_proj(x).clamp(max=7))),
    "torch function": lambda self, x: self.down_proj(torch.relu(self.act_fn(self.gate_up_proj(x)))),
    "norm": lambda self, x: self.down_proj(self.norm(self.act_fn(self.gate_up_proj(x)))),
    "input scaled": lambda self, x: Gated.forward(self, x * 3),
    "input added": lambda self, x: Gated.forward(self, x + x),
    "ignored": lambda self, x: (Gated.forward(self, x), x)[1],
    "pair": lambda self, x: (Gated.forward(self, x), None),
}


def test_a_block_that_does_more_is_noticed() -> None:
    assert _is_chain(Gated(), Names())
    for what, forward in MORE.items():
        block = type("More", (Gated,), {"forward": forward})()
        assert not _is_chain(block, Names()), what
        assert isinstance(block.act_fn, nn.ReLU), "the stubs must go again"
    dropout = type("Dropout", (Gated,), {"forward": lambda s, x: nn.functional.dropout(Gated.forward(s, x), 0.1)})()
    assert _is_chain(dropout, Names()), "the identity once vLLM has put the model into eval mode"


def test_an_inline_block_may_have_things_around_it_but_not_inside() -> None:
    inline = Names("", inline=True)

    def around(self: Gated, x: Any) -> Any:
        return x + Gated.forward(self, self.norm(x))

    def tapped(self: Gated, x: Any) -> Any:
        u = self.gate_up_proj(x)
        return self.norm(u) + self.down_proj(self.act_fn(u))

    assert _is_chain(type("Layer", (Gated,), {"forward": around})(), inline)
    for forward in (tapped, MORE["clamp"], MORE["norm"], MORE["twice"], MORE["ignored"], MORE["no activation"]):
        taken = _is_chain(type("Layer", (Gated,), {"forward": forward})(), inline)
        assert taken == (forward is MORE["ignored"]), "around the block anything goes, also to drop its result"


@pytest.mark.parametrize(
    ("module", "gated", "expected"),
    [
        (lambda: activation.SiluAndMul(), True, "silu"),
        (lambda: activation.GeluAndMul(), True, "gelu"),
        (lambda: activation.GeluAndMul(approximate="tanh"), True, "gelu_pytorch_tanh"),
        (lambda: activation.SiluAndMulWithClamp(7.0), True, None),
        (lambda: activation.FatreluAndMul(0.01), True, None),
        (lambda: activation.MulAndSilu(), True, None),
        (lambda: activation.NewGELU(), False, "gelu_pytorch_tanh"),
        (lambda: activation.FastGELU(), False, "gelu_pytorch_tanh"),
        (lambda: activation.QuickGELU(), False, None),
        (lambda: activation.ReLUSquaredActivation(), False, None),
        (lambda: nn.ReLU(), False, "relu"),
        (lambda: nn.ReLU6(), False, None),
    ],
)
def test_activations_are_recognized_by_their_values(module: Any, gated: bool, expected: str | None) -> None:
    with set_current_vllm_config(VllmConfig()):
        assert activation_of_module(module(), gated) == expected
