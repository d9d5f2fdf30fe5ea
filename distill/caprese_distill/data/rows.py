"""What a row of data is: which columns have its prompt, its response and what belongs to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from caprese_kernels.errors import CapreseError

from .bad_rows import BadRow
from .messages import (
    REASONING,
    Message,
    Prompt,
    ends_with_assistant,
    has_reasoning,
    is_conversation,
    parse_list,
    parse_messages,
    parse_object,
    parse_tools,
    plain_text,
)

# The first column that exists is used: conversations before texts.
CONVERSATION_COLUMNS = ("messages", "conversations", "conversation", "data")
PROMPT_COLUMNS = ("prompt", "question", "problem", "query", "instruction", "input")
# Where a dataset has both, `solution` has the reasoning and `answer` only the final answer.
RESPONSE_COLUMNS = ("response", "completion", "solution", "generated_solution", "output", "answer", "chosen")
CONTEXT_COLUMNS = ("input", "context")  # belong to an `instruction`, as in Alpaca and Dolly
SYSTEM_COLUMNS = ("system", "system_prompt")
TOOL_COLUMNS = ("tools", "functions")
# Given to the chat template as they are: arguments of one row, as --chat-template-kwargs has them for all.
TEMPLATE_COLUMNS = ("documents", "chat_template_kwargs")


@dataclass(frozen=True)
class Row:
    """One row of the data."""

    line: int  # line of the file, or row of the dataset, counted from 1
    prompt: Prompt
    response: str | Message  # the assistant's text, or its message; empty if it is still to be generated
    options: Mapping[str, Any] = field(default_factory=dict)  # arguments of the chat template, such as tools


@dataclass(frozen=True)
class Columns:
    """The columns that are read. response None: the response, if needed, is the message that ends the prompt."""

    prompt: str
    response: str | None
    beside: Mapping[str, str] = field(default_factory=dict)  # what belongs to them: its kind -> its column
    unread: tuple[str, ...] = ()  # columns with text that nothing uses

    def note(self) -> str | None:
        """What of the data's text is not used."""
        if not self.unread:
            return None
        names = ", ".join(map(repr, self.unread))
        return f"not read: {names} (name columns with --prompt-column and --response-column)"


def choose_columns(
    where: str,
    sample: Sequence[Mapping[str, Any]],
    prompt: str | None = None,
    response: str | None = None,
    responses: bool = True,
) -> Columns:
    """The columns to read, from a sample of the rows. CapreseError if there are none to read."""
    counts = Counter(key for row in sample for key in row)
    names = list(counts)
    for given, option in ((prompt, "--prompt-column"), (response, "--response-column")):
        if given is not None and given not in names:
            _refuse(where, f"a column {given!r}", names, f"correct {option}")
    known = {name.lower(): name for name in reversed(names) if 2 * counts[name] >= len(sample)}
    talks = [known[name] for name in CONVERSATION_COLUMNS if name in known and _most(sample, known[name])]
    texts = [known[name] for name in PROMPT_COLUMNS if name in known]
    # A conversation without a response is of use only if there is no text, or another column responds.
    talks.sort(key=lambda name: responses and not _most(sample, name, ends_with_assistant))
    rest = [known[name] for name in CONVERSATION_COLUMNS if name in known]
    prompt = prompt or next(iter([*talks, *texts, *rest]), None)
    if prompt is None:
        expected = f"a column of prompts: one of {', '.join((*PROMPT_COLUMNS, *CONVERSATION_COLUMNS))}"
        _refuse(where, expected, names, "name it with --prompt-column")
    answered = _most(sample, prompt, ends_with_assistant)
    if responses and response is None and not answered:
        response = next((known[name] for name in RESPONSE_COLUMNS if name in known and known[name] != prompt), None)
        if response is None:
            _refuse(
                where,
                f"a column of responses: one of {', '.join(RESPONSE_COLUMNS)}; or messages that end with the "
                "assistant's",
                names,
                "name it with --response-column, or let the model generate responses with --generate",
            )
    beside = _beside({name.lower(): name for name in reversed(names)}, prompt, response if responses else None)
    read = {prompt, response, *beside.values()}
    unread = [name for name in names if name not in read and any(_has_text(row.get(name)) for row in sample)]
    return Columns(prompt, response if responses else None, beside, tuple(unread))


def _beside(names: Mapping[str, str], prompt: str, response: str | None) -> dict[str, str]:
    """Columns that belong to the prompt or the response, by what they are; `names` by their lower case."""

    def first(*wanted: str) -> str | None:
        return next((names[name] for name in wanted if name in names and names[name] not in (prompt, response)), None)

    kinds = {
        "context": first(*CONTEXT_COLUMNS) if prompt.lower() == "instruction" else None,
        "system": first(*SYSTEM_COLUMNS),
        "tools": first(*TOOL_COLUMNS),
        "reasoning": first(*REASONING),
        **{name: first(name) for name in TEMPLATE_COLUMNS},
    }
    return {kind: name for kind, name in kinds.items() if name is not None}


