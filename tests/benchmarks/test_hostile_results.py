"""Result files and data files made to break whoever reads them, and what reaches the terminal of them."""

from __future__ import annotations

import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from rich.text import Text

from caprese_bench.evaluation.questions import read_jsonl
from caprese_bench.evaluation.store import Store
from caprese_bench.results.compare import columns, side_by_side, warnings
from caprese_bench.results.lists import counts, numbers
from caprese_bench.results.recording import recording
from caprese_bench.results.report import Result, table
from caprese_bench.results.schemas import check
from caprese_kernels.errors import CapreseError
from caprese_kernels.terminal import PlainConsole
from tests.support.hostile import ESCAPES, TEXTS, VALUES, assert_one_line, damaged, mutated

RESULT: dict[str, Any] = {
    "name": "decode",
    "provenance": {"command": "c", "git_commit": None, "time": "t", "hardware": {"a": 1}, "versions": {"torch": "2"}},
    "keys": ["arch", "batch"],
    "measures": ["time_ms"],
    "rows": [{"section": "decode", "arch": "a", "batch": 1, "time_ms": 1.5, "variant": "full"}],
    "errors": [],
    "partial": False,
}


def printed(renderable: Any) -> str:
    out = io.StringIO()
    PlainConsole(file=out, width=200, force_terminal=False).print(renderable)
    return out.getvalue()


def test_result_files(tmp_path: Path) -> None:
    """A mutated file is refused in one line, or compared and printed without an escape sequence of its own."""
    rng = random.Random(22)
    path = tmp_path / "decode.json"
    path.write_text(json.dumps(RESULT))
    good = Result.load(path)
    compared = 0
    for number in range(1500):
        if number % 3 == 0:
            data = damaged(rng, json.dumps(RESULT).encode())
        elif number % 3 == 1:
            data = json.dumps(mutated(rng, RESULT)).encode()
        else:
            data = rng.choice(TEXTS).encode(errors="surrogatepass")
        path.write_bytes(data)
        for read in (check, Result.load):
            try:
                found = read(path)
            except CapreseError as error:
                assert_one_line(error)
                continue
            if isinstance(found, Result):
                compared += 1
                text = printed(table(found.name, side_by_side(good, found), columns(found)))
                text += "".join(printed(Text(doubt)) for doubt in warnings(good, found))
                assert text.replace("\n", "").replace("\t", "").isprintable()
    assert compared > 50


def test_rows_of_data_files(tmp_path: Path) -> None:
    """The error names the file and the line."""
    path = tmp_path / "data.jsonl"
    for text in TEXTS:
        path.write_text('{"a": 1}\n\n' + text.replace("\n", " ") + "\n", errors="surrogatepass")
        try:
            rows = read_jsonl(path)
        except CapreseError as error:
            assert_one_line(error, "data.jsonl, line 3")
        else:
            assert rows[0] == {"a": 1}
    path.write_text('{"a": "\u2028"}\n')
    assert read_jsonl(path) == [{"a": "\u2028"}]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CapreseError, match="FIFO"):
        read_jsonl(path)
    with pytest.raises(CapreseError, match="FIFO"):
        Store(path, keep=True)


def test_lists_of_odd_digits() -> None:
    """What isdigit() takes for a digit and int() does not, and numbers of 5,000 digits."""
    for text in ("²", "1,²", "9" * 5000, "\u0662", "1e400", "nan", "inf", "", ",", ESCAPES):
        for parse in (lambda text: counts("--x", text), lambda text: numbers("--x", text, 0, 1)):
            try:
                parse(text)
            except CapreseError as error:
                assert_one_line(error)


def test_the_console_shows_text_as_it_is() -> None:
    """Markup is no markup, escape sequences are escaped, in strings, tables, titles and Text."""
    for value in (str(value) for value in VALUES):
        shown = Table(title=value[:100])
        shown.add_column(value[:50])
        shown.add_row(value[:50])
        for renderable in (value, Text(value), shown):
            text = printed(renderable).replace("\n", "").replace("\t", "")
            assert text.isprintable() or not value.isprintable()
            assert "\x1b" not in text
    assert printed("[/red] [bold]x[/bold] :smile:") == "[/red] [bold]x[/bold] :smile:\n"
    assert printed(f"a{ESCAPES}b").startswith("a\\x1b[2J\\x1b[31mred\\x07")


def test_two_recordings_of_one_file(tmp_path: Path) -> None:
    result = Result("decode", RESULT["provenance"] | {"hardware": {"cpu": {"model": "x", "cores": 1}}}, [], [])
    twice = pytest.raises(CapreseError, match=f"no other process .* process {os.getpid()} ")
    with recording(result, tmp_path, (), None), twice:
        recording(result, tmp_path, (), None).__enter__()
    assert {path.name for path in tmp_path.iterdir()} == {"decode.json", "decode.csv", "decode.html"}


def test_results_are_not_written_onto_devices(tmp_path: Path) -> None:
    (tmp_path / "decode.json").symlink_to("/dev/null")
    result = Result("decode", RESULT["provenance"], [], [])
    with pytest.raises(CapreseError, match="a device"):
        recording(result, tmp_path, (), None).__enter__()
    assert (tmp_path / "decode.json").is_symlink()
