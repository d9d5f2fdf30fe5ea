"""Rows that cannot be used: counted, named with the reason, and skipped up to a share of all rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from caprese_kernels.errors import CapreseError

SHOWN = 8  # rows named for each reason


class BadRow(Exception):
    """A row that cannot be used. `expected` is the same for all rows of one reason, `found` is the row's own."""

    def __init__(self, expected: str, found: str, fix: str = "take the row out"):
        super().__init__(f"expected {expected}; found {found}")
        self.expected, self.found, self.fix = expected, found, fix

    def at(self, where: str) -> CapreseError:
        """The error of a run that takes no bad row."""
        return CapreseError(where, expected=self.expected, found=self.found, fix=self.fix)


@dataclass
class BadRows:
    """The bad rows of one run. `share`: the part of all rows that may be bad; above 0, one row always may."""

    share: float
    unit: str = "row"
    _found: dict[str, list[tuple[int, BadRow]]] = field(default_factory=dict)  # by what was expected

    def add(self, number: int, row: BadRow) -> None:
        """Count a row; `number` counts from 1, in the `unit` of the source (line or row)."""
        self._found.setdefault(row.expected, []).append((number, row))

    def __len__(self) -> int:
        return sum(map(len, self._found.values()))

    def allowed(self, total: int) -> int:
        """How many of `total` rows may be bad."""
        return max(1, int(self.share * total)) if self.share else 0

    def check(self, data: str, total: int) -> None:
        """CapreseError, with all reasons, if more than the share of `total` rows are bad."""
        if len(self) > self.allowed(total):
            first = next(iter(self._found.values()))[0][1]
            raise CapreseError(
                f"data {data}",
                expected=f"at most {self.allowed(total)} of {total} rows that cannot be used "
                f"(--max-bad-rows {self.share:g})",
                found=f"{len(self)}: {self.reasons()}",
                fix=f"{first.fix}, or raise --max-bad-rows",
            )

    def reasons(self) -> str:
        """The rows by number, grouped by reason: "lines 3, 8: expected text; found int 3"."""
        return " | ".join(f"{self._numbers(rows)}: {rows[0][1]}" for rows in self._found.values())

    def _numbers(self, rows: list[tuple[int, BadRow]]) -> str:
        shown = ", ".join(str(number) for number, _ in rows[:SHOWN])
        more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
        return f"{self.unit}{'s' if len(rows) > 1 else ''} {shown}{more}"
