"""Where rows are stored: JSON files, compressed or not, what `datasets` reads from a disk, and datasets of the Hub."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import IO, Any, NoReturn, Protocol

from caprese_kernels.errors import CapreseError

from .bad_rows import BadRow
from .messages import REASONING, is_messages
from .rows import CONTEXT_COLUMNS, PROMPT_COLUMNS, RESPONSE_COLUMNS, SYSTEM_COLUMNS, TEMPLATE_COLUMNS, TOOL_COLUMNS

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson", ".txt")
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # by a file's first bytes
COMPRESSED_SUFFIXES = (".gz", ".zst", ".zstd")
SAMPLED = 100  # rows from which the columns are chosen
_FORMATS = {".parquet": "parquet", ".csv": "csv"}  # files that `datasets` reads; any other is read as JSON
_NAME = re.compile(r"(?P<name>[^:@]+)(:(?P<config>[^@]+))?(@(?P<split>.+))?")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_REVISION = re.compile(r"@([0-9a-f]{40})/")
# Columns of a row, whose lists are no lists of rows. (A conversation's list is known by its messages.)
_OF_ROWS = {*PROMPT_COLUMNS, *RESPONSE_COLUMNS, *CONTEXT_COLUMNS, *SYSTEM_COLUMNS, *TOOL_COLUMNS} | {
    *TEMPLATE_COLUMNS,
    *REASONING,
}
_PLAIN_SPLIT = re.compile(r"\w+")


class Table(Protocol):
    """Rows, by position from 0."""

    name: str
    unit: str  # what rows are numbered in: line or row
    count: int
    provenance: dict[str, Any]

    def sample(self) -> list[Mapping[str, Any]]:
        """The first SAMPLED rows that can be read, from which the columns are chosen."""
        ...

    def read(self, drawn: Sequence[int]) -> Iterator[tuple[int, Mapping[str, Any] | BadRow]]:
        """The rows at `drawn`, ascending, each with its number counted from 1, or why it cannot be read."""
        ...


def open_table(data: str) -> Table:
    """The rows that `data` names: a file, a directory, or owner/name[:config][@split] on the Hub.

    A directory with one file of data is that file. CapreseError for what cannot be read.
    """
    path = Path(data)
    if path.is_file():
        return _open_file(path)
    match = None if path.exists() else _NAME.fullmatch(data)
    name, config, split = (match["name"], match["config"], match["split"]) if match else (data, None, None)
    directory = Path(name)
    if directory.is_dir() and config is None and (files := _data_files(directory, split)):
        return JsonFiles(files, name) if len(files) > 1 else _open_file(files[0])
    return _open_dataset(data, name, config, split or "train")


def _open_file(path: Path) -> Table:
    kind = next((_FORMATS[suffix] for suffix in path.suffixes if suffix in _FORMATS), None)
    if kind is None:
        return JsonFiles([path], str(path))
    dataset = _datasets(str(path)).load_dataset
    table = _load(str(path), "train", lambda: dataset(kind, data_files=str(path), split="train"))
    return DatasetTable(str(path), table, {"dataset": str(path), "config": None, "split": "train"})


def _data_files(directory: Path, split: str | None) -> list[Path]:
    """The files of the split: the directory's one file; or, if all are JSON, those that `datasets` counts to it."""
    suffixes = {*JSON_SUFFIXES, *_FORMATS}
    files = [
        path
        for path in sorted(directory.iterdir())
        if path.is_file() and not path.name.startswith(".") and suffixes & set(path.suffixes)
    ]
    if any(path.name in ("dataset_info.json", "dataset_dict.json") for path in files):
        return []  # written by save_to_disk
    if len(files) == 1 and split is None:
        return files
    if not files or any(_FORMATS.keys() & set(path.suffixes) for path in files):
        return []
    if split is not None and not _PLAIN_SPLIT.fullmatch(split):
        return []  # a slice
    from datasets.data_files import get_data_patterns, resolve_pattern

    base, found = str(directory.absolute()), set[Path]()
    for pattern in get_data_patterns(base).get(split or "train", ()):
        with contextlib.suppress(FileNotFoundError):  # one of a split's patterns is enough
            found.update(map(Path, resolve_pattern(pattern, base)))
    return [path for path in files if path.absolute() in found]


