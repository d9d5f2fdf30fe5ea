"""The tokens of a conversation as vLLM's server has them: those of the prompt, and those that the model then generates.

transformers' `apply_chat_template` renders them, which vLLM's server calls too, with the same arguments. The response
is what the rendering of the whole conversation has after the prompt's, up to the token that ends generation.
"""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from caprese_kernels.errors import CapreseError

from .bad_rows import BadRow
from .messages import REASONING_MARKS, Message, Prompt, part_text, plain_text
from .rows import Row
from .templates import for_template, takes_parts, without_developer

RESERVED = {"conversation", "messages", "tools", "documents", "chat_template", "tokenize", "return_dict"} | {
    "add_generation_prompt",
    "continue_final_message",
}
# Remarks on responses, with the number of their rows.
WRITTEN = (
    "the chat template leaves out the response's reasoning: trained on before the answer, as {0}...{1} (to change "
    "that, give --chat-template)"
)
CLOSED = "reasoning not trained on: the generation prompt closes it (chat_template_kwargs turn thinking off)"
MISSING = "no reasoning, though the generation prompt opens it with {0}: the answer is trained on alone"
CHANGED = "the chat template changes the text of the response: trained on as the template has it"
UNUSED_TOOLS = "the chat template does not render the row's tools: left out, as in serving"
PLAIN = "the chat template does not render the response after its prompt: trained on as the data has it"


@dataclass(frozen=True)
class Rendering:
    """How prompts are rendered, beside what the model's own files say."""

    template: str | None = None  # None: the tokenizer's
    kwargs: Mapping[str, Any] | None = None
    date: datetime.date | None = None  # what the template prints as today's; None: the day of the run


class ChatRenderer:
    """Token ids by a tokenizer and its chat template. `remarks` counts rows whose response is not just as in the data.

    stop_ids: the ids that end generation, the tokenizer's eos token among them. Without a template, texts are encoded.
    """

    def __init__(self, tokenizer: Any, rendering: Rendering | None = None, stop_ids: Sequence[int] = ()):
        self.tokenizer = tokenizer
        rendering = rendering or Rendering()
        self.template = rendering.template
        self.kwargs = dict(rendering.kwargs or {})
        if taken := sorted(RESERVED & self.kwargs.keys()):
            raise CapreseError(
                "--chat-template-kwargs", expected="the template's own variables", found=taken[0], fix="leave it out"
            )
        if rendering.date is not None:
            self.kwargs["strftime_now"] = rendering.date.strftime
        eos = tokenizer.eos_token_id
        self.stop_ids = {*stop_ids, *([] if eos is None else [eos])}
        self.remarks: Counter[str] = Counter()

    @property
    def has_template(self) -> bool:
        return bool(self.template or self.tokenizer.chat_template)

    @property
    def prints_date(self) -> bool:
        """Whether prompts depend on the day on which they are rendered."""
        return self.has_template and "strftime_now" in self._template(None) and "strftime_now" not in self.kwargs

    def prompt_ids(self, row: Row) -> list[int]:
        """The prompt's ids, with the generation prompt, as a server feeds them; none for a prompt without text.

        BadRow for messages that the template does not render.
        """
        if not _has_text(row.prompt):
            return []
        tools = row.options.get("tools")
        if tools and not (self.has_template and "tools" in self._template(tools)):
            self.remarks[UNUSED_TOOLS] += 1
        if not self.has_template:
            if not isinstance(row.prompt, str):
                expected = "a prompt that is text, since the model has no chat template"
                raise BadRow(expected, "chat messages", "write the prompts as text, or give --chat-template")
            return list(self.tokenizer.encode(row.prompt))
        return self._encode(self._render(_messages(row.prompt), row, add_generation_prompt=True))

    def ids(self, row: Row) -> tuple[list[int], list[int]]:
        """Ids of the prompt, and of all that the model would generate, the token that ends it included."""
        prompt = self.prompt_ids(row)
        message = {"role": "assistant", "content": row.response} if isinstance(row.response, str) else row.response
        if not prompt or not (plain_text(message["content"]) or message.get("reasoning") or message.get("tool_calls")):
            return prompt, []
        if not self.has_template:
            return prompt, self._ended(self.tokenizer.encode(_as_text(message), add_special_tokens=False))
        before = self._render(_messages(row.prompt), row, add_generation_prompt=True)
        text = self._response(row, message, before)
        whole = self._encode(before + text)
        # The model never merges its first characters with the prompt's last.
        after = whole[len(prompt) :] if whole[: len(prompt)] == prompt else self._encode(text)
        if not self.stop_ids.intersection(
            after
        ):  # no end in the template: what it writes after the text is not sampled
            content = plain_text(message["content"])
            kept = text.rstrip() + content[len(content.rstrip()) :]
            after = after if kept == text else self._encode(kept)
        return prompt, self._ended(after)

    def _response(self, row: Row, message: Message, before: str) -> str:
        """The text after the prompt's rendering `before`: as the template has it, with all of the reasoning."""
        opening, closing = self._marks(row)
        opened = re.search(rf"{re.escape(opening)}\s*({re.escape(closing)}\s*)?$", before)
        header = before[: opened.start()] if opened else before
        message, inline = _split_content(message, closing)
        try:
            whole = self._render([*_messages(row.prompt), message], row, add_generation_prompt=False)
        except BadRow:
            whole = ""  # templates that take no answer at the end
        if whole.startswith(before):
            text = whole[len(before) :]
        elif whole.startswith(header):
            text = whole[len(header) :]
            if opened and opened[1] is None:
                text = re.sub(rf"^{re.escape(opening)}\s*", "", text)
            elif text.startswith(opening) and closing in text:
                text = text[text.index(closing) + len(closing) :].lstrip()
        elif message.get("tool_calls"):
            raise BadRow("tool calls that the chat template renders after the prompt", "another rendering")
        else:
            self.remarks[PLAIN] += 1
            text = _as_text(message)
        return self._with_reasoning(text, message, inline, (opening, closing), opened)

    def _with_reasoning(
        self, text: str, message: Message, inline: str | None, marks: tuple[str, str], opened: re.Match[str] | None
    ) -> str:
        """`text` with the reasoning that the template left out of it, between its marks."""
        opening, closing = marks
        reasoning = message.get("reasoning") or _between(inline, marks)
        answer = plain_text(message["content"])
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in text:
                raise BadRow("tool calls that the chat template renders", "none of them", "give --chat-template")
        if inline is not None:
            answer = answer[len(inline) :]
        if not reasoning.strip():
            if opened and opened[1] is None and closing not in text:
                self.remarks[MISSING.format(opening)] += 1
        elif reasoning.strip() not in _without_answer(text, answer, closing):
            if opened and opened[1] is not None:
                self.remarks[CLOSED] += 1
                return text
            self.remarks[WRITTEN.format(opening, closing)] += 1
            start = "" if opened else f"{opening}\n"
            if closing in text:  # an empty reasoning was rendered
                return f"{start}{reasoning}\n{text[text.index(closing) :]}"
            if inline is None:
                return f"{start}{reasoning}\n{closing}\n\n{text.lstrip()}"
            gap = answer[: len(answer) - len(answer.lstrip())]  # templates may strip it with the reasoning
            thought = re.sub(rf"^\s*{re.escape(opening)}\s*", "", inline) if opened else inline
            return f"{thought}{gap}{text.lstrip()}"
        if answer.strip() not in text:
            self.remarks[CHANGED] += 1
        return text

    def _ended(self, ids: list[int]) -> list[int]:
        """The ids up to the first that ends generation; with the eos token, if none does."""
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
        if end is not None:
            return list(ids[: end + 1])
        eos = self.tokenizer.eos_token_id
        return [*ids, *([] if eos is None else [eos])]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _template(self, tools: Any) -> str:
        try:
            return self.tokenizer.get_chat_template(self.template, tools=tools)
        except ValueError as error:  # several templates, none of which is the default
            raise CapreseError(
                "chat template",
                expected="one, or one named default",
                found=str(error)[:200],
                fix="give --chat-template",
            ) from None

    def _marks(self, row: Row) -> tuple[str, str]:
        """The first pair whose end is in the template."""
        template = self._template(row.options.get("tools"))
        return next((pair for pair in REASONING_MARKS if pair[1] in template), REASONING_MARKS[0])

    def _render(self, messages: Sequence[Message], row: Row, **arguments: Any) -> str:
        options = dict(row.options)
        kwargs = self.kwargs | (options.pop("chat_template_kwargs", None) or {})
        template = self._template(options.get("tools"))
        parts = takes_parts(template, self.tokenizer.apply_chat_template)
        conversation = [for_template(message, parts) for message in messages]
        if "developer" not in template:  # as vLLM's server does for templates that do not know the role
            conversation = without_developer(conversation)
        try:
            return self.tokenizer.apply_chat_template(
                conversation, chat_template=template, tokenize=False, **options, **kwargs, **arguments
            )
        except Exception as error:  # templates raise anything: TemplateError, TypeError, KeyError ...
            found = f"{type(error).__name__}: {error}"
            raise BadRow("messages that the chat template renders", found, "correct the row") from None


