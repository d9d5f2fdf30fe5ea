"""Generates with an adapter in a Hugging Face model, without vLLM: `python examples/hugging_face.py [MODEL ADAPTER]`.

This is the method written out in torch, for analysis: it masks neurons instead of skipping them, so it saves no time.
"""

import sys
from dataclasses import replace

from transformers import AutoModelForCausalLM, AutoTokenizer

from caprese_bench.hugging_face.decoding import adapter_blocks, decode, score
from caprese_kernels.adapters import Adapters
from caprese_kernels.config import method_of
from caprese_serve.demo import ADAPTERS, MODEL
from caprese_serve.demo.problems import problems


def main(model_path: str = str(MODEL), adapter: str = str(ADAPTERS["griffin"])) -> None:
    adapters = Adapters.load(adapter)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=adapters.dtype)  # that of L and R
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    method = method_of(adapters.config)
    asked = list(problems("math", "test", 40))

    plain = adapter_blocks(replace(adapters, left={}, right={}))
    repaired = adapter_blocks(adapters)
    for title, ff in (("full model", None), (f"{method.name} alone", plain), ("with the adapter", repaired)):
        answers = decode(model, tokenizer, asked, ff)
        print(f"{title}: {score(tokenizer, asked, answers)} of {len(asked)} problems solved")


if __name__ == "__main__":
    main(*sys.argv[1:])
