"""Models to time: shapes of published ones, written as a config alone and served with dummy weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from caprese_kernels.errors import CapreseError

_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "vocab_size": 151936,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}
# Each as its config.json on the Hub has it.
ARCHS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _QWEN2
    | {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": _QWEN2
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-14b": _QWEN2
    | {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}


def write_arch(name: str, folder: Path) -> Path:
    """The folder of a model of that shape without weights or tokenizer, for `load_format="dummy"`."""
    if name not in ARCHS:
        raise CapreseError("--arch", expected=f"one of {', '.join(ARCHS)}", found=name, fix="choose one of these")
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(ARCHS[name], indent=1))
    return place
