"""The one error that a user's mistake raises."""

from typing import Any


class CapreseError(ValueError):
    """A mistake in what the user gave, reported in one line: what was expected, what was found, what to do.

    The command line prints `str(error)` and exits with 1; Python callers catch it as a ValueError.
    """

    def __init__(self, what: str, *, expected: str, found: str, fix: str):
        self.what, self.expected, self.found, self.fix = what, expected, found, fix
        line = f"{what}: expected {expected}; found {found}; {fix}"
        super().__init__(" ".join(line.split()))  # one line, whatever the parts contain

    def __reduce__(self) -> tuple[Any, ...]:  # the default would call __init__ without its keywords when unpickled
        return _rebuild, (self.what, self.expected, self.found, self.fix)


def _rebuild(what: str, expected: str, found: str, fix: str) -> CapreseError:
    return CapreseError(what, expected=expected, found=found, fix=fix)