class JsonFiles:
    """Files of JSON objects: one a line, or a list of them (also as the one list in an object).

    They may begin with a byte-order mark, and be compressed by gzip or zstd. Blank lines are skipped; only "\\n" ends a
    line, since JSON strings may contain U+2028. Lines of several files are numbered through.
    """

    def __init__(self, paths: Sequence[Path], name: str):
        self.name, self.count, self.unit = name, 0, "line"
        digest = hashlib.sha256()
        self._sample: list[Mapping[str, Any]] = []
        self._paths, self._lists = list(paths), {path: found for path in paths if (found := _list_in(path)) is not None}
        if self._lists:
            self.unit = "row"
        for _, value in self._values(digest):
            self.count += 1
            if len(self._sample) < SAMPLED:
                row = _object(value)
                if not isinstance(row, BadRow):
                    self._sample.append(row)
        self.provenance = {"file": Path(name).name, "sha256": digest.hexdigest()}

    def sample(self) -> list[Mapping[str, Any]]:
        return self._sample

    def read(self, drawn: Sequence[int]) -> Iterator[tuple[int, Mapping[str, Any] | BadRow]]:
        wanted = set(drawn)
        for i, (number, value) in enumerate(self._values()):
            if i in wanted:
                yield number, _object(value)

    def _values(self, digest: Any = None) -> Iterator[tuple[int, Any]]:
        """Lines as bytes, or the values of a list, with their numbers."""
        before = 0
        for path in self._paths:
            number = before
            if digest and path in self._lists:
                for _ in _lines(path, digest):
                    pass
            values = self._lists.get(path)
            for number, value in enumerate(_lines(path, digest) if values is None else values, start=before + 1):
                if not isinstance(value, bytes) or value.strip():
                    yield number, value
            before = number


def _lines(path: Path, digest: Any = None) -> Iterator[bytes]:
    """The lines, without a byte-order mark; `digest` is updated with the uncompressed bytes."""
    try:
        with _open(path) as file:
            for i, line in enumerate(file):
                if digest:
                    digest.update(line)
                yield line.removeprefix(b"\xef\xbb\xbf") if i == 0 else line
    except (OSError, EOFError, zlib.error) as error:
        found = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        _refuse(str(path), "a readable file", found, "correct the path, or copy the file again")


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        head = file.read(4)
    kind = next((kind for mark, kind in COMPRESSED.items() if head.startswith(mark)), None)
    if kind == "gzip":
        return gzip.open(path)  # type: ignore[return-value]
    if kind == "zstd":
        try:
            import pyarrow
        except ImportError:
            _refuse(str(path), "pyarrow, which reads zstd", "none", 'pip install "caprese-vllm[distill]"')
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _list_in(path: Path) -> list[Any] | None:
    """The values of a file that is one JSON list, or one object with one list of rows in it; None for lines."""
    lines = (line for line in _lines(path) if line.strip())
    head = next(lines, b"").strip()
    if not head.startswith((b"[", b"{")):
        return None
    row = _parsed(head) if head.startswith(b"{") else None
    if row is not None:
        return None if next(lines, None) else _rows_in(row)
    whole = _parsed(b"".join(_lines(path)))
    if isinstance(whole, dict):
        return _rows_in(whole) or [whole]
    return whole  # None: lines, of which the first is bad


def _rows_in(whole: dict[str, Any]) -> list[Any] | None:
    """The one list of objects in an object that is no row itself; None without it."""
    if any(name.lower() in PROMPT_COLUMNS or is_messages(value) for name, value in whole.items()):
        return None
    lists = [value for name, value in whole.items() if name.lower() not in _OF_ROWS and isinstance(value, list)]
    lists = [value for value in lists if value and isinstance(value[0], dict)]
    return lists[0] if len(lists) == 1 else None


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError):
        return None


