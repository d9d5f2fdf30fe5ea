"""Collects every variant's responses, each once, from servers that run only while they are needed.

A response is stored only after the server's own counters have shown how it was generated (counters.py). The first
mismatch ends the benchmark, and no response of its session is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import uuid4

from openai import OpenAIError

from caprese_kernels import terminal
from caprese_kernels.errors import CapreseError
from caprese_serve.client import Client, in_turns
from caprese_serve.demo.results import Served

from ..results.recording import progress
from .counters import CounterCheck, CounterMismatch
from .runs import Answers, EvaluationRun, Request
from .store import Response, Store, digest
from .variants import OFF, Endpoint, ServedModel, ServedVariant


class ResponseCollector:
    """Stores responses in `folder`/VARIANT-IDENTITY/TASK.jsonl; with `resume` it requests only missing ones."""

    def __init__(self, model: ServedModel, folder: Path, resume: bool, concurrency: int):
        self.model, self.folder, self.resume, self.concurrency = model, folder, resume, concurrency

    def collect(self, runs: Sequence[EvaluationRun]) -> Iterator[Answers]:
        """The answers of every variant in every run, Full first. A server starts when a response is missing."""
        # All stores are opened before the first request, so that without --resume every older file is set aside now:
        # a later --resume must not find responses of an older run.
        parts_by_server = [
            (host, [VariantRun(self, variant, run) for variant in variants for run in runs])
            for host, variants in self.model.servers()
        ]
        for host, parts in parts_by_server:
            if not any(part.missing() for part in parts):
                yield from (part.answers() for part in parts)
                continue
            seeded = any(run.seeded for run in runs)
            with self.model.serving(host, self.folder / f"{host.id}.log", seeded) as endpoint:
                for part in parts:
                    if part.missing():
                        part.request_missing(endpoint)
                    yield part.answers()


class VariantRun:
    """One variant in one evaluation run: the responses that are stored, and those that are missing."""

    def __init__(self, collector: ResponseCollector, variant: ServedVariant, run: EvaluationRun):
        self.collector, self.variant, self.run = collector, variant, run
        served = collector.model.identity(variant)
        self.requests = run.requests(served)
        folder = collector.folder / f"{variant.id}-{digest(served)[:8]}"
        self.store = Store(folder / f"{run.task.name}.jsonl", collector.resume)

    @property
    def title(self) -> str:
        """The variant and the task, for progress and messages."""
        return f"{self.variant.label}, {self.run.task.title}"

    def missing(self) -> list[Request]:
        """The requests without a response, each once: a question with several gold answers occurs several times."""
        every = {request.key: request for repeat in self.requests for request in repeat}
        return [request for key, request in every.items() if key not in self.store.found]

    def answers(self) -> Answers:
        """All responses, which must be in the store."""
        found = [[self.store.found[request.key] for request in repeat] for repeat in self.requests]
        return Answers(self.variant, self.run, found)

    def request_missing(self, endpoint: Endpoint) -> None:
        """Request and store what is missing. Raises CapreseError if the server fails or its counters do not fit."""
        check = CounterCheck(self.variant, endpoint.served())
        missing, session = self.missing(), uuid4().hex
        total = sum(len(repeat) for repeat in self.requests)

        async def request_all() -> None:
            async with Client(endpoint.url, endpoint.model, endpoint.api_key) as client:

                async def one(request: Request) -> None:
                    self.store.add(await self._respond(client, request, check, session, endpoint.log))
                    bar.advance(line)

                await in_turns(self.collector.concurrency, one, missing)

        with progress() as bar:
            line = bar.add_task(self.title, total=total, completed=total - len(missing))
            try:
                asyncio.run(request_all())
            except CounterMismatch:  # counters do not show which of the concurrent responses is wrong
                self.store.discard(session)
                raise
            except KeyboardInterrupt:
                stored = total - len(self.missing())
                terminal.notes().print(f"{stored} of {total} responses are in {self.store.path}", soft_wrap=True)
                raise

    async def _respond(self, client: Client, request: Request, check: CounterCheck, session: str, log: str) -> Response:
        """The response to one request, after checking the counters."""
        off = {} if self.variant.method else {"extra_body": OFF}
        try:
            reply = await client.answer(request.prompt, chat=request.chat, **request.options, **off)
            # Counters that are requested after a response include it and all earlier ones.
            expected = check.expect(reply)
            tokens, read = check.check(expected, Served.model_validate(await client.report()))
        except OpenAIError as error:
            raise CapreseError(
                f"{self.title}, problem {request.id}",
                expected="a response",
                found=f"{type(error).__name__}: {error}",
                fix=f"{log}; --resume continues",
            ) from None
        return Response(
            id=request.id,
            identity=request.identity,
            texts=list(reply.texts),
            finish=list(reply.finish),
            tokens=reply.tokens,
            session=session,
            sparse_tokens=tokens,
            ff_weights_read=read,
        )
