"""The one error that a user's mistake raises, and text from outside made fit for a line of a message."""

from __future__ import annotations

import re
import reprlib
from typing import Any

MAX_PART = 600  # characters of a part of a message
MAX_QUOTED = 100  # characters of a quoted value
# What a terminal obeys instead of showing it: control characters, ANSI escapes, marks that reverse or hide text, and
# the halves of pairs that no encoding can write.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")
_UNPRINTABLE_IN_LINES = re.compile(_UNPRINTABLE.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))


class CapreseError(ValueError):
    """A mistake in what the user gave, reported in one line: what was expected, what was found, what to do.

    The command line prints `str(error)` and exits with 1; Python callers catch it as a ValueError. Parts may quote
    files and requests as they are: they are cut to `MAX_PART` characters, and unprintable ones are escaped.
    """

    def __init__(self, what: str, *, expected: str, found: str, fix: str):
        self.what, self.expected, self.found, self.fix = (
            _one_line(part) or "nothing" for part in (what, expected, found, fix)
        )
        super().__init__(f"{self.what}: expected {self.expected}; found {self.found}; {self.fix}")

    def __reduce__(self) -> tuple[Any, ...]:  # the default would call __init__ without its keywords when unpickled
        return _rebuild, (self.what, self.expected, self.found, self.fix)


def _rebuild(what: str, expected: str, found: str, fix: str) -> CapreseError:
    return CapreseError(what, expected=expected, found=found, fix=fix)


def printable(text: str, lines: bool = False) -> str:
    """The text with \\x1b in place of an escape character, and so on; `lines`: new lines and tabs stay."""
    return (_UNPRINTABLE_IN_LINES if lines else _UNPRINTABLE).sub(_escaped, text)


def quote(value: Any) -> str:
    """`repr(value)` in at most about `MAX_QUOTED` characters, whatever the value's size and depth."""
    return _shortened(_quoting.repr(value), MAX_QUOTED)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _one_line(text: str) -> str:
    # Cut before the rest, which would take long for megabytes: an escape is at most six characters.
    return _shortened(printable(" ".join(_shortened(text, 10 * MAX_PART).split())), MAX_PART)


def _shortened(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    tail = limit // 4
    return f"{text[: limit - tail]} ... {text[-tail:]}"


class _Quoting(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 4, MAX_QUOTED, MAX_QUOTED
        self.maxlist = self.maxtuple = self.maxset = self.maxdict = 16

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write an integer of more than 4,300 digits.
        return f"an integer of {x.bit_length()} bits" if x.bit_length() > 512 else repr(x)


_quoting = _Quoting()