def _object(value: Any) -> Mapping[str, Any] | BadRow:
    """The JSON object of a line or of a list's value."""
    if isinstance(value, bytes):
        try:
            value = json.loads(value.decode("utf-8").rstrip())
        except UnicodeDecodeError as error:
            return BadRow("text in UTF-8", f"byte {error.start} is not", "convert the file")
        except json.JSONDecodeError as error:
            return BadRow("a JSON object", f"{error.msg} at character {error.pos}", "correct the line")
        except RecursionError:
            return BadRow("a JSON object", "values nested too deeply", "correct the line")
    if not isinstance(value, dict):
        return BadRow("a JSON object", type(value).__name__, "correct the line")
    return value


class DatasetTable:
    """A dataset of the `datasets` library; rows count from 1, as lines do."""

    unit = "row"

    def __init__(self, name: str, dataset: Any, provenance: dict[str, Any]):
        self.name, self.dataset, self.provenance = name, dataset, provenance
        self.count = len(dataset)

    def sample(self) -> list[Mapping[str, Any]]:
        head = self.dataset.select(range(min(SAMPLED, self.count)))
        return [_without_none(row) for row in head]

    def read(self, drawn: Sequence[int]) -> Iterator[tuple[int, Mapping[str, Any] | BadRow]]:
        for i, value in zip(drawn, self.dataset.select(drawn), strict=True):
            yield i + 1, _without_none(value)


def _without_none(value: Any, top: bool = True) -> Any:
    """The value without the keys that are None, but for the columns: in a table all structs have the keys of all."""
    if isinstance(value, dict):
        return {key: _without_none(each, False) for key, each in value.items() if top or each is not None}
    return [_without_none(each, False) for each in value] if isinstance(value, list) else value


def _open_dataset(data: str, name: str, config: str | None, split: str) -> DatasetTable:
    path = Path(name)
    other = (*JSON_SUFFIXES, *_FORMATS, *COMPRESSED_SUFFIXES)
    if not path.exists() and not (_HUB_NAME.fullmatch(name) and path.suffix not in other):
        fix = "correct the path; a dataset of the Hub is owner/name[:config][@split]"
        _refuse(data, "a readable file", "No such file or directory", fix)
    datasets = _datasets(data)

    def load() -> Any:
        if any((path / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
            found = datasets.load_from_disk(name)
            return found[split] if isinstance(found, datasets.DatasetDict) else found
        return datasets.load_dataset(name, config, split=split)

    dataset = _load(data, split, load)
    provenance: dict[str, Any] = {"dataset": name, "config": config, "split": split}
    sources = " ".join(map(str, dataset.info.download_checksums or {}))  # hf://datasets/owner/name@revision/file
    if revision := _REVISION.search(sources):
        provenance["revision"] = revision[1]
    return DatasetTable(data, dataset, provenance)


def _datasets(data: str) -> Any:
    try:
        import datasets
    except ImportError:
        _refuse(data, "the library `datasets` to read it", "none", 'pip install "caprese-vllm[distill]"')
    return datasets


def _load(data: str, split: str, load: Any) -> Any:
    try:
        return load()
    except Exception as error:  # of network, Hub, file formats; KeyError for a missing split of a DatasetDict
        reason = f" ({error.__cause__})" if error.__cause__ else ""
        _refuse(
            data,
            f"a dataset with a split {split!r}",
            shorten(f"{type(error).__name__}: {error}{reason}", 400),
            "check name, config and split (NAME:CONFIG@SPLIT) and the network, or give a JSONL file",
        )


def _refuse(where: str, expected: str, found: str, fix: str) -> NoReturn:
    raise CapreseError(where, expected=expected, found=found, fix=fix)
