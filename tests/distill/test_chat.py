"""The seam between prompt and response: prompts as vLLM's /tokenize has them, responses as the model generates them."""

import copy
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from caprese_distill.data.bad_rows import BadRow, BadRows
from caprese_distill.data.chat import ChatRenderer, Rendering
from caprese_distill.data.rows import Columns, Row, parse_row
from caprese_distill.data.samples import encode
from caprese_distill.data.sources import read_source
from caprese_distill.data.templates import load_template, stop_ids
from caprese_kernels.errors import CapreseError
from tests.support.cases import (
    ANSWER,
    SHARED,
    TEMPLATES,
    THOUGHT,
    TOOL,
    USER,
    as_request,
    call,
    needs_shared,
    shared_files,
    shared_templates,
)
from tests.support.models import BOS, EOS, make_model, make_tokenizer
from tests.support.tokenize_server import tokenize, tokenize_client

INLINE = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"
REPLY = {"role": "assistant", "content": ANSWER}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "hot"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER, REPLY],
    "system": [{"role": "system", "content": "Be brief."}, USER, REPLY],
    "developer": [{"role": "developer", "content": "Be brief."}, {"role": "system", "content": "So."}, USER, REPLY],
    "two turns": [USER, REPLY | {"reasoning_content": THOUGHT}, USER, REPLY | {"thinking": "Again."}],
    "reasoning": [USER, REPLY | {"reasoning": THOUGHT}],
    "inline": [USER, {"role": "assistant", "content": INLINE}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "text", "text": "b"}]}, REPLY],
    "call": [USER, call({"place": "Rome"})],
    "called": [USER, call('{"place": "Rome"}'), RESULT, REPLY],
    "result in parts": [USER, call({}), RESULT | {"content": [{"type": "text", "text": "hot"}]}, REPLY],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield tokenize_client(make_model("llama", tmp_path_factory.mktemp("model")))


def row_of(messages: list[dict[str, Any]], **options: Any) -> Row:
    columns = Columns("messages", None, {name: name for name in options})
    return parse_row(1, {"messages": messages, **options}, columns, responses=True)


def rendered(template: str | None, row: Row, **kwargs: Any) -> tuple[str, str, list[str]]:
    """Texts of the prompt and of the response, and the remarks."""
    tokenizer = make_tokenizer()
    renderer = ChatRenderer(tokenizer, Rendering(template, kwargs))
    prompt, response = renderer.ids(row)
    return tokenizer.decode(prompt), tokenizer.decode(response), list(renderer.remarks)


@pytest.mark.parametrize("name", [*TEMPLATES, *shared_templates()])
def test_prompts_are_those_of_the_server(server: Any, name: str) -> None:
    template = (TEMPLATES | shared_templates())[name]
    same = 0
    for title, messages in CONVERSATIONS.items():
        for tools in (None, [TOOL]):
            row = row_of(messages, **({"tools": tools} if tools else {}))
            sent = [as_request(message) for message in messages[:-1]]
            try:
                expected = tokenize(server, template, sent, tools=tools)
            except AssertionError:
                with pytest.raises(BadRow, match="the chat template renders"):
                    ChatRenderer(make_tokenizer(), Rendering(template)).prompt_ids(row)
                continue
            assert ChatRenderer(make_tokenizer(), Rendering(template)).prompt_ids(row) == expected, title
            same += 1
    assert same >= (20 if "strict" not in name else 10)


@pytest.mark.parametrize("kwargs", [{"enable_thinking": False}, {"enable_thinking": True}, {}])
def test_arguments_of_the_template_are_those_of_the_server(server: Any, kwargs: dict[str, Any]) -> None:
    row = row_of([USER, REPLY])
    expected = tokenize(server, TEMPLATES["reasons"], [USER], chat_template_kwargs=kwargs)
    renderer = ChatRenderer(make_tokenizer(), Rendering(TEMPLATES["reasons"], kwargs))
    assert renderer.prompt_ids(row) == expected
    assert ("</think>" in make_tokenizer().decode(expected)) == (kwargs == {"enable_thinking": False})
    own = row_of([USER, REPLY], chat_template_kwargs=kwargs)
    assert ChatRenderer(make_tokenizer(), Rendering(TEMPLATES["reasons"])).prompt_ids(own) == expected


