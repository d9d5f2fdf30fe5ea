"""The switch of a request is checked in front of every endpoint, without an engine; GET /caprese wants the key."""

from __future__ import annotations

import asyncio
import json
import random
from argparse import Namespace
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from caprese_vllm.route import CapreseRoute
from tests.support.hostile import TEXTS, VALUES, damaged, mutated

REPORT = {"enabled": True, "generated_tokens": 0, "statistics_pages": 3, "prompt_mass": [0.0, 0.0]}
MERGED = {**REPORT, "prompt_mass_outside_core": None}


class FakeEngine:
    vllm_config = Namespace(additional_config={})

    async def collective_rpc(self, name: str) -> list[dict[str, Any]]:
        return [REPORT]


def serve(api_key: list[str] | None = None) -> tuple[FastAPI, list[bytes]]:
    """A server with our route whose other endpoints stream back what they got, as long as it gets there."""
    app, reached = FastAPI(), list[bytes]()
    route = CapreseRoute()
    route.attach_router(app)
    asyncio.run(route.init_state(FakeEngine(), app.state, Namespace(api_key=api_key)))

    @app.post("/{path:path}")
    async def echo(path: str, request: Request) -> StreamingResponse:
        reached.append(await request.body())

        async def stream() -> AsyncIterator[bytes]:
            yield b"data: "
            yield reached[-1]

        return StreamingResponse(stream())

    return app, reached


def ask(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/chat/completions/batch")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
def test_a_wrong_switch_is_refused_before_anything_streams(path: str, stream: bool) -> None:
    app, reached = serve()
    for value in ("on", "OFF", "", 0, 1, ["off"], None, 1.5):
        found = ask(app, "POST", path, json={"stream": stream, "vllm_xargs": {"caprese": value}})
        assert found.status_code == 400
        error = found.json()["error"]
        assert error["param"] == "vllm_xargs"
        assert "'off', or no such key" in error["message"]
    assert not reached
    for body in ({"vllm_xargs": {"caprese": "off"}}, {"vllm_xargs": {"other": "on"}}, {"prompt": "caprese"}, {}):
        found = ask(app, "POST", path, json=body)
        assert (found.status_code, json.loads(found.content.removeprefix(b"data: "))) == (200, body)


def test_a_wrong_interval_is_refused() -> None:
    app, reached = serve()
    for value in ("64", -1, 8.0, 1.5, True, [8], None):
        found = ask(app, "POST", PATHS[0], json={"vllm_xargs": {"caprese_reselect": value}})
        assert found.status_code == 400
        assert "a whole number of tokens, or 0 for no reselection" in found.json()["error"]["message"]
    together = {"caprese": "off", "caprese_reselect": 8}
    for body, reason in (
        ({"vllm_xargs": together}, "a dense request selects nothing"),
        ({"use_beam_search": True, "vllm_xargs": {"caprese_reselect": 8}}, "with beam search"),
    ):
        found = ask(app, "POST", PATHS[0], json=body)
        assert (found.status_code, reason in found.json()["error"]["message"]) == (400, True)
    assert not reached
    for right in ({"caprese_reselect": 8}, {"caprese_reselect": 0}, {"caprese": "off", "caprese_reselect": 0}):
        assert ask(app, "POST", PATHS[0], json={"vllm_xargs": right}).status_code == 200


def test_a_server_without_reselection_says_how_to_have_it() -> None:
    app, reached = serve()
    app.state.caprese_settings = Namespace(reselect_interval=None)
    found = ask(app, "POST", PATHS[0], json={"vllm_xargs": {"caprese_reselect": 8}})
    assert found.status_code == 400
    assert '{"reselect_interval": 0}' in found.json()["error"]["message"]
    assert not reached
    assert ask(app, "POST", PATHS[0], json={"vllm_xargs": {"caprese_reselect": 0}}).status_code == 200
    app.state.caprese_settings = Namespace(reselect_interval=0)
    assert ask(app, "POST", PATHS[0], json={"vllm_xargs": {"caprese_reselect": 8}}).status_code == 200


def test_other_ways_to_write_it() -> None:
    app, reached = serve()
    texts = [
        '{"vllm\\u005fxargs": {"\\u0063aprese": "on"}}',
        '{"sampling_params": {"extra_args": {"caprese": "on"}}}',
        '[{"vllm_xargs": {"caprese": "on"}}]',
        '{"use_beam_search": true, "vllm_xargs": {"caprese": "off"}}',
        '{"vllm_xargs": {"caprese": "off", "caprese": "on"}}',
    ]
    for text in texts:
        for encoding in ("utf-8", "utf-16", "utf-16-be", "utf-32-le"):
            found = ask(app, "POST", "/v1/completions", content=text.encode(encoding))
            assert found.status_code == 400, (text, encoding)
    assert not reached


def test_bodies_arrive_as_they_were_sent() -> None:
    """Whatever is no request of ours to judge, broken or not, in one part or many."""
    app, reached = serve()
    rng = random.Random(22)
    good = {"prompt": "caprese", "vllm_xargs": {"caprese": "off"}, "stop": ["a"]}
    bodies = [text.encode(errors="surrogatepass") for text in TEXTS]
    bodies += [damaged(rng, json.dumps(good).encode()) for _ in range(200)]
    bodies += [json.dumps(mutated(rng, good)).encode() for _ in range(200)]
    bodies += [json.dumps({"vllm_xargs": value}).encode() for value in VALUES]
    refused = 0
    for body in bodies:

        async def parts(body: bytes = body) -> AsyncIterator[bytes]:
            for begin in range(0, len(body), 40_000):
                yield body[begin : begin + 40_000]

        before = len(reached)
        found = ask(app, "POST", "/v1/completions", content=parts())
        if found.status_code == 400:
            refused += 1
            assert len(reached) == before
            assert found.json()["error"]["message"].isprintable()
        else:
            assert reached[before:] == [body]
    assert 5 < refused < len(bodies) / 2


@pytest.mark.parametrize("from_environment", [True, False])
def test_the_report_wants_the_key_of_the_server(monkeypatch: pytest.MonkeyPatch, from_environment: bool) -> None:
    if from_environment:
        monkeypatch.setenv("VLLM_API_KEY", "secret")
    else:
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
    app, _ = serve(None if from_environment else ["other", "secret"])
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "secret"},
        {"Authorization": "Basic secret"},
    ):
        assert ask(app, "GET", "/caprese", headers=headers).status_code == 401
    found = ask(app, "GET", "/caprese", headers={"Authorization": "Bearer secret"})
    assert (found.status_code, found.json()) == (200, MERGED)


def test_without_a_key_the_report_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    app, _ = serve()
    assert ask(app, "GET", "/caprese").json() == MERGED
