"""Prompts with responses of several domains, for what a selection costs where its prior does not come from.

`code` and `prose` come with Python itself, so that every machine has them: functions of the standard library, asked for
by their signature and docstring, and passages of the language reference, asked to be continued.
"""

from __future__ import annotations

import ast
import platform
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprese_kernels.errors import CapreseError

if TYPE_CHECKING:
    from caprese_distill.data.rows import Row

LINES = range(8, 40)  # of a function's source
CHARACTERS = range(400, 1600)  # of a passage's continuation
MODULES = 120  # of the standard library that functions are drawn from


def domain_rows(name: str, source: str, count: int, seed: int) -> tuple[list[Row], dict[str, Any]]:
    """At most `count` rows of a domain, drawn and shuffled with `seed`, and their provenance.

    They are from a file or dataset, or one of BUILT_IN where `source` is empty.

    Raises CapreseError for a domain without a source that is not built in.
    """
    from caprese_distill.data.rows import Row
    from caprese_distill.data.sources import read_source

    if source:
        read = read_source(source, count, seed)
        rows, provenance = list(read.rows), read.provenance
        random.Random(seed).shuffle(rows)
    elif name in BUILT_IN:
        texts = list(BUILT_IN[name]())
        random.Random(seed).shuffle(texts)
        rows = [Row(line, prompt, response) for line, (prompt, response) in enumerate(texts[:count], start=1)]
        provenance = {"python": platform.python_version()}
    else:
        raise CapreseError(
            f"--data {name}",
            expected=f"NAME=FILE, or one of {', '.join(BUILT_IN)}",
            found="no file",
            fix=f"write --data {name}=FILE",
        )
    return rows, provenance


def functions() -> Iterator[tuple[str, str]]:
    """Functions of the standard library: signature and docstring as the prompt, the whole source as the response."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("*.py"))[:MODULES]:
        text = path.read_text(errors="replace")
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if not isinstance(node, ast.FunctionDef) or not (docstring := ast.get_docstring(node)):
                continue
            source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            if source.count("\n") + 1 in LINES:
                signature = f"def {node.name}({ast.unparse(node.args)}):"
                prompt = f'Write this Python function:\n\n{signature}\n    """{docstring}"""'
                yield prompt, f"```python\n{source}\n```"


def passages() -> Iterator[tuple[str, str]]:
    """Passages of Python's language reference: the first paragraph as the prompt, those after it as the response."""
    from pydoc_data.topics import topics

    for text in topics.values():
        paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if part[:1] not in " *"]
        paragraphs = [part for part in paragraphs if len(part) > 100 and "::=" not in part]
        for first in range(0, len(paragraphs) - 3, 4):
            response = "\n\n".join(paragraphs[first + 1 : first + 4])
            if len(response) in CHARACTERS:
                yield f"Continue this text:\n\n{paragraphs[first]}", response


BUILT_IN = {"code": functions, "prose": passages}