@needs_shared()
@pytest.mark.parametrize("name", [None, *shared_templates()])
def test_shared_files_give_the_servers_prompts(server: Any, name: str | None) -> None:
    tokenizer, template = make_tokenizer(), shared_templates()[name] if name else None
    for path in shared_files():
        bad, renderer = BadRows(0.01), ChatRenderer(tokenizer, Rendering(template))
        rows = read_source(path, bad_rows=bad).rows
        samples, skipped = encode(renderer, rows, 10_000, bad)
        bad.check(path.name, 12)
        assert not skipped
        assert len(samples) == 12 - len(bad) == (11 if (path.stem, name) == ("one_system", "strict.jinja") else 12)
        by_line = {row.line: row for row in rows}
        for sample in samples:
            row = by_line[sample.line]
            sent = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
            assert sample.ids[: sample.prompt_length].tolist() == tokenize(server, template, sent)
            fed = tokenizer.decode(sample.ids[sample.prompt_length :])
            reasons = path.stem in ("reasoning_content", "think_inline")
            assert fed.count("</think>") == int(reasons)
            assert fed.count("<think>") == int(reasons and name != "thinkprefix.jinja")


@needs_shared()
def test_reasoning_of_the_shared_files_is_the_same_however_it_is_written() -> None:
    tokenizer = make_tokenizer()
    for template in (None, *shared_templates().values()):
        renderer = ChatRenderer(tokenizer, Rendering(template))
        fields, inline = (
            [s.ids.tolist() for s in encode(renderer, read_source(SHARED / name).rows, 10_000)[0]]
            for name in ("reasoning_content.jsonl", "think_inline.jsonl")
        )
        assert fields == inline
        assert all("Together" in tokenizer.decode(ids) for ids in fields)


@pytest.mark.parametrize("reply", [REPLY | {"reasoning_content": THOUGHT}, {"role": "assistant", "content": INLINE}])
def test_reasoning_is_trained_on_once(reply: dict[str, Any]) -> None:
    row = row_of([USER, reply])
    own = "reasoning_content" in reply
    prompt, response, remarks = rendered(TEMPLATES["reasons"], row)
    assert prompt.endswith("<|assistant|>")
    assert (response, remarks) == (f"{INLINE}{EOS}", [])
    prompt, response, remarks = rendered(TEMPLATES["opens"], row)
    assert prompt.endswith("<|assistant|><think>\n")
    assert response == f"{THOUGHT}\n</think>\n\n{ANSWER}{EOS}"
    assert "leaves out the response's reasoning" in remarks[0]
    prompt, response, remarks = rendered(TEMPLATES["plain"], row)
    assert response == f"{INLINE}{EOS}"
    assert [("leaves out" in remark) for remark in remarks] == ([True] if own else [])


def test_reasoning_that_the_prompt_closes_is_not_trained_on() -> None:
    for reply in (REPLY | {"reasoning": THOUGHT}, {"role": "assistant", "content": INLINE}):
        prompt, response, remarks = rendered(TEMPLATES["reasons"], row_of([USER, reply]), enable_thinking=False)
        assert prompt.endswith("<think>\n\n</think>\n\n")
        assert response == f"{ANSWER}{EOS}"
        assert ["reasoning not trained on" in remark for remark in remarks] == [True]


def test_an_answer_without_reasoning_where_the_prompt_opens_it_is_said() -> None:
    _, response, remarks = rendered(TEMPLATES["opens"], row_of([USER, REPLY]))
    assert response == f"{ANSWER}{EOS}"
    assert [remark.startswith("no reasoning, though") for remark in remarks] == [True]


def test_text_generated_after_an_opened_reasoning_reads_back() -> None:
    """`--generate` keeps what the model wrote: the reasoning's opening was the prompt's."""
    text = f"{THOUGHT}\n</think>\n\n{ANSWER}"
    _, response, _ = rendered(TEMPLATES["opens"], Row(1, "one", text))
    assert response == f"{text}{EOS}"


def test_calls_of_tools_are_responses() -> None:
    _, response, remarks = rendered(TEMPLATES["reasons"], row_of([USER, call('{"place": "Rome"}')], tools=[TOOL]))
    assert response.startswith("<think>\n\n</think>\n\n<tool_call>")
    assert '{"place": "Rome"}</tool_call>' in response
    assert not remarks
    with pytest.raises(BadRow, match="expected tool calls that the chat template renders; found none"):
        rendered(TEMPLATES["plain"], row_of([USER, call({})]))


def test_tools_that_no_template_renders_are_said() -> None:
    _, _, remarks = rendered(TEMPLATES["plain"], row_of([USER, REPLY], tools=[TOOL]))
    assert remarks == ["the chat template does not render the row's tools: left out, as in serving"]


