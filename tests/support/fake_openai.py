"""A stand-in for a Caprese server: an OpenAI endpoint with GET /caprese, in a thread of this process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse

# What the demo's GRIFFIN adapter is served as.
SERVED = {"method": "griffin", "density": 0.5, "rank": 48, "layers": [0, 1], "kernel": "cpu"}


@dataclass
class FakeServer:
    """Answers `answer(prompt, sample)`, where each word is a token, and counts sparse tokens.

    `counts(tokens, off)` is what it adds to its counter for a request of that many sparse tokens, `off` if the request
    turns Caprese off; the default is what a Caprese server counts. Prompts for which `fails` is true get status 500.
    """

    answer: Callable[[str, int], str]
    counts: Callable[[int, bool], int] = lambda tokens, off: 0 if off else tokens
    fails: Callable[[str], bool] = lambda prompt: False
    delay: float = 0.0
    served: dict[str, Any] = field(default_factory=lambda: dict(SERVED))
    requests: list[dict[str, Any]] = field(default_factory=list)
    counted: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        def models() -> dict[str, Any]:
            return {"data": [{"id": "fake", "root": "tests/fake"}]}

        @app.get("/caprese")
        def report() -> dict[str, Any]:
            read = 0.75 if self.counted else None
            return self.served | {"generated_tokens": self.counted, "ff_weights_read": read}

        @app.post("/v1/chat/completions")
        def chat(body: dict[str, Any]) -> Any:
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

    def asked(self, off: bool) -> list[dict[str, Any]]:
        """The requests that turned Caprese off, or the others."""
        return [each for each in self.requests if (each.get("vllm_xargs") == {"caprese": "off"}) is off]


@contextmanager
def running(fake: FakeServer) -> Iterator[FakeServer]:
    """Serves until the block ends; `fake.url` is its address."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        fake.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(fake.app(), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield fake
        finally:
            server.should_exit = True
            thread.join()
