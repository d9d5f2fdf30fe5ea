"""Where a result comes from; goes beside every figure that is written to a file."""

from __future__ import annotations

import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .environment import hardware, versions


def provenance() -> dict[str, Any]:
    """Command line, git commit, hardware, versions and time, as JSON values."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git_commit": git_commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
    }


def git_commit() -> str | None:
    """The commit that this file is checked out from; None outside git.

    With "-dirty" where tracked files differ, other than the results that a run is about to write anew.
    """
    here = Path(__file__)
    if not _git(here.parent, "ls-files", here.name):  # not ours: an environment inside someone's repository
        return None
    commit = _git(here.parent, "rev-parse", "HEAD")
    changed = _git(here.parent, "status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)benchmarks/results")
    return f"{commit}-dirty" if commit and changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
