"""Answers prompts with vLLM and an adapter, in this process: `python examples/offline.py [MODEL ADAPTER]`."""

import sys

from vllm import LLM, SamplingParams

from caprese_serve.demo import ADAPTERS, MODEL

PROMPTS = [
    "Leo has 27 apples. Then Leo triples the number of apples. How many apples does Leo have now?",
    "Mia has 40 coins. Then Mia finds 15 coins. How many coins does Mia have now?",
]


def main(model: str = str(MODEL), adapter: str = str(ADAPTERS["griffin"])) -> None:
    caprese = {"weights": adapter}
    # Eager, to start sooner; leave that out for a model whose speed counts.
    llm = LLM(model, max_model_len=512, enforce_eager=True, additional_config={"caprese": caprese})
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    greedy = SamplingParams(temperature=0, max_tokens=100)
    full = SamplingParams(temperature=0, max_tokens=100, extra_args={"caprese": "off"})  # through the original model
    for title, parameters in (("Caprese", greedy), ("full model", full)):
        for output in llm.chat(chats, parameters, use_tqdm=False):
            print(f"{title}: {output.outputs[0].text}")


if __name__ == "__main__":  # vLLM starts processes, which import this file
    main(*sys.argv[1:])
