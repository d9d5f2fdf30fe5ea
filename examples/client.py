"""Asks a server that runs Caprese, then asks it again without: `python examples/client.py [URL]`.

vllm serve serve/caprese_serve/demo/model --dtype float32 --max-model-len 512 \
    --caprese-weights serve/caprese_serve/demo/adapters/griffin.safetensors
"""

import os
import sys
from typing import Any

from openai import OpenAI

PROMPT = "Leo has 27 apples. Then Leo triples the number of apples. How many apples does Leo have now?"


def main(url: str = "http://localhost:8000") -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
    model = client.models.list().data[0].id

    def answer(**options: Any) -> str:
        reply = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": PROMPT}], temperature=0, max_tokens=100, **options
        )
        return reply.choices[0].message.content or ""

    print("Caprese:", answer())
    print("full model:", answer(extra_body={"vllm_xargs": {"caprese": "off"}}))  # this request alone
    report: Any = client.get(f"{url}/caprese", cast_to=object)
    print(f"server: {report['method']}, density {report['density']}, {report['generated_tokens']} tokens ran sparse")


if __name__ == "__main__":
    main(*sys.argv[1:])
