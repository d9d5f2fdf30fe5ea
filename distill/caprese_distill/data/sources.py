"""Where rows come from: a JSONL file, what `datasets` reads from a disk, or a dataset of the Hub.

A row is a prompt (text, or chat messages) and its response (text), in two columns or in one list of messages.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any, NoReturn

from caprese_kernels.errors import CapreseError

from .chat import add_instruction, ends_with_assistant
from .samples import Row

# The first column that exists is used. Where a dataset has both, `solution` has the reasoning and `answer` only the
# final answer.
PROMPT_COLUMNS = ("prompt", "question", "problem", "query", "instruction", "input", "messages", "conversations")
RESPONSE_COLUMNS = ("response", "solution", "generated_solution", "answer", "output", "completion")
_FORMATS = {".parquet": "parquet", ".csv": "csv"}  # files that `datasets` reads; any other is read as JSONL
_NAME = re.compile(r"(?P<name>[^:@]+)(:(?P<config>[^@]+))?(@(?P<split>.+))?")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_REVISION = re.compile(r"@([0-9a-f]{40})/")


@dataclass(frozen=True)
class Source:
    """The rows drawn, in the order of the data, and their provenance for the adapter file."""

    rows: list[Row]
    provenance: dict[str, Any]

    def __str__(self) -> str:
        p = self.provenance
        response = f", responses from {p['response_column']!r}" if p["response_column"] else ""
        where = p.get("file") or p["dataset"]
        return f"{where}: {p['drawn']:,} of {p['rows']:,} rows, prompts from {p['prompt_column']!r}{response}"


@dataclass(frozen=True)
class _Columns:
    prompt: str
    response: str | None  # None: the response, if needed, is the assistant's message that ends the prompt


def read_source(
    data: str | Path,
    limit: int | None = None,
    seed: int = 0,
    *,
    prompt_column: str | None = None,
    response_column: str | None = None,
    responses: bool = True,
    instruction: str = "",
) -> Source:
    """All rows of `data`, or `limit` of them drawn at random with `seed`, in the order of the data.

    data: a JSONL file; a .parquet or .csv file; a directory of such files or one written by `save_to_disk`; or
    owner/name on the Hub. Directories and names take `:config` and `@split` (default: train; slices as in `datasets`).
    Columns: the first of PROMPT_COLUMNS and of RESPONSE_COLUMNS that exists, unless given. If chat messages end with
    the assistant's, that message is the response, unless `response_column` is given; with `responses` false, no
    response is read. `instruction` goes before the first user message, on its own line, unless the prompt has it.

    CapreseError for data that cannot be read or has no rows or no such columns, and for the first bad row drawn.
    """
    path = Path(data)
    table = _JsonLines(path) if path.is_file() and path.suffix not in _FORMATS else _open_table(str(data))
    if not table.count:
        _refuse(str(data), "two rows or more", "none", "give other data")
    columns = _choose(str(data), table.names, table.first, prompt_column, response_column, responses)
    drawn: Sequence[int] = range(table.count)
    if limit is not None and limit < table.count:
        drawn = sorted(random.Random(seed).sample(drawn, limit))
    rows = [_parse(where, n, value, columns, responses) for where, n, value in table.read(drawn, columns)]
    if instruction.strip():
        rows = [replace(row, prompt=add_instruction(row.prompt, instruction.strip())) for row in rows]
    read = {"prompt_column": columns.prompt, "response_column": columns.response, "instruction": instruction.strip()}
    return Source(rows, {**table.provenance, **read, "rows": table.count, "drawn": len(rows)})


class _JsonLines:
    """A JSONL file; blank lines are skipped. Only "\\n" ends a line: JSON strings may contain U+2028."""

    def __init__(self, path: Path):
        self.path, self.count = path, 0
        digest, first = hashlib.sha256(), None
        for number, line in self._lines(digest):
            first = first or (number, line)
            self.count += 1
        self._first = self._value(*first) if first else {}
        self.names = list(self._first)
        self.provenance = {"file": path.name, "sha256": digest.hexdigest()}

    def first(self, column: str) -> Any:
        return self._first[column]

    def read(self, drawn: Sequence[int], columns: _Columns) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
        wanted = set(drawn)
        for i, (number, line) in enumerate(self._lines()):
            if i in wanted:
                yield f"{self.path}, line {number}", number, self._value(number, line)

    def _lines(self, digest: Any = None) -> Iterator[tuple[int, bytes]]:
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if digest:
                        digest.update(line)
                    if line.strip():
                        yield number, line
        except OSError as error:
            _refuse(str(self.path), "a readable file", error.strerror or type(error).__name__, "correct the path")

    def _value(self, number: int, line: bytes) -> Mapping[str, Any]:
        where = f"{self.path}, line {number}"
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            _refuse(where, "text in UTF-8", f"byte {error.start} is not", "convert the file")
        except json.JSONDecodeError as error:
            _refuse(where, "a JSON object", f"{error.msg} at character {error.pos}", "correct the line")
        if not isinstance(value, dict):
            _refuse(where, "a JSON object", type(value).__name__, "correct the line")
        return value


class _Table:
    """A dataset of the `datasets` library; rows count from 1, as lines do."""

    def __init__(self, name: str, dataset: Any, provenance: dict[str, Any]):
        self.name, self.dataset, self.provenance = name, dataset, provenance
        self.names, self.count = list(dataset.column_names), len(dataset)

    def first(self, column: str) -> Any:
        return self.dataset.select_columns([column])[0][column]

    def read(self, drawn: Sequence[int], columns: _Columns) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
        wanted = [column for column in (columns.prompt, columns.response) if column is not None]
        for i, value in zip(drawn, self.dataset.select_columns(wanted).select(drawn), strict=True):
            yield f"{self.name}, row {i + 1}", i + 1, value


def _open_table(data: str) -> _Table:
    match = None if Path(data).exists() else _NAME.fullmatch(data)
    name, config, split = (
        (match["name"], match["config"], match["split"] or "train") if match else (data, None, "train")
    )
    path = Path(name)
    on_hub = bool(_HUB_NAME.fullmatch(name)) and path.suffix not in (".jsonl", ".json", ".txt", *_FORMATS)
    if not path.exists() and not on_hub:
        fix = "correct the path; a dataset of the Hub is owner/name[:config][@split]"
        _refuse(data, "a readable file", "No such file or directory", fix)
    try:
        import datasets
    except ImportError:
        _refuse(data, "the library `datasets` to read it", "none", 'pip install "caprese-vllm[distill]"')
    try:
        if any((path / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
            found = datasets.load_from_disk(name)
            dataset = found[split] if isinstance(found, datasets.DatasetDict) else found
        elif path.is_file():
            dataset = datasets.load_dataset(_FORMATS[path.suffix], data_files=name, split=split)
        else:
            dataset = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of network, Hub, file formats; KeyError for a missing split of a DatasetDict
        reason = f" ({error.__cause__})" if error.__cause__ else ""
        _refuse(
            data,
            f"a dataset with a split {split!r}",
            shorten(f"{type(error).__name__}: {error}{reason}", 400),
            "check name, config and split (NAME:CONFIG@SPLIT) and the network, or give a JSONL file",
        )
    provenance: dict[str, Any] = {"dataset": name, "config": config, "split": split}
    sources = " ".join(map(str, dataset.info.download_checksums or {}))  # hf://datasets/owner/name@revision/file
    if revision := _REVISION.search(sources):
        provenance["revision"] = revision[1]
    return _Table(data, dataset, provenance)


def _choose(
    where: str,
    names: Sequence[str],
    first: Callable[[str], Any],
    prompt: str | None,
    response: str | None,
    responses: bool,
) -> _Columns:
    """The columns to read; `first(column)` is the first row's value."""
    for given, option in ((prompt, "--prompt-column"), (response, "--response-column")):
        if given is not None and given not in names:
            _refuse(where, f"a column {given!r}", _listed(names), f"correct {option}")
    prompt = prompt or next((name for name in PROMPT_COLUMNS if name in names), None)
    if prompt is None:
        expected = f"a column of prompts: one of {', '.join(PROMPT_COLUMNS)}"
        _refuse(where, expected, _listed(names), "name it with --prompt-column")
    if not responses or (response is None and ends_with_assistant(first(prompt))):
        return _Columns(prompt, None)
    response = response or next((name for name in RESPONSE_COLUMNS if name in names and name != prompt), None)
    if response is None:
        _refuse(
            where,
            f"a column of responses: one of {', '.join(RESPONSE_COLUMNS)}; or messages that end with the assistant's",
            _listed(names),
            "name it with --response-column, or let the model generate responses with --generate",
        )
    return _Columns(prompt, response)


