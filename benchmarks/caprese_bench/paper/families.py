"""Dimensions of the model families of the paper's figure 6, as in their `config.json` on the Hugging Face Hub.

Only those on which the number of parameters depends. Checked against the copies in litgpt's `litgpt/config.py` (commit
0006c973 and later: Llama 3, Gemma 2, Qwen2.5-14B to 72B) and against public copies of the files themselves (Llama 3.1
8B, 3.2 3B, Qwen2.5 3B to 32B). tests/benchmarks/test_parameters.py checks all totals against the Hub's own counts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from caprese_kernels.errors import CapreseError


@dataclass(frozen=True)
class ModelDimensions:
    """A model's dimensions, by the names of transformers' configurations."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool


@dataclass(frozen=True)
class Family:
    """Models of one architecture, the smallest first."""

    model_type: str  # transformers' name of the architecture
    models: dict[str, ModelDimensions]


FAMILIES = {
    "Llama 3": Family(
        "llama",
        {
            "Llama 3.2 1B": ModelDimensions(2048, 8192, 16, 32, 8, 64, 128256, True),
            "Llama 3.2 3B": ModelDimensions(3072, 8192, 28, 24, 8, 128, 128256, True),
            "Llama 3.1 8B": ModelDimensions(4096, 14336, 32, 32, 8, 128, 128256, False),
            "Llama 3.1 70B": ModelDimensions(8192, 28672, 80, 64, 8, 128, 128256, False),
            "Llama 3.1 405B": ModelDimensions(16384, 53248, 126, 128, 8, 128, 128256, False),
        },
    ),
    "Gemma 2": Family(
        "gemma2",
        {
            "Gemma 2 2B": ModelDimensions(2304, 9216, 26, 8, 4, 256, 256000, True),
            "Gemma 2 9B": ModelDimensions(3584, 14336, 42, 16, 8, 256, 256000, True),
            "Gemma 2 27B": ModelDimensions(4608, 36864, 46, 32, 16, 128, 256000, True),
        },
    ),
    "Qwen 2.5": Family(
        "qwen2",
        {
            "Qwen2.5 0.5B": ModelDimensions(896, 4864, 24, 14, 2, 64, 151936, True),
            "Qwen2.5 1.5B": ModelDimensions(1536, 8960, 28, 12, 2, 128, 151936, True),
            "Qwen2.5 3B": ModelDimensions(2048, 11008, 36, 16, 2, 128, 151936, True),
            "Qwen2.5 7B": ModelDimensions(3584, 18944, 28, 28, 4, 128, 152064, False),
            "Qwen2.5 14B": ModelDimensions(5120, 13824, 48, 40, 8, 128, 152064, False),
            "Qwen2.5 32B": ModelDimensions(5120, 27648, 64, 40, 8, 128, 152064, False),
            "Qwen2.5 72B": ModelDimensions(8192, 29568, 80, 64, 8, 128, 152064, False),
        },
    ),
}


def config(family: str, model: str) -> Any:
    """The transformers configuration of a model of FAMILIES."""
    from transformers import AutoConfig

    return AutoConfig.for_model(FAMILIES[family].model_type, **asdict(FAMILIES[family].models[model]))


def model_config(model: str) -> Any:
    """The transformers configuration of a directory or Hub id. Raises CapreseError if there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CapreseError(
            f"--model {model}",
            expected="a model directory or Hub id with a config.json",
            found=str(error).split("\n")[0],
            fix="correct the path or id",
        ) from None
