"""A stand-in for a Caprese server: an OpenAI endpoint with GET /caprese, in a thread of this process.

It streams chats, and shows the selection of one request.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

# What the demo's GRIFFIN adapter is served as.
SERVED = {"method": "griffin", "density": 0.5, "rank": 48, "layers": [0, 1], "kernel": "cpu"}


@dataclass
class FakeServer:
    """Answers `answer(prompt, sample)`, where each word is a token, and counts sparse tokens.

    `counts(tokens, off)` is what it adds to its counter for a request of that many sparse tokens, `off` if the request
    turns Caprese off; the default is what a Caprese server counts. Prompts for which `fails` is true get status 500.
    A streamed answer has a word a chunk, `delay` seconds apart; `selection` is that of every request which streams
    sparse; with a `key`, /v1 and /caprese want it.
    """

    answer: Callable[[str, int], str]
    counts: Callable[[int, bool], int] = lambda tokens, off: 0 if off else tokens
    fails: Callable[[str], bool] = lambda prompt: False
    delay: float = 0.0
    served: dict[str, Any] = field(default_factory=lambda: dict(SERVED))
    selection: dict[str, Any] | None = None
    key: str | None = None
    streaming: int = 0  # answers that have begun and not ended
    requests: list[dict[str, Any]] = field(default_factory=list)
    counted: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def authorize(request: Request, call_next: Callable[[Request], Any]) -> Any:
            if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
                return JSONResponse({"error": "Unauthorized"}, 401)
            return await call_next(request)

        @app.get("/caprese/selections/{name}")
        def selection(name: str) -> Any:
            known = self.selection is not None and name == f"chatcmpl-{len(self.requests)}"
            return self.selection if known else JSONResponse({"detail": "No selection of such a request"}, 404)

        @app.get("/v1/models")
        def models() -> dict[str, Any]:
            return {"data": [{"id": "fake", "root": "tests/fake"}]}

        @app.get("/caprese")
        def report() -> dict[str, Any]:
            read = 0.75 if self.counted else None
            return self.served | {"generated_tokens": self.counted, "ff_weights_read": read}

        @app.post("/v1/chat/completions")
        def chat(body: dict[str, Any]) -> Any:
            if body.get("stream"):
                return self.stream(body, body["messages"][0]["content"])
            return self.complete(body, body["messages"][0]["content"], True)

        @app.post("/v1/completions")
        def completions(body: dict[str, Any]) -> Any:
            return self.complete(body, body["prompt"], False)

        return app

    def complete(self, body: dict[str, Any], prompt: str, chat: bool) -> Any:
        self.requests.append(body | {"prompt": prompt})
        time.sleep(self.delay)
        if self.fails(prompt):
            return JSONResponse({"error": {"message": "out of luck"}}, 500)
        texts = [self.answer(prompt, sample) for sample in range(body.get("n", 1))]
        tokens = [min(len(text.split()), body["max_tokens"]) for text in texts]
        with self.lock:  # each request has a thread
            self.counted += sum(self.counts(count - 1, "vllm_xargs" in body) for count in tokens)
        choices = [
            {
                "index": index,
                "finish_reason": "length" if tokens[index] == body["max_tokens"] else "stop",
                **({"message": {"role": "assistant", "content": text}} if chat else {"text": text}),
            }
            for index, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": 1, "completion_tokens": sum(tokens), "total_tokens": sum(tokens) + 1}
        return {"id": "1", "object": "x", "created": 0, "model": "fake", "choices": choices, "usage": usage}

    def stream(self, body: dict[str, Any], prompt: str) -> Any:
        """Words as server-sent events, each with the number of tokens so far."""
        with self.lock:
            self.requests.append(body | {"prompt": prompt})
            chunk = {"id": f"chatcmpl-{len(self.requests)}", "model": "fake"}
        if self.fails(prompt):
            return JSONResponse({"error": {"message": "out of luck"}}, 500)
        words = self.answer(prompt, 0).split(" ")

        def events() -> Iterator[str]:
            self.streaming += 1
            try:
                for count, word in enumerate(words, start=1):
                    time.sleep(self.delay)
                    delta = {"content": word if count == 1 else f" {word}"}
                    end = "stop" if count == len(words) else None
                    yield _event(
                        chunk
                        | {"choices": [{"index": 0, "delta": delta, "finish_reason": end}]}
                        | {"usage": {"completion_tokens": count}}
                    )
                self.counted += self.counts(len(words) - 1, "vllm_xargs" in body)
                yield "data: [DONE]\n\n"
            finally:
                self.streaming -= 1

        return StreamingResponse(events(), media_type="text/event-stream")

    def asked(self, off: bool) -> list[dict[str, Any]]:
        """The requests that turned Caprese off, or the others."""
        return [each for each in self.requests if (each.get("vllm_xargs") == {"caprese": "off"}) is off]


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


@contextmanager
def running(fake: FakeServer) -> Iterator[FakeServer]:
    """Serves until the block ends; `fake.url` is its address."""
    with serving(fake.app) as fake.url:
        yield fake


@contextmanager
def serving(app: Callable[[], Any]) -> Iterator[str]:
    """The address at which an ASGI application is served by a thread, until the block ends."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app(), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
