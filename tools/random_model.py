"""Writes a model of a published shape with random weights and a tokenizer, to time anything that ignores its answers.

python tools/random_model.py qwen2.5-0.5b DIR --tokenizer-from train.jsonl
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from caprese_bench.engine.models import ARCHS, write_arch
from caprese_serve.demo import MODEL

SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|end|>"}
ROLES = ["<|user|>", "<|assistant|>"]


def make_tokenizer(texts: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, trained on every string in the objects of a JSONL file."""

    def strings() -> Iterator[str]:
        with texts.open(encoding="utf-8") as lines:
            for line in lines:
                yield from (value for value in json.loads(line).values() if isinstance(value, str))

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True) for token in (*SPECIAL.values(), *ROLES)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(strings(), trainer)
    template = (MODEL / "chat_template.jinja").read_text()
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **SPECIAL)


def write_random_model(arch: str, directory: Path, texts: Path, vocabulary: int = 8000, seed: int = 0) -> None:
    """Write a model of the shape `arch` of `caprese_bench.engine.models.ARCHS`, its bfloat16 weights random as by
    transformers before training.

    Token ids are below `vocabulary`; embedding and head have the size of the published vocabulary.
    """
    tokenizer = make_tokenizer(texts, vocabulary)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.from_pretrained(write_arch(arch, Path(folder)))
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main(
    arch: Annotated[str, typer.Argument(help=f"Shape: {', '.join(ARCHS)}.")],
    directory: Annotated[Path, typer.Argument(help="Where to write the model.")],
    tokenizer_from: Annotated[Path, typer.Option(help="JSONL file on whose strings the tokenizer is trained.")],
    vocabulary: Annotated[int, typer.Option(help="Size of the tokenizer's vocabulary.")] = 8000,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
) -> None:
    """Write a model with random weights to DIRECTORY."""
    write_random_model(arch, directory, tokenizer_from, vocabulary, seed)
    print(f"wrote {directory}")


if __name__ == "__main__":
    typer.run(main)
