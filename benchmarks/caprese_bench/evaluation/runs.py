"""A task as it is evaluated: its requests, and a variant's answers to them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from .problem_sets import ProblemSet
from .questions import Question
from .store import Response, digest
from .tasks import Sampling, Task
from .variants import ServedVariant


@dataclass(frozen=True)
class Request:
    """`samples` answers to one prompt. `identity` is everything that they depend on, `key` its digest."""

    id: str
    prompt: str
    chat: bool
    options: dict[str, Any]
    identity: dict[str, Any]
    key: str


@dataclass(frozen=True)
class EvaluationRun:
    """A task as every variant is asked it: each question `repeats` times, with `samples` answers each time.

    Sample i of repeat r has the seed `seed` + r * samples + i; greedy answers need none.
    """

    task: Task
    problems: ProblemSet
    sampling: Sampling
    repeats: int = 1
    samples: int = 1
    seed: int = 0

    @property
    def seeded(self) -> bool:
        """Whether requests have seeds."""
        return self.sampling.temperature > 0

    def requests(self, served: dict[str, Any]) -> list[list[Request]]:
        """The requests by repeat and question, for a variant with the identity `served`."""
        by_repeat = []
        for repeat in range(self.repeats):
            options: dict[str, Any] = self.sampling.model_dump()
            if self.seeded:
                options |= {"seed": self.seed + repeat * self.samples, "n": self.samples}
            by_repeat.append([self._request(question, options, served) for question in self.problems.questions])
        return by_repeat

    def _request(self, question: Question, options: dict[str, Any], served: dict[str, Any]) -> Request:
        if question.stop:
            options = options | {"stop": list(question.stop)}
        prompt = {"sha256": hashlib.sha256(question.prompt.encode()).hexdigest(), "chat": self.task.chat}
        identity = served | {"prompt": prompt, "options": options}
        return Request(question.id, question.prompt, self.task.chat, options, identity, digest(identity))


@dataclass(frozen=True)
class Answers:
    """All responses of a variant in an evaluation run, by repeat and question."""

    variant: ServedVariant
    run: EvaluationRun
    responses: list[list[Response]]

    @property
    def all(self) -> list[Response]:
        """All responses in one list."""
        return [response for repeat in self.responses for response in repeat]

    @property
    def samples(self) -> int:
        """Number of answers."""
        return sum(len(response.texts) for response in self.all)

    @property
    def mean_tokens(self) -> float:
        """Mean tokens of an answer."""
        return sum(response.tokens for response in self.all) / self.samples

    @property
    def cut_off(self) -> float:
        """Share of the answers that reached the limit of tokens."""
        return sum(each == "length" for response in self.all for each in response.finish) / self.samples

    def counted(self) -> tuple[int, float | None]:
        """(Tokens that sparse FF blocks computed, share of FF weights that these needed), by the server's counters."""
        last: dict[str, Response] = {}
        for response in self.all:
            if response.session not in last or response.sparse_tokens >= last[response.session].sparse_tokens:
                last[response.session] = response
        tokens = sum(response.sparse_tokens for response in last.values())
        read = sum((response.ff_weights_read or 0) * response.sparse_tokens for response in last.values())
        return tokens, read / tokens if tokens else None

    def scores(self) -> list[list[float]]:
        """The scores by repeat and question, of single samples."""
        return [self.run.problems.score([response.texts[0] for response in repeat]) for repeat in self.responses]
