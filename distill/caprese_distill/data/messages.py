"""Chat messages as data sets write them, in the form in which vLLM's chat completions take them.

A message has `role` and `content` (text, or a list of parts), and where the data has them `reasoning` (text),
`tool_calls` (arguments as objects), `tool_call_id` and `name`. Other keys are not the server's, and are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .bad_rows import BadRow

Message = dict[str, Any]
Prompt = str | list[Message]

REASONING = ("reasoning", "reasoning_content", "thinking")  # the first that has text is used
# What opens and closes a model's reasoning.
REASONING_MARKS = (
    ("<think>", "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
)
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
}
_KEPT = ("name", "tool_call_id", "task")


def is_conversation(value: Any) -> bool:
    """Whether a column's value is a list of messages, perhaps as JSON text; or of two or more texts in turns."""
    value = parse_list(value)
    if not isinstance(value, list) or not value:
        return False
    return is_messages(value) or (len(value) > 1 and all(isinstance(each, str) for each in value))


def ends_with_assistant(value: Any) -> bool:
    """Whether the last message is the assistant's, that is a response."""
    value = parse_list(value)
    if not is_conversation(value):
        return False
    last = value[-1]
    return len(value) % 2 == 0 if isinstance(last, str) else _role(last) == "assistant"


def is_messages(value: Any) -> bool:
    """Whether the value is a list of messages."""
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def parse_list(value: Any) -> Any:
    """JSON text of a list of messages as the list; any other value as it is: text may happen to be JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if is_messages(found) else value
    return value


def parse_messages(column: str, value: Any) -> list[Message]:
    """The messages of a conversation. BadRow for what is not one, and for content other than text."""
    value = parse_list(value)
    if value and all(isinstance(each, str) for each in value) and len(value) > 1:
        return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(value)]
    return [_message(column, message) for message in value]


def plain_text(content: Any) -> str:
    """The text of a message's content."""
    if isinstance(content, str):
        return content
    return "\n".join(part if isinstance(part, str) else part_text(part) for part in content or [])


def part_text(part: Mapping[str, Any]) -> str:
    """The text of a part of content."""
    return str(part.get(TEXT_PARTS.get(part.get("type", "text"), "text")) or "")


def has_reasoning(content: str, reasoning: str) -> bool:
    """Whether the reasoning stands between marks in the content, too: a template would render both."""
    return any(mark in content and reasoning.strip() in content.partition(mark)[0] for _, mark in REASONING_MARKS)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role", value.get("from")), str)


def _role(message: Mapping[str, Any]) -> str:
    role = str(message.get("role", message.get("from")))
    if role == "function_call":
        return "assistant"
    return _ROLES.get(role.lower(), role.lower())


def _message(column: str, message: Any) -> Message:
    if not _is_message(message):
        raise BadRow(f"a list of chat messages in {column!r}", f"{message!r:.60}", "give another column")
    role, calls = _role(message), message.get("tool_calls")
    content = message.get("content", message.get("value"))
    if message.get("role", message.get("from")) == "function_call":  # as ShareGPT has it: the call is the text
        calls, content = content, ""
    elif calls is None and message.get("function_call") is not None:
        calls = [message["function_call"]]
    found: Message = {"role": role, "content": _content(column, content)}
    found |= {key: message[key] for key in _KEPT if isinstance(message.get(key), str)}
    if role == "assistant":
        if calls:
            found["tool_calls"] = _tool_calls(column, calls)
        reasoning = next((v for key in REASONING if isinstance(v := message.get(key), str) and v), None)
        if reasoning is not None and not has_reasoning(plain_text(found["content"]), reasoning):
            found["reasoning"] = reasoning
    if role == "developer" and message.get("tools"):
        found["tools"] = message["tools"]
    return found


def _content(column: str, content: Any) -> Any:
    """Text, or a list of parts of text; no part for none."""
    if content is None:
        return []
    if isinstance(content, list):
        for part in content:
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            if not isinstance(part, (str, dict)) or kind not in TEXT_PARTS:
                raise BadRow(f"text in '{column}.content'", f"a part {part!r:.60}")
        return content
    if not isinstance(content, str):
        raise BadRow(f"text in '{column}.content'", f"{type(content).__name__} {content!r:.60}", "give another column")
    return content


def _tool_calls(column: str, calls: Any) -> list[dict[str, Any]]:
    """Calls in the order of keys that vLLM gives templates, arguments as objects (vLLM parses their text too)."""
    found = []
    for call in _as_list(calls):
        call = _parsed(call)
        function = _function("tool calls", column, call)
        arguments = _parsed(function.get("arguments", function.get("parameters")) or {})
        if not isinstance(arguments, dict):
            raise BadRow(f"a tool call's arguments as an object in {column!r}", f"{arguments!r:.60}")
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append(identity | {"function": {"arguments": arguments, "name": function["name"]}, "type": "function"})
    return found


def parse_tools(column: str, value: Any) -> list[dict[str, Any]] | None:
    """Tools in the form, and the order of keys, in which vLLM gives them to templates; None for none."""
    found = []
    for tool in _as_list(value):
        tool = _parsed(tool)
        function = _function("tools", column, tool)
        known = {key: function.get(key) for key in ("name", "description", "parameters")}
        if function.get("strict") is not None:
            known["strict"] = function["strict"]
        found.append({"type": "function", "function": known})
    return found or None


def parse_object(column: str, value: Any) -> dict[str, Any]:
    """An object, perhaps as JSON text; empty for none. BadRow for what is not one."""
    found = _parsed(value) if value is not None and value != "" else {}
    if not isinstance(found, dict):
        raise BadRow(f"an object in {column!r}", f"{type(found).__name__} {found!r:.60}")
    return found


def _function(kind: str, column: str, value: Any) -> dict[str, Any]:
    """The function that a call or a tool has, or is."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"{kind} with a function's name in {column!r}", f"{value!r:.60}")
    return function


def _as_list(value: Any) -> list[Any]:
    value = _parsed(value)
    return value if isinstance(value, list) else [] if value is None or value == "" else [value]


def _parsed(value: Any) -> Any:
    """JSON text as its value; any other text as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
