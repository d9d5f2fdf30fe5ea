"""Sends problems to a server and grades the answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..client import Client, in_turns
from ..server import VllmServer
from .problems import Problem, grade

MAX_TOKENS = 160


@dataclass(frozen=True)
class Answer:
    """A model's response to a problem, and its number of generated tokens."""

    problem: Problem
    response: str
    tokens: int

    @property
    def correct(self) -> bool:
        """Whether the response ends in the problem's answer."""
        return grade(self.response, self.problem.answer)


def ask(
    server: VllmServer,
    model: str,
    problems: Sequence[Problem],
    concurrency: int,
    answered: Callable[[], object] = lambda: None,
) -> tuple[list[Answer], float]:
    """Send all problems, `concurrency` at a time, and call `answered` after each answer.

    Returns the answers in the order of the problems, and the seconds from the first request to the last answer. Raises
    openai.OpenAIError.
    """
    return asyncio.run(_ask(server, model, problems, concurrency, answered))


async def _ask(
    server: VllmServer, model: str, problems: Sequence[Problem], concurrency: int, answered: Callable[[], object]
) -> tuple[list[Answer], float]:
    answers: dict[int, Answer] = {}
    async with Client(server.url, model, server.api_key) as client:

        async def one(index: int) -> None:
            problem = problems[index]
            reply = await client.answer(problem.prompt, temperature=0, max_tokens=MAX_TOKENS)
            answers[index] = Answer(problem, reply.texts[0], reply.tokens)
            answered()

        begin = time.perf_counter()
        await in_turns(concurrency, one, range(len(problems)))
        return [answers[index] for index in range(len(problems))], time.perf_counter() - begin
