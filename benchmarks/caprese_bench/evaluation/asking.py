"""Asks every variant every question, once: through servers that run only while they are needed, with proof.

The server's own counters (GET /caprese) must show for each response, before it is stored, that sparse FF blocks
generated its tokens, or for Full that they generated none. What does not fit fails at once, and what was asked for in
the same session is not kept.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from openai import OpenAIError
from rich.console import Console

from caprese_kernels.errors import CapreseError
from caprese_serve.client import Client, Reply, in_turns
from caprese_serve.demo.results import Served

from ..results.recording import progress
from .exams import Exam
from .questions import Question
from .store import Response, Store, digest
from .tasks import Sampling, Task
from .variants import OFF, Bench, Endpoint, Variant


@dataclass(frozen=True)
class Request:
    """`samples` answers to one prompt. `identity` tells all that they depend on, `key` is its digest."""

    id: str
    prompt: str
    chat: bool
    options: dict[str, Any]
    identity: dict[str, Any]
    key: str


@dataclass(frozen=True)
class Sitting:
    """A task as every variant is asked it: `runs` times each question, `samples` answers each time.

    Sample i of run r has the seed `seed` + r * samples + i; greedy answers need none.
    """

    task: Task
    exam: Exam
    sampling: Sampling
    runs: int = 1
    samples: int = 1
    seed: int = 0

    @property
    def seeded(self) -> bool:
        return self.sampling.temperature > 0

    def requests(self, served: dict[str, Any]) -> list[list[Request]]:
        """By run and question, for a variant of that identity."""
        made = []
        for run in range(self.runs):
            options: dict[str, Any] = self.sampling.model_dump()
            if self.seeded:
                options |= {"seed": self.seed + run * self.samples, "n": self.samples}
            made.append([self._request(question, options, served) for question in self.exam.questions])
        return made

    def _request(self, question: Question, options: dict[str, Any], served: dict[str, Any]) -> Request:
        if question.stop:
            options = options | {"stop": list(question.stop)}
        prompt = {"sha256": hashlib.sha256(question.prompt.encode()).hexdigest(), "chat": self.task.chat}
        identity = served | {"prompt": prompt, "options": options}
        return Request(question.id, question.prompt, self.task.chat, options, identity, digest(identity))


@dataclass(frozen=True)
class Answers:
    """All responses of a variant to a sitting, by run and question."""

    variant: Variant
    sitting: Sitting
    responses: list[list[Response]]

    @property
    def all(self) -> list[Response]:
        return [response for run in self.responses for response in run]

    @property
    def samples(self) -> int:
        return sum(len(response.texts) for response in self.all)

    @property
    def mean_tokens(self) -> float:
        """Of a response."""
        return sum(response.tokens for response in self.all) / self.samples

    @property
    def cut_off(self) -> float:
        """Share of the responses that the limit of tokens ended."""
        return sum(each == "length" for response in self.all for each in response.finish) / self.samples

    def counted(self) -> tuple[int, float | None]:
        """Tokens that sparse FF blocks ran, and the share of FF weights that they needed, by the server's counters."""
        last: dict[str, Response] = {}
        for response in self.all:
            if response.session not in last or response.sparse_tokens >= last[response.session].sparse_tokens:
                last[response.session] = response
        tokens = sum(response.sparse_tokens for response in last.values())
        read = sum((response.ff_weights_read or 0) * response.sparse_tokens for response in last.values())
        return tokens, read / tokens if tokens else None

    def scores(self) -> list[list[float]]:
        """By run and question, of single samples."""
        return [self.sitting.exam.score([response.texts[0] for response in run]) for run in self.responses]


class Examiner:
    """Stores the responses under `folder`, in VARIANT-IDENTITY/TASK.jsonl; with `resume` asks only what is missing."""

    def __init__(self, bench: Bench, folder: Path, resume: bool, concurrency: int, console: Console):
        self.bench, self.folder, self.resume = bench, folder, resume
        self.concurrency, self.console = concurrency, console

    def ask(self, sittings: Sequence[Sitting]) -> Iterator[Answers]:
        """Of every variant and sitting, Full first. Servers start when something is to be asked of them."""
        # Stores are opened before the first request: what an earlier run left must not wait for a later --resume.
        plan = [
            (host, [Work(self, variant, sitting) for variant in variants for sitting in sittings])
            for host, variants in self.bench.servers()
        ]
        for host, work in plan:
            if not any(each.missing() for each in work):
                yield from (each.answers() for each in work)
                continue
            seeded = any(sitting.seeded for sitting in sittings)
            with self.bench.serving(host, self.folder / f"{host.id}.log", seeded, self.console) as endpoint:
                for each in work:
                    if each.missing():
                        each.ask(endpoint)
                    yield each.answers()


