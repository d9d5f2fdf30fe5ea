"""Settings from a YAML file, which flags override: `caprese distill --config distill.yaml --rank 64`.

The file is a mapping whose keys are the fields of the verb's settings, the flags' names with underscores:

    model: Qwen/Qwen2.5-1.5B-Instruct
    data: openai/gsm8k:main
    rank: 128
    layers: [0, 1, 2, 3]
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from caprese_kernels import files
from caprese_kernels.errors import CapreseError, quote

from .options import Settings, flag, label

Chosen = TypeVar("Chosen", bound=Settings)
MAX_BYTES = 1 << 16  # of a file
MAX_DEPTH = 8  # of nested values


def load_config(settings: type[Chosen], flags: Mapping[str, Any], file: Path | None = None) -> Chosen:
    """The settings of `file` (YAML), which `flags` override; both by the fields' names.

    CapreseError for the first wrong value; it names the flag, or the file and its key.
    """
    values = read_settings(file) if file is not None else {}
    try:
        return settings(**(values | dict(flags)))
    except CapreseError as error:
        name, fix, known = error.what, error.fix, settings.options()
        where = f"{file}, key {name!r}"
        if name in flags or name not in values:
            where = label(name, known[name]) if name in known else flag(name)
        if name not in known and (near := difflib.get_close_matches(name, known, n=1)):
            fix = f"did you mean {near[0]!r}?"
        raise CapreseError(where, expected=error.expected, found=error.found, fix=fix) from None


def read_settings(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file, not yet checked against the fields.

    CapreseError for a file that cannot be read, is too large, is no YAML mapping, or has tags, aliases, repeated keys
    or values nested too deeply: settings need none of these, and aliases of aliases can grow without bound.
    """
    import yaml

    try:
        text = files.read_bytes(file, MAX_BYTES)
    except OSError as error:
        raise _unreadable(file, f"a readable YAML file of at most {MAX_BYTES} bytes", files.reason(error)) from None
    try:
        _check_events(file, yaml.parse(text, Loader=yaml.SafeLoader))
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except CapreseError:
        raise
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        # All but the first come from PyYAML's readers of dates, numbers and sets that cannot be.
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise _unreadable(file, "YAML", f"{getattr(error, 'problem', None) or error}{where}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise _unreadable(file, "a mapping from options to values, as `rank: 256`", quote(values))
    names = [key.value for key, _ in node.value]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise _unreadable(file, "every key once", f"{quote(repeated[0])} {names.count(repeated[0])} times")
    return values


def _check_events(file: Path, events: Any) -> None:
    import yaml

    depth = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            raise _unreadable(file, "YAML without aliases", f"*{event.anchor} in line {event.start_mark.line + 1}")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise _unreadable(file, f"values nested at most {MAX_DEPTH} deep", "more")


def _unreadable(file: Path, expected: str, found: str) -> CapreseError:
    return CapreseError(f"settings {file}", expected=expected, found=found, fix="correct the file")
