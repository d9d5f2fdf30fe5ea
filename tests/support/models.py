"""Tiny random models of every architecture under test, and random adapter files, written as a user's would be.

The adapter file is written from the text of its format with plain `safetensors`, without this project's writer.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 300
LAYERS = 4
HIDDEN = 64
BOS, EOS, USER, ASSISTANT = "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 160,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that vLLM's attention takes on a CPU
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
TWO_HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
# vLLM's Cohere models know tied embeddings only. At the default scale, 1/16, logits of random weights are nearly flat.
COHERE: dict[str, Any] = {"tie_word_embeddings": True, "logit_scale": 0.25}
# What differs from COMMON. An odd F finds kernels that count on even ones; biases in the FF block are llama-bias's.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "intermediate_size": 97},
    "llama-bias": {"model_type": "llama", "mlp_bias": True},
    "qwen2": {"model_type": "qwen2", "num_attention_heads": 2, "num_key_value_heads": 1},
    "qwen3": {"model_type": "qwen3", "intermediate_size": 129},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "gemma2": {
        "model_type": "gemma2",
        "query_pre_attn_scalar": 32,
        "sliding_window": 32,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    # Compared by tokens in tests/engine/test_architectures.py. Where there is no head_dim it is hidden_size / heads.
    "cohere": {"model_type": "cohere", **TWO_HEADS, **COHERE},
    # vLLM's window is one token wider than transformers' (commandr.py says why): none of the tests' texts fills it.
    "cohere2": {"model_type": "cohere2", "intermediate_size": 129, "sliding_window": 128, **COHERE},
    "cwm": {"model_type": "cwm", "sliding_window": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "ernie4_5": {"model_type": "ernie4_5"},
    "exaone4": {"model_type": "exaone4", "sliding_window": 32, "sliding_window_pattern": 2},
    "gemma": {"model_type": "gemma", "tie_word_embeddings": True},
    "gemma3": {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 32,
        "sliding_window": 32,
        "tie_word_embeddings": True,
    },
    "glm4": {"model_type": "glm4"},
    "gpt2": {"model_type": "gpt2", **TWO_HEADS, "n_inner": 160},
    "gptj": {"model_type": "gptj", **TWO_HEADS, "n_inner": 129, "rotary_dim": 16},
    # GPT-NeoX has as many key heads as heads. vLLM believes a config that says otherwise, and crashes in its cache.
    "gptneox": {"model_type": "gpt_neox", "num_attention_heads": 2, "num_key_value_heads": 2},
    "granite": {
        "model_type": "granite",
        **TWO_HEADS,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 1.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 0.9,
    },
    "hunyuan": {"model_type": "hunyuan_v1_dense"},
    "hyperclovax": {"model_type": "hyperclovax", **TWO_HEADS},
    "minicpm3": {
        "model_type": "minicpm3",
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "num_key_value_heads": 4,
    },
    "ministral3": {"model_type": "ministral3"},
    "olmo": {"model_type": "olmo", **TWO_HEADS},
    "olmo2": {"model_type": "olmo2", **TWO_HEADS},
    "olmo3": {"model_type": "olmo3", **TWO_HEADS, "sliding_window": 32},
    "opt": {"model_type": "opt", **TWO_HEADS, "ffn_dim": 160, "word_embed_proj_dim": HIDDEN},
    "opt-350m": {
        "model_type": "opt",
        **TWO_HEADS,
        "ffn_dim": 97,
        "word_embed_proj_dim": 32,
        "do_layer_norm_before": False,
        "tie_word_embeddings": True,
    },
    "phi": {"model_type": "phi", **TWO_HEADS},
    "phi3": {"model_type": "phi3", **TWO_HEADS},
    "seed_oss": {"model_type": "seed_oss"},
    "smollm3": {"model_type": "smollm3", **TWO_HEADS},
    "stablelm": {"model_type": "stablelm", **TWO_HEADS},
    "starcoder2": {"model_type": "starcoder2", **TWO_HEADS, "sliding_window": None},
}


def make_model(name: str, directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Write the model `name` of ARCHITECTURES with random weights, in float32, with a tokenizer; return `directory`."""
    settings = COMMON | ARCHITECTURES[name] | changes
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config)
    _randomize(model, seed)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def _randomize(model: torch.nn.Module, seed: int) -> None:
    """Large weights: generated text varies, and leaving neurons out changes it (both are asserted by the tests)."""
    generator = torch.Generator().manual_seed(seed)
    centred = type(model).__name__.startswith("Gemma")  # its norms multiply by 1 + weight
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if centred and "post_" in name:
            noise = 0.2 * noise + 3.0  # else tied embeddings repeat the last token for ever
        elif "norm" in name or "ln_" in name:
            noise = 0.2 * noise + (0.0 if centred else 1.0)
        elif name.endswith("bias"):
            noise *= 0.3
        elif any(part in name for part in ("embed_", "wte", "wpe")):
            noise *= 0.15 if centred else 1.0
        elif any(part in name for part in ("mlp", "fc1", "fc2")):
            noise *= 2.0 * weight.shape[1] ** -0.5
        elif "lm_head" in name:
            noise *= 3.0 * weight.shape[1] ** -0.5
        else:
            noise *= 1.5 * weight.shape[1] ** -0.5
        weight.data.copy_(noise)


@cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template; reads and writes any text."""
    core = Tokenizer(tokenizer_models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in (BOS, EOS, USER, ASSISTANT)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["one two three four five six seven eight nine ten " * 3], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, chat_template=CHAT_TEMPLATE, model_max_length=512
    )


def make_adapter(
    model_dir: Path,
    path: Path,
    method: str,
    *,
    density: float = 0.5,
    rank: int = 8,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    scale: float = 1.0,
    selection: Mapping[str, Any] | None = None,
) -> Path:
    """Write a random adapter file for the model in `model_dir`; return `path`.

    Version 1; with `selection` (score, prior, core, perhaps densities) version 2, with random priors; rank 0 leaves L
    and R out.

    x L has entries of about `scale` times x's; x L R is then as large as what the sparse block leaves out.
    """
    served = json.loads((model_dir / "config.json").read_text())
    num_layers = first_of(served, "num_hidden_layers", "n_layer")
    if layers is None:
        layers = range(num_layers // (2 if method == "griffin" else 1))
    depth = first_of(served, "hidden_size", "n_embd")
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    neurons = first_of(served, "ffn_dim", "n_inner", "intermediate_size")
    for i in layers:
        if rank:
            left = scale * torch.randn(depth, rank, generator=generator) * depth**-0.5
            right = scale * torch.randn(rank, depth, generator=generator) * rank**-0.5
            tensors |= {f"layers.{i}.L": left.to(dtype), f"layers.{i}.R": right.to(dtype)}
        if selection is not None:
            shares = torch.rand(neurons, generator=generator)
            tensors[f"layers.{i}.prior"] = shares / shares.sum()
    config = {
        "base_model": {
            "name_or_path": str(model_dir),
            "architecture": served["architectures"][0],
            "hidden_size": depth,
            "intermediate_size": neurons,
            "num_hidden_layers": num_layers,
            "hidden_act": first_of(served, "hidden_activation", "hidden_act", "activation_function"),
        },
        "method": method,
        "density": density,
        "rank": rank,
        "layers": list(layers),
        "training": {"stage": "random", "samples": 0, "solver": "none"},
        "caprese_version": "0.1.0",
    }
    version = "1" if selection is None else "2"
    header = {"format": "caprese", "format_version": version, "config": json.dumps(config | dict(selection or {}))}
    save_file(tensors, path, metadata=header)
    return path


def first_of(settings: Mapping[str, Any], *names: str) -> Any:
    """The first setting that is there: models' configs have different names for the same thing."""
    return next(settings[name] for name in names if settings.get(name) is not None)


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Token ids without special tokens, one prompt for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def low_rank(tensors: Mapping[str, Tensor], part: str) -> dict[int, Tensor]:
    """The L (or R, or prior) of every layer, by its index, in float32."""
    return {int(name.split(".")[1]): t.float() for name, t in tensors.items() if name.endswith(f".{part}")}
