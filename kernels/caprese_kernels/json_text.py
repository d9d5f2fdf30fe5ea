"""JSON from files, flags and requests: bounded, and without what later steps cannot hold."""

from __future__ import annotations

import json
import math
from typing import Any

from .errors import quote

MAX_DEPTH = 32  # of nested lists and objects
MAX_DIGITS = 100  # of a number
MAX_BYTES = 1 << 20


def parse_json(text: str | bytes, max_bytes: int = MAX_BYTES) -> Any:
    """The value of a JSON text of at most `max_bytes` bytes (of a str: characters).

    Raises ValueError, with a reason in one short line, for anything else, and for what Python's own parser lets pass:
    NaN and infinite numbers, integers of more than `MAX_DIGITS` digits, a key that stands twice in one object, more
    than `MAX_DEPTH` nested values, and text that cannot be encoded (half a surrogate pair).
    """
    if len(text) > max_bytes:
        raise ValueError(f"{len(text):,} bytes, more than the {max_bytes:,} allowed")
    try:
        if isinstance(text, bytes):
            text = text.decode()
        value = json.loads(
            text, parse_int=_integer, parse_float=_real, parse_constant=_constant, object_pairs_hook=_object
        )
    except RecursionError:
        raise _too_deep() from None
    _check(value)
    return value


def _check(value: Any) -> None:
    """Depth and texts, level by level."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = []
        for each in level:
            if isinstance(each, dict):
                inner += [*each.keys(), *each.values()]
            elif isinstance(each, list):
                inner += each
            elif isinstance(each, str) and not each.isascii():
                _check_text(each)
        if not inner:
            return
        level = inner
    raise _too_deep()


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"text that is not Unicode: {quote(text)}") from None


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {quote(text)}, which is out of range")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"{name}, which is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {quote(repeated)} twice")
    return found


def _too_deep() -> ValueError:
    return ValueError(f"values nested more than {MAX_DEPTH} deep")
