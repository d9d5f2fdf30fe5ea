"""Dimensions of the model families of the paper's figure 6, as their `config.json` on the Hugging Face Hub gives them.

Only what a number of parameters depends on. Checked against the copies in litgpt's `litgpt/config.py` (commit 0006c973
and later: Llama 3, Gemma 2, Qwen2.5-14B to 72B) and in public copies of the files themselves (Llama 3.1 8B, 3.2 3B,
Qwen2.5 3B to 32B); all totals, of Qwen2.5 0.5B and 1.5B too, against the Hub's own counts in
tests/benchmarks/test_parameters.py.
"""

from __future__ import annotations

from typing import Any

from caprese_kernels.errors import CapreseError

# Keys of transformers' configurations, in the order of a line below.
KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)
# Family: (transformers' model type, {model: dimensions}), the smallest model first.
FAMILIES: dict[str, tuple[str, dict[str, tuple[Any, ...]]]] = {
    "Llama 3": (
        "llama",
        {
            "Llama 3.2 1B": (2048, 8192, 16, 32, 8, 64, 128256, True),
            "Llama 3.2 3B": (3072, 8192, 28, 24, 8, 128, 128256, True),
            "Llama 3.1 8B": (4096, 14336, 32, 32, 8, 128, 128256, False),
            "Llama 3.1 70B": (8192, 28672, 80, 64, 8, 128, 128256, False),
            "Llama 3.1 405B": (16384, 53248, 126, 128, 8, 128, 128256, False),
        },
    ),
    "Gemma 2": (
        "gemma2",
        {
            "Gemma 2 2B": (2304, 9216, 26, 8, 4, 256, 256000, True),
            "Gemma 2 9B": (3584, 14336, 42, 16, 8, 256, 256000, True),
            "Gemma 2 27B": (4608, 36864, 46, 32, 16, 128, 256000, True),
        },
    ),
    "Qwen 2.5": (
        "qwen2",
        {
            "Qwen2.5 0.5B": (896, 4864, 24, 14, 2, 64, 151936, True),
            "Qwen2.5 1.5B": (1536, 8960, 28, 12, 2, 128, 151936, True),
            "Qwen2.5 3B": (2048, 11008, 36, 16, 2, 128, 151936, True),
            "Qwen2.5 7B": (3584, 18944, 28, 28, 4, 128, 152064, False),
            "Qwen2.5 14B": (5120, 13824, 48, 40, 8, 128, 152064, False),
            "Qwen2.5 32B": (5120, 27648, 64, 40, 8, 128, 152064, False),
            "Qwen2.5 72B": (8192, 29568, 80, 64, 8, 128, 152064, False),
        },
    ),
}


def config(family: str, model: str) -> Any:
    """The transformers configuration of a model above."""
    from transformers import AutoConfig

    model_type, models = FAMILIES[family]
    return AutoConfig.for_model(model_type, **dict(zip(KEYS, models[model], strict=True)))


def model_config(model: str) -> Any:
    """The transformers configuration of a directory or Hub id; CapreseError where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CapreseError(
            f"--model {model}",
            expected="a model directory or Hub id with a config.json",
            found=str(error).split("\n")[0],
            fix="correct it",
        ) from None
