"""Where a server answers, and the key that it asks for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

NO_KEY = "none"  # what the openai client sends where no key is asked for


def server_url(given: str) -> str:
    """The server's address from its own or its API's, with or without /v1: "http://localhost:8000"."""
    url = given.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    return url if "://" in url else f"http://{url}"


def client_key(given: str | None = None) -> str:
    """The key to send: the given one, OPENAI_API_KEY, or VLLM_API_KEY; "none" without."""
    return given or os.environ.get("OPENAI_API_KEY") or os.environ.get("VLLM_API_KEY") or NO_KEY


def served_key(flags: Sequence[str], env: Mapping[str, str]) -> str:
    """The key that `vllm serve` with these flags and this environment asks for; "none" without."""
    key = env.get("VLLM_API_KEY") or NO_KEY
    for i, flag in enumerate(flags):
        name, _, value = flag.partition("=")
        if name.replace("_", "-") == "--api-key":  # vLLM takes both, and the last one
            key = value or (flags[i + 1] if i + 1 < len(flags) else NO_KEY)
    return key


def authorization(key: str) -> dict[str, str]:
    """The HTTP header with the key."""
    return {"Authorization": f"Bearer {key}"}