def _listed(names: Sequence[str]) -> str:
    return f"the columns {', '.join(names)}" if names else "no column"


def _parse(where: str, number: int, value: Mapping[str, Any], columns: _Columns, responses: bool) -> Row:
    for column in (columns.prompt, columns.response):
        if column is not None and column not in value:
            _refuse(where, f"a key {column!r}, as in the first row", _listed(list(value)), "add it")
    prompt, response = value[columns.prompt], ""
    if columns.response is not None:
        response = _text(where, columns.response, value[columns.response])
    if not isinstance(prompt, list):
        prompt = _text(where, columns.prompt, prompt, "text or a list of chat messages")
        if responses and columns.response is None:
            _refuse(where, "chat messages, as in the first row", "text", "take the row out")
        return Row(number, prompt, response)
    chat = [_message(where, columns.prompt, message) for message in prompt]
    if ends_with_assistant(chat):
        answer = chat.pop()["content"]
        response = answer if responses and columns.response is None else response
    elif responses and columns.response is None:
        _refuse(where, "messages that end with the assistant's, as in the first row", "none", "take the row out")
    if not any(message["role"] == "user" for message in chat):
        _refuse(where, f"a user's message in {columns.prompt!r}", f"{prompt!r:.60}", "take the row out")
    return Row(number, chat, response)


def _text(where: str, column: str, value: Any, expected: str = "text") -> str:
    """Missing text counts as empty: such rows are skipped and counted, since nobody can edit a dataset of the Hub."""
    if value is not None and not isinstance(value, str):
        _refuse(where, f"{expected} in {column!r}", f"{type(value).__name__} {value!r:.60}", "give another column")
    return value or ""


def _message(where: str, column: str, message: Any) -> dict[str, Any]:
    """The message without the keys that are None: in a table, every message has the keys of all messages."""
    if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
        _refuse(where, f"a list of chat messages in {column!r}", f"{message!r:.60}", "give another column")
    content = _text(where, f"{column}.content", message.get("content"))
    return {key: value for key, value in message.items() if value is not None} | {"content": content}


def _refuse(where: str, expected: str, found: str, fix: str) -> NoReturn:
    raise CapreseError(where, expected=expected, found=found, fix=fix)
