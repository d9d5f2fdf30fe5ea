"""Rows as data sets have them: which columns are read, what becomes of each, what is not read; bad rows."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from caprese_distill.data.bad_rows import BadRow, BadRows
from caprese_distill.data.rows import add_instruction
from caprese_distill.data.sources import Source, read_source
from caprese_kernels.errors import CapreseError
from tests.support.cases import ANSWER, THOUGHT, TOOL, USER, call

Q, SYSTEM = "How many are 2 and 3?", {"role": "system", "content": "Be brief."}
REPLY = {"role": "assistant", "content": ANSWER}
THOUGHTFUL = REPLY | {"reasoning": THOUGHT}
OBJECT = {"arguments": {"place": "Rome"}, "name": "weather"}  # as vLLM orders it
CALL = {"role": "assistant", "content": [], "tool_calls": [{"id": "c1", "function": OBJECT, "type": "function"}]}

Read = Callable[..., Source]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def run(*rows: Mapping[str, Any], **options: Any) -> Source:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_source(path, **options)

    return run


@pytest.mark.parametrize(
    ("row", "prompt", "response", "unread"),
    [
        # Alpaca, Dolly
        ({"instruction": "Add.", "input": "2 and 3", "output": "5"}, "Add.\n2 and 3", "5", ""),
        ({"instruction": "Add.", "input": "", "output": "5"}, "Add.", "5", ""),
        ({"instruction": "Add.", "context": "2 and 3", "response": "5"}, "Add.\n2 and 3", "5", ""),
        ({"input": "Add 2 and 3.", "output": "5"}, "Add 2 and 3.", "5", ""),
        # prompt and completion
        ({"prompt": Q, "completion": ANSWER}, Q, ANSWER, ""),
        ({"prompt": Q, "completion": [ANSWER]}, Q, ANSWER, ""),
        ({"prompt": [USER], "completion": [REPLY]}, [USER], ANSWER, ""),
        ({"prompt": [USER], "completion": REPLY}, [USER], ANSWER, ""),
        ({"prompt": [USER], "completion": [CALL | {"content": ""}, REPLY]}, [USER, CALL | {"content": ""}], ANSWER, ""),
        ({"prompt": Q, "chosen": [USER, REPLY], "rejected": [USER, REPLY]}, Q, ANSWER, "'rejected'"),
        ({"Question": Q, "Response": ANSWER}, Q, ANSWER, ""),
        # ShareGPT
        ({"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": ANSWER}]}, [USER], ANSWER, ""),
        (
            {"system": "Be brief.", "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": ANSWER}]},
            [SYSTEM, USER],
            ANSWER,
            "",
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": Q},
                    {"from": "function_call", "value": json.dumps(OBJECT)},
                    {"from": "observation", "value": "hot"},
                    {"from": "gpt", "value": ANSWER},
                ]
            },
            [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [{"function": OBJECT, "type": "function"}]},
                {"role": "tool", "content": "hot"},
            ],
            ANSWER,
            "",
        ),
        # parts
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": Q}]}, REPLY]},
            [{"role": "user", "content": [{"type": "text", "text": Q}]}],
            ANSWER,
            "",
        ),
        # UltraChat, as it was and with 200 thousand rows
        (
            {"id": "7", "data": [Q, ANSWER, "Sure?", "Yes."]},
            [USER, REPLY, {**USER, "content": "Sure?"}],
            "Yes.",
            "'id'",
        ),
        ({"prompt": Q, "prompt_id": "a", "messages": [USER, REPLY]}, [USER], ANSWER, "'prompt', 'prompt_id'"),
        # Open-R1, NuminaMath
        (
            {"problem": Q, "solution": "s", "answer": "5", "generations": ["g", "h"], "messages": [USER, REPLY]},
            [USER],
            ANSWER,
            "'problem', 'solution', 'answer', 'generations'",
        ),
        ({"source": "olympiads", "problem": Q, "solution": ANSWER, "answer": "5"}, Q, ANSWER, "'source', 'answer'"),
        # messages as JSON text
        ({"messages": json.dumps([USER, REPLY])}, [USER], ANSWER, ""),
        # reasoning, in the message or beside the response
        *(
            ({"messages": [USER, REPLY | {name: THOUGHT}]}, [USER], THOUGHTFUL, "")
            for name in ("reasoning", "reasoning_content", "thinking")
        ),
        *(
            ({"prompt": Q, name: THOUGHT, "response": ANSWER}, Q, THOUGHTFUL, "")
            for name in ("reasoning", "reasoning_content", "thinking")
        ),
        # text that happens to be JSON
        *(({"prompt": text, "response": text}, text, text, "") for text in ('["a"]', "[1, 2]", "[]", '["a", "b"]')),
        # an answer that has the reasoning's words is not the reasoning
        ({"prompt": Q, "reasoning": "5", "response": ANSWER}, Q, REPLY | {"reasoning": "5"}, ""),
        ({"messages": [USER, REPLY | {"reasoning": "5"}]}, [USER], REPLY | {"reasoning": "5"}, ""),
        # reasoning that is in the content, too, comes once
        (
            {"messages": [USER, {"role": "assistant", "content": f"<think>{THOUGHT}</think>5", "reasoning": THOUGHT}]},
            [USER],
            f"<think>{THOUGHT}</think>5",
            "",
        ),
    ],
)
def test_rows_of_many_kinds(read: Read, row: dict[str, Any], prompt: Any, response: Any, unread: str) -> None:
    source = read(row, row)
    assert (source.rows[0].prompt, source.rows[0].response) == (prompt, response)
    named = f"not read: {unread} (name columns with --prompt-column and --response-column)"
    assert source.notes == ([named] if unread else [])


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        [TOOL["function"]],
        json.dumps([TOOL]),
        [json.dumps(TOOL["function"])],
        [{"function": dict(reversed(TOOL["function"].items())), "type": "function"}],
    ],
    ids=["objects", "functions alone", "text", "texts", "another order"],
)
@pytest.mark.parametrize("arguments", [{"place": "Rome"}, '{"place": "Rome"}'], ids=["object", "text"])
def test_tools_have_one_form(read: Read, tools: Any, arguments: Any) -> None:
    (row, _) = read(*[{"messages": [USER, call(arguments)], "tools": tools}] * 2).rows
    assert json.dumps(row.options) == json.dumps({"tools": [TOOL]})  # in this order of keys
    assert json.dumps(row.response["tool_calls"]) == json.dumps(CALL["tool_calls"])


def test_tables_lose_what_only_other_rows_have(tmp_path: Path) -> None:
    rows = [{"messages": [USER, call({name: "Rome"})], "tools": [TOOL]} for name in ("place", "city")]
    Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    for row, name in zip(read_source(tmp_path).rows, ("place", "city"), strict=True):
        assert row.response["tool_calls"][0]["function"]["arguments"] == {name: "Rome"}
        assert row.options == {"tools": [TOOL]}


def test_rows_of_one_file_may_differ(read: Read) -> None:
    """Reasoning and tools are looked for in every row."""
    source = read({"messages": [USER, REPLY]}, {"messages": [USER, THOUGHTFUL], "tools": [TOOL]})
    assert [row.response for row in source.rows] == [ANSWER, THOUGHTFUL]
    assert [dict(row.options) for row in source.rows] == [{}, {"tools": [TOOL]}]


@pytest.mark.parametrize("kwargs", [{"enable_thinking": False}, '{"enable_thinking": false}'])
def test_arguments_of_the_template_may_be_text(read: Read, kwargs: Any) -> None:
    row = {"messages": [USER, REPLY], "chat_template_kwargs": kwargs}
    assert read(row).rows[0].options == {"chat_template_kwargs": {"enable_thinking": False}}
    for wrong in ("[1]", "off", 3):
        with pytest.raises(CapreseError, match="expected an object in 'chat_template_kwargs'"):
            read(row, row | {"chat_template_kwargs": wrong})


def test_the_instruction_joins_the_first_part() -> None:
    parts = [{"type": "text", "text": "one?"}, {"type": "text", "text": "two?"}]
    prompt = add_instruction([{"role": "user", "content": parts}], "Think.")
    assert prompt == [{"role": "user", "content": [{"type": "text", "text": "Think.\none?"}, parts[1]]}]
    assert add_instruction(prompt, "Think.") == prompt


BAD = [
    ('{"messages": ', "a JSON object; found Expecting value at character 12"),
    ("3", "a JSON object; found int"),
    ('{"other": 1}', "a key 'messages', as in the first rows; found the columns other"),
    (
        '{"messages": [{"role": "user", "content": "a"}]}',
        "messages that end with the assistant's; found the roles user",
    ),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "a user's message in 'messages'"),
    ('{"messages": "a"}', "chat messages, as in the first rows; found text"),
    (
        '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "a"}]}',
        "text in 'messages.content'; found a part",
    ),
    (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"id": 3}]}]}',
        "tool calls with a function's name in 'messages'",
    ),
    (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [{}]}',
        "tools with a function's name in 'tools'",
    ),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
@pytest.mark.parametrize("first", [True, False])
def test_one_bad_row_never_ends_a_run(tmp_path: Path, line: str, reason: str, first: bool) -> None:
    good = json.dumps({"messages": [USER, REPLY], "tools": [TOOL]})
    path, bad = tmp_path / "data.jsonl", BadRows(0.01)
    path.write_text("\n".join([line, good, good, good] if first else [good, good, good, line]))
    source = read_source(path, bad_rows=bad)
    assert len(source.rows) == 3
    assert len(bad) == 1
    assert bad.reasons().startswith(f"line {1 if first else 4}: expected {reason}")
    with pytest.raises(CapreseError) as error:
        read_source(path)
    assert str(error.value).startswith(f"{path}, line {1 if first else 4}: expected {reason}")


def test_too_many_bad_rows_end_it_with_all_reasons(tmp_path: Path) -> None:
    good = json.dumps({"messages": [USER, REPLY]})
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([*[good] * 290, *["{"] * 3, '{"messages": "a"}', *["{"] * 7]))
    with pytest.raises(CapreseError) as error:
        read_source(path, bad_rows=BadRows(0.01))
    assert str(error.value) == (
        f"data {path}: expected at most 3 of 301 rows that cannot be used (--max-bad-rows 0.01); found 11: "
        "lines 291, 292, 293, 295, 296, 297, 298, 299 and 2 more: expected a JSON object; found Expecting property "
        "name enclosed in double quotes at character 1 | line 294: expected chat messages, as in the first rows; found "
        "text; correct the line, or raise --max-bad-rows"
    )
    assert len(read_source(path, bad_rows=BadRows(0.1)).rows) == 290


@pytest.mark.parametrize(
    ("share", "total", "allowed"), [(0.01, 12, 1), (0.01, 250, 2), (0.0, 1000, 0), (0.5, 10, 5), (0.001, 10, 1)]
)
def test_how_many_rows_may_be_bad(share: float, total: int, allowed: int) -> None:
    bad = BadRows(share)
    assert bad.allowed(total) == allowed
    for number in range(allowed):
        bad.add(number, BadRow("a", "b"))
    bad.check("d", total)
    bad.add(99, BadRow("c", "d"))
    with pytest.raises(CapreseError, match=f"found {allowed + 1}: "):
        bad.check("d", total)