class Work:
    """One variant's answers to one sitting: those in the store, and those to be asked for."""

    def __init__(self, examiner: Examiner, variant: Variant, sitting: Sitting):
        self.examiner, self.variant, self.sitting = examiner, variant, sitting
        served = examiner.bench.identity(variant)
        self.requests = sitting.requests(served)
        folder = examiner.folder / f"{variant.id}-{digest(served)[:8]}"
        self.store = Store(folder / f"{sitting.task.name}.jsonl", examiner.resume)

    def missing(self) -> list[Request]:
        """Each once: a question may have several gold answers, and then comes as often."""
        every = {request.key: request for run in self.requests for request in run}
        return [request for key, request in every.items() if key not in self.store.found]

    def answers(self) -> Answers:
        found = [[self.store.found[request.key] for request in run] for run in self.requests]
        return Answers(self.variant, self.sitting, found)

    def ask(self, endpoint: Endpoint) -> None:
        """CapreseError where the server fails, or its counters say that the variant is another one."""
        before = endpoint.served()
        proof = Proof(self.variant, before)
        missing, session = self.missing(), uuid4().hex

        async def run() -> None:
            async with Client(endpoint.url, endpoint.model) as client:

                async def one(request: Request) -> None:
                    off = {} if self.variant.method else {"extra_body": OFF}
                    try:
                        reply = await client.answer(request.prompt, chat=request.chat, **request.options, **off)
                        # Counters that are asked for after a response count it, and all before it.
                        expected = proof.expect(reply)
                        tokens, read = proof.check(expected, Served.model_validate(await client.report()))
                    except OpenAIError as error:
                        raise CapreseError(
                            f"{self.variant.label}, {self.sitting.task.title}, problem {request.id}",
                            expected="a response",
                            found=f"{type(error).__name__}: {error}",
                            fix=f"{endpoint.log}; --resume goes on",
                        ) from None
                    self.store.add(
                        Response(
                            id=request.id, identity=request.identity, texts=list(reply.texts),
                            finish=list(reply.finish), tokens=reply.tokens, session=session, sparse_tokens=tokens,
                            ff_weights_read=read,
                        )
                    )  # fmt: skip
                    bar.advance(line)

                await in_turns(self.examiner.concurrency, one, missing)

        with progress(self.examiner.console) as bar:
            told = f"{self.variant.label}, {self.sitting.task.title}"
            total = sum(len(run) for run in self.requests)
            line = bar.add_task(told, total=total, completed=total - len(missing))
            try:
                asyncio.run(run())
            except Unproven:  # which of the responses at that time is not the variant's, counters do not tell
                self.store.discard(session)
                raise
            except KeyboardInterrupt:
                there = total - len(self.missing())
                self.examiner.console.print(f"{there} of {total} responses are in {self.store.path}", soft_wrap=True)
                raise


class Unproven(CapreseError):
    """The server's counters contradict a response."""


class Proof:
    """Holds a variant's responses to the server's counters, from `before` on. CapreseError names what does not fit."""

    def __init__(self, variant: Variant, before: Served):
        self.variant, self.before, self.expected = variant, before, 0
        method = variant.method
        if method is not None:
            wanted = (method.name, method.density, list(method.layers), method.rank)
            found = (before.method, before.density, before.layers, before.rank)
            if wanted != found:
                self._refuse(*("method {}, density {}, layers {}, rank {}".format(*each) for each in (wanted, found)))

    def expect(self, reply: Reply) -> int:
        """Sparse tokens that the server must have counted once this reply is there: the prompt's pass, which is
        dense, makes the first token of each sample."""
        self.expected += reply.tokens - len(reply.texts) if self.variant.method else 0
        return self.expected

    def check(self, expected: int, now: Served) -> tuple[int, float | None]:
        """The sparse tokens since `before`, and the share of FF weights that they needed."""
        counted = now.generated_tokens - self.before.generated_tokens
        if self.variant.method is None:
            if counted:
                self._refuse("no token generated by sparse FF blocks", f"{counted}")
            return 0, None
        if counted < expected:
            self._refuse(f"{expected} tokens generated by sparse FF blocks", f"{counted}")
        return counted, now.share_since(self.before) if counted else None

    def _refuse(self, expected: str, found: str) -> None:
        fix = "let no other client use the server meanwhile; if none did, report this bug"
        raise Unproven(f"variant {self.variant.id}", expected=expected, found=found, fix=fix)
