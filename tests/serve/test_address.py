"""Servers that ask for a key, by addresses with and without /v1."""

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from caprese_kernels.errors import CapreseError
from caprese_serve.address import client_key, served_key, server_url
from caprese_serve.client import Client
from caprese_serve.server import VllmServer, get_json
from tests.support.fake_openai import FakeServer, running

KEYS = ("OPENAI_API_KEY", "VLLM_API_KEY")


class Guarded(FakeServer):
    """Asks for the key "right", on every path."""

    def app(self) -> FastAPI:
        app = super().app()

        @app.middleware("http")
        async def check(request: Request, following: Any) -> Any:
            if request.headers.get("Authorization") != "Bearer right":
                return JSONResponse({"error": "Unauthorized"}, 401)
            return await following(request)

        return app


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "given", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", "h:1", "h:1/v1", " http://h:1/v1 "]
)
def test_addresses(given: str) -> None:
    assert server_url(given) == "http://h:1"
    assert server_url("https://h/proxy/v1") == "https://h/proxy"


def test_whose_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert client_key() == "none"
    monkeypatch.setenv("VLLM_API_KEY", "v")
    assert client_key() == "v"
    monkeypatch.setenv("OPENAI_API_KEY", "o")
    assert client_key() == "o"
    assert client_key("g") == "g"
    assert served_key([], {}) == "none"
    assert served_key(["--x"], {"VLLM_API_KEY": "v", "OPENAI_API_KEY": "o"}) == "v"
    assert served_key(["--api-key", "a"], {"VLLM_API_KEY": "v"}) == served_key(["--api-key=a"], {}) == "a"
    assert served_key(["--api-key", "b", "--api_key", "a"], {}) == served_key(["--api_key=a"], {}) == "a"


def ask(url: str, key: str | None = None) -> Any:
    async def one() -> Any:
        async with Client(url, "fake", key) as client:
            reply = await client.answer("a b", max_tokens=5)
            return reply, await client.report()

    return asyncio.run(one())


@pytest.mark.parametrize("variable", [None, *KEYS])
@pytest.mark.parametrize("path", ["", "/", "/v1"])
def test_a_guarded_server_answers(monkeypatch: pytest.MonkeyPatch, variable: str | None, path: str) -> None:
    with running(Guarded(lambda prompt, sample: prompt)) as server:
        if variable:
            monkeypatch.setenv(variable, "right")
        key = None if variable else "right"
        reply, report = ask(server.url + path, key)
        assert reply.texts == ("a b",)
        assert report == get_json(server.url + path, "/caprese", "", key)


def test_without_the_key_the_error_says_so() -> None:
    with (
        running(Guarded(lambda prompt, sample: prompt)) as server,
        pytest.raises(CapreseError, match="found 401 Unauthorized; give --api-key, or set OPENAI_API_KEY"),
    ):
        get_json(server.url, "/caprese", "start it")


def test_a_server_started_here_is_asked_with_its_own_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "v")
    monkeypatch.setenv("OPENAI_API_KEY", "o")
    assert VllmServer("m", log=tmp_path / "log", command=("x",)).api_key == "v"
    assert VllmServer("m", "--api-key", "f", log=tmp_path / "log", command=("x",)).api_key == "f"