def parse_row(number: int, value: Mapping[str, Any], columns: Columns, responses: bool) -> Row:
    """The row's prompt and response. BadRow for what is not as the columns have it in the other rows."""
    for column in (columns.prompt, columns.response):
        if column is not None and column not in value:
            raise BadRow(f"a key {column!r}, as in the first rows", _listed(list(value)), "add it")
    prompt, response = _prompt(value, columns), _response(value, columns)
    if isinstance(prompt, list):
        answer = prompt.pop() if prompt and prompt[-1]["role"] == "assistant" else None
        if responses and columns.response is None:
            if answer is None:
                raise BadRow("messages that end with the assistant's", f"{_roles(prompt)}")
            response = [answer]
        if not any(message["role"] == "user" for message in [*prompt, *response[:-1]]):
            raise BadRow(f"a user's message in {columns.prompt!r}", f"{value[columns.prompt]!r:.60}")
    elif responses and columns.response is None:
        raise BadRow("chat messages, as in the first rows", "text")
    options = {name: value.get(columns.beside[name]) for name in TEMPLATE_COLUMNS if name in columns.beside}
    if tools := columns.beside.get("tools"):
        options["tools"] = parse_tools(tools, value.get(tools))
    if kwargs := columns.beside.get("chat_template_kwargs"):
        options["chat_template_kwargs"] = parse_object(kwargs, value.get(kwargs))
    options = {name: option for name, option in options.items() if option}
    if len(response) > 1:  # what comes before the last message is not the response's
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        prompt = [*before, *response[:-1]]
    last = response[-1] if response else {"role": "assistant", "content": ""}
    reasoning = value.get(columns.beside.get("reasoning", ""))
    if responses and isinstance(reasoning, str) and reasoning.strip() and "reasoning" not in last:
        last = last if has_reasoning(plain_text(last["content"]), reasoning) else last | {"reasoning": reasoning}
    plain = last.keys() == {"role", "content"} and isinstance(last["content"], str)
    return Row(number, prompt, last["content"] if plain else last, options)


def _prompt(value: Mapping[str, Any], columns: Columns) -> Prompt:
    """The messages of the prompt column, with the system's column as the first; or its text."""
    column, found = columns.prompt, parse_list(value[columns.prompt])
    if isinstance(found, list):
        prompt: Prompt = parse_messages(column, found)
    else:
        prompt = _text(column, value[column], "text or a list of chat messages")
        if context := columns.beside.get("context"):
            more = _text(context, value.get(context))
            prompt = f"{prompt}\n{more}" if more.strip() else prompt
    system = _text(columns.beside.get("system", ""), value.get(columns.beside.get("system", "")))
    if not system.strip() or not prompt:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return prompt if messages[0]["role"] == "system" else [{"role": "system", "content": system}, *messages]


def _response(value: Mapping[str, Any], columns: Columns) -> list[Message]:
    """The assistant's message of the response column, after messages that lead to it; none without a column."""
    column = columns.response
    if column is None:
        return []
    found = parse_list(value[column])
    if isinstance(found, dict) and "role" in found:
        found = [found]
    if isinstance(found, list) and len(found) == 1 and (found[0] is None or isinstance(found[0], str)):
        found = found[0]  # a list of one completion
    if not isinstance(found, list):
        return [{"role": "assistant", "content": _text(column, found)}]
    if not is_conversation(found) or not isinstance(found[0], dict):
        raise BadRow(f"one response in {column!r}", f"a list of {len(found)}", "give another column")
    messages = parse_messages(column, found)
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"messages that end with the assistant's in {column!r}", _roles(messages))
    last = [i for i, message in enumerate(messages) if message["role"] == "user"]
    # Preference data repeats the prompt before the response.
    repeats = column.lower() == "chosen" and last
    return messages[last[-1] + 1 :] if repeats else messages


def add_instruction(prompt: Prompt, instruction: str) -> Prompt:
    """The instruction, a newline, the prompt (or its first user message); unchanged if it has the instruction already.

    "Please reason step by step, and ..." has the instruction "Please reason step by step."
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    core = instruction.rstrip(".!: ").casefold()
    if any(core in plain_text(message["content"]).casefold() for message in messages):
        return prompt
    if isinstance(prompt, str):
        return f"{instruction}\n{prompt}" if prompt.strip() else prompt
    first = next(i for i, message in enumerate(prompt) if message["role"] == "user")
    content = prompt[first]["content"]
    if isinstance(content, str):
        content = add_instruction(content, instruction)
    else:
        content = [{"type": "text", "text": f"{instruction}\n{plain_text(content[:1])}"}, *content[1:]]
    return [*prompt[:first], prompt[first] | {"content": content}, *prompt[first + 1 :]]


def instructed(row: Row, instruction: str) -> Row:
    """The row with the instruction in its prompt."""
    return replace(row, prompt=add_instruction(row.prompt, instruction)) if instruction else row


def _most(sample: Sequence[Mapping[str, Any]], column: str, test: Any = is_conversation) -> bool:
    """Whether `test` holds for half of the column's values or more."""
    values = [row[column] for row in sample if row.get(column) is not None]
    return bool(values) and 2 * sum(map(test, values)) >= len(values)


def _has_text(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, (list, dict)) and any(map(_has_text, value.values() if isinstance(value, dict) else value))


def _text(column: str, value: Any, expected: str = "text") -> str:
    """Missing text counts as empty: such rows are skipped and counted, since nobody can edit a dataset of the Hub."""
    if value is not None and not isinstance(value, str):
        raise BadRow(f"{expected} in {column!r}", f"{type(value).__name__} {value!r:.60}", "give another column")
    return value or ""


def _roles(messages: Sequence[Message]) -> str:
    return f"the roles {', '.join(message['role'] for message in messages) or 'of none'}"


def _listed(names: Sequence[str]) -> str:
    return f"the columns {', '.join(names)}" if names else "no column"


def _refuse(where: str, expected: str, names: Sequence[str], fix: str) -> NoReturn:
    raise CapreseError(where, expected=expected, found=_listed(names), fix=fix)
