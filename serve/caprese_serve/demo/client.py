"""Sends problems to a server through the `openai` client and grades the answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from .problems import Problem, chat, grade

MAX_TOKENS = 160


@dataclass(frozen=True)
class Answer:
    problem: Problem
    response: str
    tokens: int

    @property
    def correct(self) -> bool:
        return grade(self.response, self.problem.answer)


def ask(
    url: str, model: str, problems: Sequence[Problem], concurrency: int, answered: Callable[[], object] = lambda: None
) -> tuple[list[Answer], float]:
    """The answers in the order of the problems, and the wall-clock seconds from first request to last answer."""
    return asyncio.run(_ask(url, model, problems, concurrency, answered))


async def _ask(
    url: str, model: str, problems: Sequence[Problem], concurrency: int, answered: Callable[[], object]
) -> tuple[list[Answer], float]:
    turn = asyncio.Semaphore(concurrency)
    # trust_env: no proxies, the server is on this machine.
    http = DefaultAsyncHttpxClient(trust_env=False, timeout=300)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http) as client:

        async def one(problem: Problem) -> Answer:
            async with turn:
                reply = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": m["content"]} for m in chat(problem.prompt)],
                    temperature=0,
                    max_tokens=MAX_TOKENS,
                )
            answered()
            assert reply.usage is not None
            return Answer(problem, reply.choices[0].message.content or "", reply.usage.completion_tokens)

        begin = time.perf_counter()
        answers = await asyncio.gather(*map(one, problems))
        return answers, time.perf_counter() - begin
