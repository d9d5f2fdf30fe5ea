"""Options that are comma-separated lists."""

from __future__ import annotations

import re
from collections.abc import Collection

from caprese_kernels.errors import CapreseError


def names(option: str, text: str, known: Collection[str], fix: str = "correct the list") -> list[str]:
    """The names in `text`. Raises CapreseError for one that is not among `known`."""
    found = [part.strip() for part in text.split(",")]
    for name in found:
        if name not in known:
            raise CapreseError(option, expected=f"some of {', '.join(known)}", found=repr(name), fix=fix)
    return found


def one_name(option: str, text: str, known: Collection[str]) -> str:
    """`text` itself. Raises CapreseError if it is not among `known`."""
    if text not in known:
        raise CapreseError(option, expected=f"one of {', '.join(known)}", found=repr(text), fix="choose one of these")
    return text


def counts(option: str, text: str) -> list[int]:
    """The whole numbers from 1 in `text`; none if it is empty. Raises CapreseError for anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(re.fullmatch(r"[0-9]{1,15}", part) and int(part) for part in parts):
        raise CapreseError(
            option, expected="comma-separated whole numbers from 1", found=repr(text), fix="correct the list"
        )
    return [int(part) for part in parts]


def numbers(option: str, text: str, low: float, high: float) -> list[float]:
    """The numbers in `text`, ascending, each once. Raises CapreseError for one outside [low, high], or for none."""
    try:
        found = sorted({float(part) for part in text.split(",")})
        if low <= found[0] and found[-1] <= high:
            return found
    except ValueError:
        pass
    raise CapreseError(
        option,
        expected=f"comma-separated numbers from {low:g} to {high:g}",
        found=repr(text),
        fix="correct the list",
    )
