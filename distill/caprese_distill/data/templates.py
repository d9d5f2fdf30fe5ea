"""Chat templates: where they are, and messages in the form in which vLLM's server gives them to a template."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from caprese_kernels.errors import CapreseError

from .messages import Message, part_text, plain_text

_PROBE = "caprese probe"


def load_template(given: str) -> str:
    """`--chat-template`, as for `vllm serve`: a file, or the template itself. CapreseError for a file that is not."""
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if any(character in given for character in "{}\n"):
            return given
        found = getattr(error, "strerror", None) or str(error)
    raise CapreseError(
        "--chat-template",
        expected="a readable file, or a template",
        found=f"{given!r} ({found})",
        fix="correct the path",
    )


def stop_ids(model: str, config: Any) -> list[int]:
    """The ids at which vLLM ends a response of this model, beside the tokenizer's eos token."""
    from transformers import GenerationConfig

    try:
        own = GenerationConfig.from_pretrained(model)
    except OSError:  # the model has none
        own = GenerationConfig.from_model_config(config)
    found = own.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


@lru_cache(maxsize=64)
def takes_parts(template: str, apply: Callable[..., Any]) -> bool:
    """Whether the template renders content that is a list of parts. vLLM then gives it all content in that form."""
    probe = [{"role": "user", "content": [{"type": "text", "text": _PROBE}]}]
    try:
        text = apply(probe, chat_template=template, tokenize=False, add_generation_prompt=True)
    except Exception:  # as in ChatRenderer._render
        return False
    return _PROBE in text and not re.search(rf"""['"]{_PROBE}['"]""", text)  # not as the list's own text


def for_template(message: Message, parts: bool) -> Message:
    """The message as vLLM gives it to templates."""
    found = dict(message)
    content = message["content"]
    if not parts or message["role"] == "tool":
        found["content"] = plain_text(content)
    else:
        texts = [content] if isinstance(content, str) else content
        found["content"] = [
            {"type": "text", "text": each if isinstance(each, str) else part_text(each)} for each in texts
        ]
    if "reasoning" in message:
        found["reasoning_content"] = message["reasoning"]  # templates know either name
    return found


def without_developer(messages: list[Message]) -> list[Message]:
    """Developer messages as the system's, all of them in one at the start."""
    if not any(message["role"] == "developer" for message in messages):
        return messages
    systems = [plain_text(m["content"]) for m in messages if m["role"] in ("developer", "system")]
    others = [message for message in messages if message["role"] not in ("developer", "system")]
    return [{"role": "system", "content": "\n\n".join(filter(None, systems))}, *others]
