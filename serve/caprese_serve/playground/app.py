"""The playground's web application: one page, and three paths below it that ask the model's server.

Everything is below a secret path, which only the printed address has: so no other page in the browser, and no other
user of this machine, can ask through it. The server's API key stays in this process.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..address import authorization

PAGE = Path(__file__).with_name("page.html")
MAX_BODY = 1 << 20  # bytes of a request
MAX_ANSWER = 1 << 22  # bytes of an answer that is not streamed
TIMEOUTS = httpx.Timeout(30.0, read=None)  # seconds; a long answer in a full batch can take over an hour


class Playground:
    """Serves the page for the model server at `url`, without /v1.

    secret: the first part of every path. examples: problems that the page offers; none: its own.
    """

    def __init__(self, url: str, api_key: str, secret: str, examples: Sequence[str] = ()) -> None:
        self.url, self.examples = url, list(examples)
        self.page = PAGE.read_text()
        # No proxies: the server is local, or the user's own.
        self.client = httpx.AsyncClient(
            base_url=url, headers=authorization(api_key), timeout=TIMEOUTS, trust_env=False, follow_redirects=False
        )
        routes = [
            Route(f"/{secret}/", self._page),
            Route(f"/{secret}/about", self._about),
            Route(f"/{secret}/chat", self._chat, methods=["POST"]),
            Route(f"/{secret}/selections/{{name}}", self._selection),
        ]
        self.app = Starlette(routes=routes, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        async with self.client:
            yield

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(self.page, headers=_page_headers(self.page))

    async def _about(self, request: Request) -> Response:
        """What the server serves: its first model, GET /caprese (null without Caprese), examples."""
        models = await self._get("/v1/models")
        if models.status_code != 200:
            return models
        first = json.loads(bytes(models.body))["data"][0]
        report = await self._get("/caprese")
        return JSONResponse(
            {
                "url": self.url,
                "model": first["id"],
                "max_tokens": first.get("max_model_len"),
                "caprese": json.loads(bytes(report.body)) if report.status_code == 200 else None,
                "examples": self.examples,
            }
        )

    async def _chat(self, request: Request) -> Response:
        """POST /v1/chat/completions, streamed. The request to the server ends when the page's does."""
        if int(request.headers.get("content-length") or MAX_BODY + 1) > MAX_BODY:
            return _problem(413, f"A request may have {MAX_BODY} bytes")
        asked = self.client.build_request(
            "POST", "/v1/chat/completions", content=await request.body(), headers={"Content-Type": "application/json"}
        )
        try:
            answer = await self.client.send(asked, stream=True)
        except httpx.HTTPError as error:
            return self._unreachable(error)

        async def pieces() -> AsyncIterator[bytes]:
            try:
                async for piece in answer.aiter_bytes():
                    yield piece
            except httpx.HTTPError as error:  # the server ended in the middle
                yield f"data: {json.dumps({'error': {'message': f'{self.url}: {error!r}'}})}\n\n".encode()
            finally:
                await answer.aclose()

        kind = "text/event-stream" if answer.status_code == 200 else "application/json"
        return StreamingResponse(pieces(), answer.status_code, media_type=kind, headers=_HEADERS)

    async def _selection(self, request: Request) -> Response:
        return await self._get(f"/caprese/selections/{quote(request.path_params['name'], safe='')}")

    async def _get(self, path: str) -> Response:
        """The server's JSON at `path`, or its error, with its status."""
        try:
            found = await self.client.get(path, timeout=30)
        except httpx.HTTPError as error:
            return self._unreachable(error)
        if found.status_code == 401:
            return _problem(401, f"{self.url} wants an API key: give --api-key, or set OPENAI_API_KEY")
        try:
            value: Any = json.loads(found.content[:MAX_ANSWER])
        except ValueError:
            return _problem(502, f"{self.url}{path}: status {found.status_code}, and no JSON")
        return JSONResponse(value, found.status_code, headers=_HEADERS)

    def _unreachable(self, error: httpx.HTTPError) -> Response:
        return _problem(502, f"{self.url} does not answer: {type(error).__name__} {error}")


_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}


def _page_headers(page: str) -> dict[str, str]:
    """Only the page's own script and style run, and it talks to this server alone."""
    allowed = {}
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        allowed[tag] = "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
    policy = f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self'; "
    policy += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return {**_HEADERS, "Content-Security-Policy": policy}


def _problem(status: int, message: str) -> Response:
    return JSONResponse({"message": message}, status, headers=_HEADERS)
