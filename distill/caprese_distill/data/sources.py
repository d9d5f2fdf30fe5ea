"""From `--data` to rows: the table that it names, its columns, the rows drawn from it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caprese_kernels.errors import CapreseError

from .bad_rows import BadRow, BadRows
from .files import open_table
from .rows import Row, choose_columns, instructed, parse_row


@dataclass(frozen=True)
class Source:
    """The rows drawn, in the order of the data, and their provenance for the adapter file."""

    rows: list[Row]
    provenance: dict[str, Any]
    notes: list[str] = field(default_factory=list)  # what of the data is not used

    def __str__(self) -> str:
        p = self.provenance
        beside = "".join(f", {kind} from {column!r}" for kind, column in p.get("beside", {}).items())
        response = f", responses from {p['response_column']!r}" if p["response_column"] else ""
        where = p.get("file") or p["dataset"]
        return f"{where}: {p['drawn']:,} of {p['rows']:,} rows, prompts from {p['prompt_column']!r}{response}{beside}"


def read_source(
    data: str | Path,
    limit: int | None = None,
    seed: int = 0,
    *,
    prompt_column: str | None = None,
    response_column: str | None = None,
    responses: bool = True,
    instruction: str = "",
    bad_rows: BadRows | None = None,
) -> Source:
    """All rows of `data`, or `limit` of them drawn at random with `seed`, in the order of the data.

    data: a file of JSON lines or a JSON list, perhaps compressed by gzip or zstd; a .parquet or .csv file; a directory
    of such files or one written by `save_to_disk`; or owner/name on the Hub. Directories and names take `:config` and
    `@split` (default: train; slices as in `datasets`). Columns: `choose_columns`. If chat messages end with the
    assistant's, that message is the response, unless `response_column` is given; with `responses` false, no response is
    read. `instruction` goes before the first user message, on its own line, unless the prompt has it.

    A bad row is added to `bad_rows` and left out. CapreseError for data that cannot be read or has no rows or no such
    columns; without `bad_rows` also for the first bad row.
    """
    table = open_table(str(data))
    if not table.count:
        raise CapreseError(str(data), expected="two rows or more", found="none", fix="give other data")
    if bad_rows is not None:
        bad_rows.unit = table.unit
    drawn: Sequence[int] = range(table.count)
    if limit is not None and limit < table.count:
        drawn = sorted(random.Random(seed).sample(drawn, limit))
    sample = table.sample()
    if not sample:
        _, first = next(table.read([0]))
        assert isinstance(first, BadRow)
        raise first.at(f"{table.name}, {table.unit} 1")
    columns = choose_columns(str(data), sample, prompt_column, response_column, responses)
    rows = []
    for number, value in table.read(drawn):
        try:
            if isinstance(value, BadRow):
                raise value
            rows.append(instructed(parse_row(number, value, columns, responses), instruction.strip()))
        except BadRow as bad:
            if bad_rows is None:
                raise bad.at(f"{table.name}, {table.unit} {number}") from None
            bad_rows.add(number, bad)
    if bad_rows is not None:
        bad_rows.check(str(data), len(drawn))
    read: dict[str, Any] = {
        "prompt_column": columns.prompt,
        "response_column": columns.response,
        "instruction": instruction.strip(),
    }
    if columns.beside:
        read["beside"] = dict(columns.beside)
    note = columns.note()
    provenance = {**table.provenance, **read, "rows": table.count, "drawn": len(drawn)}
    return Source(rows, provenance, [note] if note else [])
