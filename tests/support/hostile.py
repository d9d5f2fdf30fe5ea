"""Values and bytes that break programs, and what an answer to them must look like."""

from __future__ import annotations

import random
from typing import Any

from caprese_kernels.errors import MAX_PART, CapreseError

ESCAPES = "\x1b[2J\x1b[31mred\x07\r\x9b31m\u202e\x00"
# Values for any place of a JSON document.
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**50, 0.0, -0.0, 1e308, -1e-308, 0.5, "", " ",
    "0", "off",
    "a" * 5000, "[/red]", "[bold]x", "[", "\\[", ":smile:", "%s%n{0}{x}", ESCAPES, "../../etc/passwd",
    "/dev/zero", "\u0662",
    "\ud800", "\u2028", "é" * 300, [], [[]], {}, {"": {}}, [0] * 5000, ["x"] * 5000, {str(i): i for i in range(3000)},
]  # fmt: skip
# JSON texts that no dump of values makes.
TEXTS = [
    "", " ", "{", "[", "null", "0", '"', "{}", "[]", "NaN", "Infinity", "-Infinity", "1e999", "-1e999",
    "9" * 5000, "[" * 100_000,
    '{"a":' * 100_000, "[" * 500 + "]" * 500, '{"a": ' + "9" * 5000 + "}", '{"a": 1, "a": 2}', '{"method": NaN}',
    "\ufeff{}", "{'a': 1}",
    '"\\ud800"', '{"\\ud800": 1}', '{"a": "\\u0000"}', "{}{}", "[1,]", "0x10", "1_000", "\x00",
    '{"a": "\x1b[31m"}', "tru",
]  # fmt: skip


def assert_one_line(error: CapreseError, named: str = "") -> None:
    """A message that a terminal can show and a person read."""
    line = str(error)
    assert line.isprintable(), ascii(line)
    assert len(line) < 4 * MAX_PART + 200, len(line)
    assert named in line
    assert all((error.what, error.expected, error.found, error.fix))


def mutated(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value in which one place is something else, missing, or new."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return value | {str(rng.choice(VALUES))[:200]: rng.choice(VALUES)}
        return value | {key: mutated(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], mutated(rng, value[place]), *value[place + 1 :]]
    return rng.choice(VALUES)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """A copy of the bytes that is cut, or has some flipped, added or doubled."""
    place = rng.randrange(len(data)) if data else 0
    kind = rng.randrange(5)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + rng.randbytes(rng.randint(1, 9)) + data[place:]
    if kind == 2:
        return data[:place] + data[place + rng.randint(1, 50) :]
    if kind == 3:
        return data + data[place:]
    flipped = bytearray(data)
    for _ in range(rng.randint(1, 6) if data else 0):
        flipped[rng.randrange(len(flipped))] = rng.randrange(256)
    return bytes(flipped)
