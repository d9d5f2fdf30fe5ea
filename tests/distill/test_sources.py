"""Rows from files and datasets: which columns, which rows, which instruction, and an error for every mistake."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from caprese_distill.config import INSTRUCTION
from caprese_distill.data.sources import read_source
from caprese_kernels.errors import CapreseError

PROBLEMS = [{"question": f"How many is {i}?", "answer": f"#### {i}"} for i in range(20)]
USER, ASSISTANT = {"role": "user", "content": "one?"}, {"role": "assistant", "content": "1"}


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: Mapping[str, Any]) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def test_a_limit_draws_rows_by_seed_in_order(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(
        "\n\n".join(json.dumps({"prompt": str(i), "response": "\u2028"}, ensure_ascii=False) for i in range(50))
    )
    first, again, other = (read_source(path, 10, seed).rows for seed in (0, 0, 1))
    assert first == again != other
    lines = [row.line for row in first]
    assert lines == sorted(set(lines))
    assert all(row.line == 2 * int(row.prompt) + 1 for row in first if isinstance(row.prompt, str))
    assert len(read_source(path, 99).rows) == len(read_source(path).rows) == 50


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "expected two rows or more; found none"),
        ("\n \n", "expected two rows or more; found none"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": ', "line 2: expected a JSON object; found Expecting value"),
        ("[1]\n", "row 1: expected a JSON object; found int"),
        ("1\n", "line 1: expected a JSON object; found int"),
        (
            '\n{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n',
            "line 3: expected a key 'response', as in the first rows; found the columns prompt;",
        ),
        (
            '{"prompt": "a", "id": 3}',
            "column of responses: one of response.*found the columns prompt, id; name it with",
        ),
        ('{"id": "a", "text": "b"}', "column of prompts: one of prompt, .*found the columns id, text; name it with"),
        ("{}", "found no column"),
        ('{"prompt": "a", "response": 3}', "line 1: expected text in 'response'; found int 3"),
        ('{"prompt": {"a": 1}, "response": "b"}', "line 1: expected text or a list of chat messages in 'prompt'"),
        ('{"prompt": [], "response": "a"}', r"a user's message in 'prompt'; found \[\]"),
        ('{"prompt": ["a"], "response": "a"}', "a list of chat messages in 'prompt'; found 'a'"),
        ('{"prompt": [{"role": "user", "content": [1]}], "response": "a"}', "text in 'prompt.content'; found a part 1"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
            '{"messages": [{"role": "user", "content": "a"}]}',
            "line 2: expected messages that end with the assistant's",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
            '{"messages": "a"}',
            "line 2: expected chat messages, as in the first rows; found text",
        ),
    ],
)
def test_errors_in_files_name_the_line(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(CapreseError, match=match):
        read_source(path)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(CapreseError, match="readable file; found No such file"):
        read_source(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CapreseError, match="text in UTF-8"):
        read_source(tmp_path / "binary")


def test_problems_with_other_column_names_just_work(jsonl: Callable[..., Path]) -> None:
    source = read_source(jsonl(*PROBLEMS), limit=5)
    assert [row.response for row in source.rows] == [f"#### {row.line - 1}" for row in source.rows]
    assert [row.prompt for row in source.rows] == [f"How many is {row.line - 1}?" for row in source.rows]
    read = {"prompt_column": "question", "response_column": "answer", "instruction": "", "rows": 20, "drawn": 5}
    assert source.provenance == {"file": "data.jsonl", "sha256": source.provenance["sha256"], **read}
    assert str(source) == "data.jsonl: 5 of 20 rows, prompts from 'question', responses from 'answer'"


def test_columns_by_name_and_by_rank(jsonl: Callable[..., Path]) -> None:
    path = jsonl({"id": "a", "answer": "7", "solution": "3 + 4 = 7", "problem": "3 + 4?"})
    (row,) = read_source(path).rows
    assert (row.prompt, row.response) == ("3 + 4?", "3 + 4 = 7")
    (row,) = read_source(path, prompt_column="id", response_column="answer").rows
    assert (row.prompt, row.response) == ("a", "7")
    with pytest.raises(CapreseError, match=r"a column 'text'; found the columns id, answer, .*correct --prompt-column"):
        read_source(path, prompt_column="text")
    with pytest.raises(CapreseError, match=r"a column 'text'; .*correct --response-column"):
        read_source(path, response_column="text")


def test_missing_text_is_kept_as_empty(jsonl: Callable[..., Path]) -> None:
    rows = read_source(jsonl({"prompt": None, "response": "a"}, {"prompt": "b", "response": None})).rows
    assert [(row.prompt, row.response) for row in rows] == [("", "a"), ("b", "")]
    (row, _) = read_source(jsonl({"prompt": " ", "response": "a"}, {"prompt": "b", "response": ""})).rows
    assert row.prompt == " "


def test_messages_contain_their_response(jsonl: Callable[..., Path]) -> None:
    turns = [{"role": "system", "content": "Be brief."}, USER, ASSISTANT, USER]
    last = ASSISTANT | {"content": "last", "tool_calls": None}
    path = jsonl({"messages": [*turns, last], "answer": "7"})
    (row,) = read_source(path).rows
    assert (row.prompt, row.response) == (turns, "last")
    (row,) = read_source(path, response_column="answer").rows
    assert (row.prompt, row.response) == (turns, "7")
    (row,) = read_source(path, responses=False).rows
    assert (row.prompt, row.response) == (turns, "")
    (row,) = read_source(jsonl({"messages": turns, "answer": "7"})).rows  # no assistant at the end
    assert (row.prompt, row.response) == (turns, "7")


def test_without_responses_prompts_are_enough(jsonl: Callable[..., Path]) -> None:
    path = jsonl({"prompt": "a"}, {"prompt": "b"})
    source = read_source(path, responses=False)
    assert [(row.prompt, row.response) for row in source.rows] == [("a", ""), ("b", "")]
    assert source.provenance["response_column"] is None
    assert str(source) == "data.jsonl: 2 of 2 rows, prompts from 'prompt'"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("one?", f"{INSTRUCTION}\none?"),
        (f"{INSTRUCTION} one?", None),
        ("one? please reason step by step, and put your final answer within \\boxed{}.", None),
        ("", None),
        ([{"role": "system", "content": INSTRUCTION}, USER], None),
        (
            [{"role": "system", "content": "s"}, USER, ASSISTANT, USER],
            [
                {"role": "system", "content": "s"},
                {"role": "user", "content": f"{INSTRUCTION}\none?"},
                ASSISTANT,
                USER,
            ],
        ),
    ],
    ids=["text", "has it", "has it in other words", "blank", "system has it", "conversation"],
)
def test_the_instruction_comes_first_and_once(jsonl: Callable[..., Path], prompt: Any, expected: Any) -> None:
    path = jsonl({"prompt": prompt, "response": "1"})
    assert read_source(path, instruction="").rows[0].prompt == prompt
    source = read_source(path, instruction=f" {INSTRUCTION} ")
    assert source.rows[0].prompt == (prompt if expected is None else expected)
    assert source.provenance["instruction"] == INSTRUCTION
    again = read_source(jsonl({"prompt": source.rows[0].prompt, "response": "1"}), instruction=INSTRUCTION)
    assert again.rows[0].prompt == source.rows[0].prompt


@pytest.mark.parametrize("kind", ["parquet directory", "jsonl directory", "parquet", "csv", "saved", "saved splits"])
def test_datasets_on_disk(tmp_path: Path, jsonl: Callable[..., Path], kind: str) -> None:
    data, place = Dataset.from_list(PROBLEMS), tmp_path / "d"
    if kind.endswith("directory"):
        place.mkdir()
        data.to_parquet(place / "train.parquet") if "parquet" in kind else data.to_json(place / "train.jsonl")
    elif kind in ("parquet", "csv"):
        place = place.with_suffix(f".{kind}")
        getattr(data, f"to_{kind}")(place)
    else:
        (DatasetDict({"train": data, "test": data}) if kind == "saved splits" else data).save_to_disk(place)
    source = read_source(place, limit=6, seed=3)
    assert source.rows == read_source(jsonl(*PROBLEMS), limit=6, seed=3).rows
    kept = {"jsonl directory": {"file": "train.jsonl"}, "parquet directory": {"dataset": str(place / "train.parquet")}}
    provenance = {"rows": 20, "drawn": 6} | kept.get(kind, {"dataset": str(place), "split": "train"})
    assert provenance.items() <= source.provenance.items()


def test_a_directory_takes_a_split(tmp_path: Path) -> None:
    Dataset.from_list(PROBLEMS).to_parquet(tmp_path / "test.parquet")
    assert len(read_source(f"{tmp_path}@test[:3]").rows) == 3
    assert len(read_source(tmp_path).rows) == 20  # its one file
    Dataset.from_list(PROBLEMS).to_parquet(tmp_path / "test-2.parquet")
    with pytest.raises(CapreseError, match=r"a dataset with a split \'train\'; found ValueError: .*\[\'test\'\]"):
        read_source(tmp_path)
    (tmp_path / "test-2.parquet").unlink()
    Dataset.from_list([{"question": "a", "answer": 1}]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(CapreseError, match=r"DatasetGenerationError: An error.*Failed to parse string: '#### "):
        read_source(f"{tmp_path}@test")  # the columns of the splits differ
    with pytest.raises(CapreseError, match=r"train.parquet, row 1: expected text in 'answer'; found int 1"):
        read_source(tmp_path / "train.parquet")
    (tmp_path / "none").mkdir()
    with pytest.raises(CapreseError, match="EmptyDatasetError"):
        read_source(tmp_path / "none")


def test_messages_in_a_table_lose_the_keys_that_are_none(tmp_path: Path) -> None:
    chat = [USER | {"name": "Leo"}, ASSISTANT]
    Dataset.from_list([{"messages": chat}] * 2).to_parquet(tmp_path / "train.parquet")
    assert read_source(tmp_path).rows[0].prompt == [USER | {"name": "Leo"}]
    Dataset.from_list([{"text": [USER, ASSISTANT | {"name": "m"}, USER, ASSISTANT]}] * 2).to_parquet(
        tmp_path / "train.parquet"
    )
    assert read_source(tmp_path, prompt_column="text").rows[1].prompt == [USER, ASSISTANT | {"name": "m"}, USER]


def test_hub_names_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    commit = "0123456789" * 4

    def load_dataset(*args: Any, **kwargs: Any) -> Dataset:
        asked.append((args, kwargs))
        data = Dataset.from_list(PROBLEMS)
        data.info.download_checksums = {f"hf://datasets/openai/gsm8k@{commit}/main/train.parquet": {}}
        return data

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    names = ["openai/gsm8k", "openai/gsm8k:main", "openai/gsm8k@test", "openai/gsm8k:main@train[:10%]"]
    for name in names:
        assert read_source(name, 2).provenance["revision"] == commit
    assert asked == [
        (("openai/gsm8k", None), {"split": "train"}),
        (("openai/gsm8k", "main"), {"split": "train"}),
        (("openai/gsm8k", None), {"split": "test"}),
        (("openai/gsm8k", "main"), {"split": "train[:10%]"}),
    ]


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(CapreseError, match=r"openai/gsm8k:main: expected a dataset with .*found ConnectionError"):
        read_source("openai/gsm8k:main")
    with pytest.raises(CapreseError, match=r"readable file; found No such file"):
        read_source("data/train.jsonl")  # a path, though it looks like owner/name
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CapreseError, match=r'the library `datasets`.*pip install "caprese-vllm\[distill\]"'):
        read_source("openai/gsm8k")