def test_tools_are_counted_without_a_response_and_without_a_template() -> None:
    tokenizer = copy.deepcopy(make_tokenizer())
    for template in (TEMPLATES["plain"], None):
        tokenizer.chat_template = template
        renderer = ChatRenderer(tokenizer)
        assert renderer.prompt_ids(Row(1, "one", "", {"tools": [TOOL]}))
        assert list(renderer.remarks.values()) == [1]


@pytest.mark.parametrize("template", ["reasons", "opens", "plain"])
def test_reasoning_that_the_answer_repeats_is_trained_on(template: str) -> None:
    _, response, _ = rendered(TEMPLATES[template], row_of([USER, REPLY | {"reasoning": ANSWER}]))
    assert response.removeprefix("<think>\n") == f"{ANSWER}\n</think>\n\n{ANSWER}{EOS}"


def test_a_template_that_changes_the_response_is_said() -> None:
    template = TEMPLATES["plain"].replace("{{ m['content'] }}{{ eos", "{{ m['content'] | upper }}{{ eos")
    _, response, remarks = rendered(template, Row(1, "one", "two"))
    assert response == f"TWO{EOS}"
    assert remarks == ["the chat template changes the text of the response: trained on as the template has it"]


def test_a_template_that_takes_no_answer_at_the_end() -> None:
    template = (
        "{% if messages[-1].role != 'user' %}{{ raise_exception('no') }}{% endif %}<|user|>{{ messages[0].content }}"
    )
    prompt, response, remarks = rendered(template, Row(1, "one", "two"))
    assert (prompt, response) == ("<|user|>one", f"two{EOS}")
    assert [remark.startswith("the chat template does not render the response") for remark in remarks] == [True]


def test_the_response_ends_where_generation_ends() -> None:
    """Not with what the template writes after it."""
    tokenizer = make_tokenizer()
    template = TEMPLATES["plain"].replace("{{ eos_token }}", "<|user|>\n")
    for stops, ending in (((), f"<|user|>{EOS}"), ((tokenizer.convert_tokens_to_ids("<|user|>"),), "<|user|>")):
        renderer = ChatRenderer(tokenizer, Rendering(template), stops)
        assert tokenizer.decode(renderer.ids(Row(1, "one", "two"))[1]) == f"two{ending}"


def test_stop_ids_are_the_models(tmp_path: Path) -> None:
    config = type("Config", (), {})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    assert stop_ids(str(tmp_path), config) == [1, 3]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert stop_ids(str(tmp_path), config) == [3]


def test_without_a_template_reasoning_comes_before_the_text() -> None:
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.chat_template = None
    renderer = ChatRenderer(tokenizer)
    _, response = renderer.ids(Row(1, "one", REPLY | {"reasoning": THOUGHT}))
    assert tokenizer.decode(response) == f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}{EOS}"
    given = ChatRenderer(tokenizer, Rendering(TEMPLATES["plain"]))
    assert tokenizer.decode(given.prompt_ids(row_of([USER, REPLY]))).startswith(f"{BOS}<|user|>")


def test_the_date_can_be_pinned() -> None:
    row = row_of([USER, REPLY])
    renderer = ChatRenderer(make_tokenizer(), Rendering(TEMPLATES["dated"], date=datetime.date(2024, 2, 29)))
    assert "<|user|>29 Feb 2024. How many" in make_tokenizer().decode(renderer.prompt_ids(row))
    assert not renderer.prints_date
    assert ChatRenderer(make_tokenizer(), Rendering(TEMPLATES["dated"])).prints_date
    assert not ChatRenderer(make_tokenizer(), Rendering(TEMPLATES["plain"])).prints_date


def test_a_template_is_a_file_or_its_text(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATES["plain"])
    assert load_template(str(tmp_path / "t.jinja")) == load_template(TEMPLATES["plain"]) == TEMPLATES["plain"]
    with pytest.raises(
        CapreseError, match=r"--chat-template: expected a readable file, or a template; found .*none\.jinja"
    ):
        load_template(str(tmp_path / "none.jinja"))


def test_arguments_that_are_not_the_templates_are_refused() -> None:
    with pytest.raises(CapreseError, match=r"--chat-template-kwargs: .*found add_generation_prompt"):
        ChatRenderer(make_tokenizer(), Rendering(kwargs={"add_generation_prompt": False}))