def _messages(prompt: Prompt) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _has_text(prompt: Prompt) -> bool:
    return any(plain_text(message["content"]).strip() for message in _messages(prompt))


def _split_content(message: Message, closing: str) -> tuple[Message, str | None]:
    """The message with parts of reasoning as its reasoning; and the content through the mark that closes reasoning."""
    content = message["content"]
    if isinstance(content, list):
        thoughts = [part_text(part) for part in content if isinstance(part, dict) and part.get("type") == "thinking"]
        rest = [part for part in content if not (isinstance(part, dict) and part.get("type") == "thinking")]
        message = message | {"content": rest} | ({"reasoning": "\n".join(thoughts)} if thoughts else {})
    text = plain_text(message["content"])
    end = text.find(closing)
    return message, text[: end + len(closing)] if end >= 0 else None


def _between(inline: str | None, marks: tuple[str, str]) -> str:
    return inline.removesuffix(marks[1]).strip().removeprefix(marks[0]) if inline is not None else ""


def _without_answer(text: str, answer: str, closing: str) -> str:
    """What the text has beside the answer: that before the mark which closes reasoning, if there is one."""
    if closing in text:
        return text.partition(closing)[0]
    before, _, after = text.rpartition(answer.strip()) if answer.strip() else (text, "", "")
    return before + after


def _as_text(message: Message) -> str:
    """The message without a template: reasoning between the usual marks, calls as JSON, then nothing."""
    opening, closing = REASONING_MARKS[0]
    reasoning = f"{opening}\n{message['reasoning']}\n{closing}\n\n" if message.get("reasoning") else ""
    calls = "".join(f"\n{json.dumps(call['function'])}" for call in message.get("tool_calls", ()))
    return f"{reasoning}{plain_text(message['content'])}{calls}"
