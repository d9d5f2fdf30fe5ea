"""Conversations and chat templates as people have them, and the data files of a shared folder where it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).parents[3] / "shared" / "cases"  # beside the checkout

USER: dict[str, Any] = {"role": "user", "content": "How many are 2 and 3?"}
THOUGHT, ANSWER = "First 2. Then 3. Together 5. ", "There are 2 + 3 = 5.\n#### 5"
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
TEMPLATES = {
    "plain": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}"
    "{{ eos_token }}{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    # Opens the reasoning itself, and drops it from all answers.
    "opens": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
    "{{ m.content.split('</think>')[-1].lstrip('\\n') }}{{ eos_token }}{% else %}<|user|>{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
    # Renders the reasoning of the last answer, tools and calls; enable_thinking can close the reasoning.
    "reasons": "{{ bos_token }}{% if tools %}<|user|>{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% set content = m.content %}"
    "{% set thought = m.reasoning_content or '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.last %}<think>\n{{ thought.strip('\\n') }}\n</think>\n\n{% endif %}{{ content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }} {{ c.function.arguments | tojson }}"
    "</tool_call>{% endfor %}{{ eos_token }}\n{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}",
    # Takes content as parts alone, as templates of models that see do.
    "parts": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% else %}<|user|>"
    "{% endif %}{% for part in m.content %}{{ part.text | trim }};{% endfor %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "dated": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ m.content }}"
    "{{ eos_token }}{% else %}<|user|>{{ strftime_now('%d %b %Y') }}. {{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
}


def call(arguments: Any) -> dict[str, Any]:
    """The assistant's message with one call of TOOL."""
    function = {"name": "weather", "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
    }


def shared_templates() -> dict[str, str]:
    """The templates of the shared folder; none without it."""
    return {path.name: path.read_text() for path in sorted((SHARED / "templates").glob("*.jinja"))}


def shared_files() -> list[Path]:
    """The data files of the shared folder; none without it."""
    return sorted(SHARED.glob("*.json*"))


def needs_shared() -> Any:
    """A mark for tests of the shared folder."""
    return pytest.mark.skipif(not SHARED.is_dir(), reason=f"the shared data files, {SHARED}, are not here")


def as_request(message: dict[str, Any]) -> dict[str, Any]:
    """The message as a client sends it: arguments of calls as JSON text, reasoning by the server's name."""
    sent = {key: value for key, value in message.items() if key not in ("reasoning_content", "thinking")}
    if thought := message.get("reasoning_content") or message.get("thinking"):
        sent["reasoning"] = thought
    if calls := message.get("tool_calls"):
        sent["tool_calls"] = []
        for each in calls:
            given = each["function"]["arguments"]
            text = given if isinstance(given, str) else json.dumps(given)
            sent["tool_calls"].append(each | {"function": each["function"] | {"arguments": text}})
    return sent
