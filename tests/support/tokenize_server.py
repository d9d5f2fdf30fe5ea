"""vLLM's own `/tokenize` for any model directory, without an engine: the app of `vllm launch render`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient


def tokenize_client(model: Path) -> TestClient:
    """A client of vLLM's server for the tokenizer in `model`, which takes a chat template with every request."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.launchers.render.app_state import init_render_app_state
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    words = ["--model", str(model), "--served-model-name", "m", "--trust-request-chat-template", "--enforce-eager"]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    app = build_app(args, ("render",))
    asyncio.run(init_render_app_state(AsyncEngineArgs.from_cli_args(args).create_engine_config(), app.state, args))
    return TestClient(app, raise_server_exceptions=False)


def tokenize(client: TestClient, template: str | None, messages: Any, **options: Any) -> list[int]:
    """The prompt's ids, as the server feeds them to the model. AssertionError with its answer if it refuses."""
    body = {"model": "m", "messages": messages, "chat_template": template, **options}
    answer = client.post("/tokenize", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["tokens"]
