"""Prompts as text or chat messages: the instruction added to them, and their token ids by the model's chat template."""

from __future__ import annotations

from typing import Any

from caprese_kernels.errors import CapreseError

Prompt = str | list[dict[str, Any]]  # text; or messages with `role`, `content` and whatever else the template reads


def ends_with_assistant(prompt: Any) -> bool:
    """Whether the last message is the assistant's, that is a response."""
    last = prompt[-1] if isinstance(prompt, list) and prompt else None
    return isinstance(last, dict) and last.get("role") == "assistant"


def add_instruction(prompt: Prompt, instruction: str) -> Prompt:
    """The instruction, a newline, the prompt (or its first user message); unchanged if it has the instruction already.

    "Please reason step by step, and ..." has the instruction "Please reason step by step."
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    core = instruction.rstrip(".!: ").casefold()
    if any(core in message["content"].casefold() for message in messages):
        return prompt
    if isinstance(prompt, str):
        return f"{instruction}\n{prompt}" if prompt.strip() else prompt
    first = next(i for i, message in enumerate(prompt) if message["role"] == "user")
    content = add_instruction(prompt[first]["content"], instruction)
    return [*prompt[:first], prompt[first] | {"content": content}, *prompt[first + 1 :]]


def prompt_ids(tokenizer: Any, prompt: Prompt, line: int) -> list[int]:
    """The prompt's token ids as a server feeds them; none for a prompt without text. `line` names it in errors.

    The tokenizer's chat template renders the prompt, with the generation prompt; without a template, the text itself
    is encoded.
    """
    texts = [prompt] if isinstance(prompt, str) else [message.get("content") for message in prompt]
    if not any(str(text or "").strip() for text in texts):
        return []
    where = f"data, line {line}"
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise CapreseError(
                where,
                expected="a prompt that is text, since the model has no chat template",
                found="chat messages",
                fix="write the prompts as text, or give the tokenizer a chat template",
            )
        return list(tokenizer.encode(prompt))
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    except Exception as error:  # templates raise anything: TemplateError, TypeError, KeyError ...
        raise CapreseError(
            where,
            expected="messages that the chat template renders",
            found=f"{type(error).__name__}: {error}",
            fix="correct the line",
        ) from None
