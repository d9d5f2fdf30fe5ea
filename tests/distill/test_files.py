"""Files as people have them: marks, lists, compression; one answer for a file and for the directory that holds it."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from caprese_distill.data.files import open_table
from caprese_distill.data.sources import read_source
from caprese_kernels.errors import CapreseError
from tests.support.cases import TOOL, needs_shared, shared_files

ROWS = [{"prompt": f"What is {i}? é", "response": f"It is {i}."} for i in range(12)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
LIST = json.dumps(ROWS, indent=2).encode()
MARK = b"\xef\xbb\xbf"


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


FILES: dict[str, bytes] = {
    "lines.jsonl": LINES,
    "lines.json": LINES,
    "lines.txt": LINES,
    "list.json": LIST,
    "list.jsonl": json.dumps(ROWS).encode(),
    "mark.jsonl": MARK + LINES,
    "mark.json": MARK + LIST,
    "windows.jsonl": MARK + LINES.replace(b"\n", b"\r\n"),
    "inside.json": json.dumps({"version": 1, "data": ROWS}, indent=1).encode(),
    "one line.json": json.dumps({"version": 1, "data": ROWS}).encode() + b"\n",
    "lines.jsonl.gz": gzip.compress(LINES, mtime=0),
    "list.json.gz": gzip.compress(MARK + LIST, mtime=0),
    "lines.jsonl.zst": zstd(LINES),
    "list.json.zst": zstd(LIST),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_many_kinds(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    source = read_source(path)
    assert [(row.prompt, row.response) for row in source.rows] == [(row["prompt"], row["response"]) for row in ROWS]
    assert [row.line for row in source.rows] == list(range(1, 13))
    assert source.provenance["file"] == name
    directory = read_source(tmp_path)
    assert (directory.rows, directory.provenance) == (source.rows, source.provenance)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "scores": [{"x": 1}]},
        {"prompt": "a", "tools": [TOOL], "response": "b"},
        {"Prompt": "a", "response": "b", "candidates": [{"text": "c"}]},
    ],
)
def test_a_file_of_one_row(tmp_path: Path, row: dict[str, Any], indent: int | None) -> None:
    (tmp_path / "a.json").write_text(json.dumps(row, indent=indent))
    (found,) = read_source(tmp_path / "a.json").rows
    assert found.response == "b"


def test_files_of_a_directory_are_read_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "train-b.jsonl").write_bytes(LINES)
    (tmp_path / "train-a.json.gz").write_bytes(gzip.compress(MARK + LIST[: LIST.index(b"]")] + b"]"))
    (tmp_path / "test.jsonl").write_bytes(LINES[: LINES.index(b"\n")])
    assert len(read_source(tmp_path).rows) == 24
    assert [row.line for row in read_source(tmp_path).rows] == list(range(1, 25))
    assert len(read_source(f"{tmp_path}@test").rows) == 1


@needs_shared()
@pytest.mark.parametrize("path", shared_files(), ids=lambda path: path.name)
def test_shared_files_read_as_their_directory(tmp_path: Path, path: Path) -> None:
    (tmp_path / path.name).write_bytes(path.read_bytes())
    assert read_source(tmp_path).rows == read_source(path).rows
    assert len(read_source(path).rows) == 12


def broken(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("name", "data", "found"),
    [
        ("a.jsonl.gz", broken(FILES["lines.jsonl.gz"]), "EOFError"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"x" * 50, "ZSTD"),
    ],
)
def test_broken_compression(tmp_path: Path, name: str, data: bytes, found: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CapreseError, match=f"expected a readable file; found .*{found}"):
        open_table(str(tmp_path / name))


def test_compressed_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CapreseError, match="a readable file; found No such file"):
        open_table("data/none.jsonl.gz")


def test_the_digest_is_of_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest: Callable[[str], str] = lambda name: open_table(str(tmp_path / name)).provenance["sha256"]  # noqa: E731
    for name in ("lines.jsonl", "lines.jsonl.gz", "lines.jsonl.zst", "mark.json", "list.json.gz"):
        (tmp_path / name).write_bytes(FILES[name])
    assert digest("lines.jsonl") == digest("lines.jsonl.gz") == digest("lines.jsonl.zst")
    assert digest("mark.json") == digest("list.json.gz")
