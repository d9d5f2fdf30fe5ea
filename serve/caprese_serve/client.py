"""An asynchronous client of one served model: the `openai` client, and the server's report at /caprese."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from .address import client_key, server_url

Item = TypeVar("Item")
# Seconds to connect, to read, to write, to get a connection. A long response in a full batch can take over an hour.
TIMEOUTS = (30.0, None, None, None)


@dataclass(frozen=True)
class Reply:
    """The samples of one request: texts, finish reasons, and the number of generated tokens of all samples."""

    texts: tuple[str, ...]
    finish: tuple[str, ...]
    tokens: int


class Client:
    """A client of the model `model` at the server `url`, with or without /v1; an async context manager.

    api_key: by default OPENAI_API_KEY or VLLM_API_KEY.
    """

    def __init__(self, url: str, model: str, api_key: str | None = None) -> None:
        self.url, self.model = server_url(url), model
        http = DefaultAsyncHttpxClient(trust_env=False, timeout=TIMEOUTS)  # no proxies: the server is local
        self.openai = AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=client_key(api_key), max_retries=0, http_client=http
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.openai.close()

    async def answer(self, prompt: str, *, chat: bool = True, **options: Any) -> Reply:
        """Send `prompt` as a chat of one message, or without `chat` as text to complete. Raises openai.OpenAIError."""
        create: Any  # the two methods have different types but take the same arguments here
        if chat:
            create, options["messages"] = self.openai.chat.completions.create, [{"role": "user", "content": prompt}]
        else:
            create, options["prompt"] = self.openai.completions.create, prompt
        reply = await create(model=self.model, **options)
        texts = tuple((each.message.content if chat else each.text) or "" for each in reply.choices)
        finish = tuple(each.finish_reason or "" for each in reply.choices)
        return Reply(texts, finish, reply.usage.completion_tokens)

    async def report(self) -> dict[str, Any]:
        """The JSON at /caprese. Raises openai.OpenAIError."""
        report: Any = await self.openai.get(f"{self.url}/caprese", cast_to=object)
        return report


async def in_turns(concurrency: int, work: Callable[[Item], Awaitable[object]], items: Iterable[Item]) -> None:
    """Run `work` on every item, `concurrency` at a time. The first exception cancels the others and is raised."""
    turn = asyncio.Semaphore(concurrency)

    async def one(item: Item) -> None:
        async with turn:
            await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for item in items:
                group.create_task(one(item))
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
