"""What a request says in `vllm_xargs`, `caprese` and `caprese_reselect`, checked before any endpoint sees the request.

vLLM checks sampling parameters when a request enters the engine: a streamed response has begun by then, and beam search
makes parameters of its own. So the server reads them in the request's body: one place for all endpoints, those of
other plugins included.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from typing import Any, NoReturn

from fastapi.responses import JSONResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMValidationError

from caprese_kernels.errors import CapreseError, quote

from .settings import KEY, RESELECT, EngineSettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def check_switches(switches: Mapping[str, Any], settings: EngineSettings | None, beam_search: bool = False) -> None:
    """Raise VLLMValidationError, which the server answers with HTTP 400, for what the engine cannot do.

    `caprese` is "off"; `caprese_reselect` an interval, or 0. With beam search, whose requests to the engine carry
    neither, any value is wrong. `settings` None: of an engine that is not known.
    """
    without = "no such key with beam search"
    if KEY in switches and (beam_search or switches[KEY] != "off"):
        expected = without if beam_search else "'off', or no such key"
        _refuse(KEY, expected, switches[KEY], "leave it out to run the request sparse")
    if RESELECT not in switches:
        return
    value = switches[RESELECT]
    if beam_search:
        _refuse(RESELECT, without, value, "leave it out")
    if type(value) is not int or value < 0:
        _refuse(RESELECT, "a whole number of tokens, or 0 for no reselection", value, "correct it, or leave it out")
    if value and KEY in switches:
        _refuse(
            RESELECT, f"no such key beside {KEY!r}: a dense request selects nothing", value, "leave one of them out"
        )
    if value and settings is not None and settings.reselect_interval is None:
        fix = """start the server with --caprese-config '{"reselect_interval": 0}'"""
        _refuse(RESELECT, "0, or no such key: this server keeps no statistics", value, fix)


def _refuse(key: str, expected: str, value: Any, fix: str) -> NoReturn:
    error = CapreseError(f'vllm_xargs["{key}"]', expected=expected, found=quote(value), fix=fix)
    raise VLLMValidationError(str(error), parameter="vllm_xargs", value=quote(value))


class SwitchMiddleware:
    """ASGI middleware that answers HTTP 400 to a POST whose JSON body has a wrong switch or interval."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        messages, body = await _read_body(receive)
        try:
            _check_body(body, getattr(scope["app"].state, "caprese_settings", None))
        except VLLMValidationError as error:
            content = create_error_response(error).model_dump()
            return await JSONResponse(content, status_code=400)(scope, receive, send)
        replayed = iter(messages)

        async def replay() -> Message:
            message = next(replayed, None)
            return await receive() if message is None else message

        return await self.app(scope, replay, send)


async def _read_body(receive: Receive) -> tuple[list[Message], bytes]:
    """All messages up to the body's end, or the client's, and the body."""
    messages: list[Message] = []
    while True:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request" or not message.get("more_body", False):
            return messages, b"".join(each.get("body", b"") for each in messages)


def _check_body(body: bytes, settings: EngineSettings | None) -> None:
    # Nearly all requests. An escape could spell the key, and in UTF-16 and UTF-32 zeros stand between its letters.
    if not any(part in body for part in (KEY.encode(), b"\\u", b"\0")):
        return
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return  # vLLM reports what is no JSON
    for part in request if isinstance(request, list) else [request]:
        if isinstance(part, dict):
            for switches in _extra_arguments(part):
                check_switches(switches, settings, bool(part.get("use_beam_search")))


def _extra_arguments(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What becomes `SamplingParams.extra_args`: `vllm_xargs`, or that itself where tokens go in and out."""
    params = request.get("sampling_params")
    for found in (request.get("vllm_xargs"), params.get("extra_args") if isinstance(params, dict) else None):
        if isinstance(found, dict):
            yield found
