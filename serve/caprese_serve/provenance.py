"""The origin of a result (command, commit, hardware, versions), which every result file has."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .environment import hardware, versions

PACKAGES = ("caprese_vllm", "caprese_kernels", "caprese_distill", "caprese_serve", "caprese_bench")


def provenance() -> dict[str, Any]:
    """Command line, git commit, digest of the sources, hardware, versions and time, as JSON values."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git_commit": git_commit(),
        "source": source_digest(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
    }


def hardware_slug() -> str:
    """A folder name for results of this machine: the GPU's name, or the CPU's if there is no GPU."""
    found = hardware()
    name = found["gpus"][0]["name"] if found["gpus"] else found["cpu"]["model"]
    words = re.sub(r"\((r|tm)\)|\bprocessor\b|\bcpu\b|@.*", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def git_commit() -> str | None:
    """The commit of this checkout, with "-dirty" if tracked files other than results are changed.

    In a copy without git: the environment variable CAPRESE_GIT_COMMIT, or None.
    """
    here = Path(__file__)
    if not _git(here.parent, "ls-files", here.name):  # an installation inside another repository
        return os.environ.get("CAPRESE_GIT_COMMIT")
    commit = _git(here.parent, "rev-parse", "HEAD")
    changed = _git(here.parent, "status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)benchmarks/results")
    return f"{commit}-dirty" if commit and changed else commit


@cache
def source_digest() -> str:
    """16 hex digits of the SHA-256 of the packages' code and task files. Identifies the code where the commit does not:
    if it is dirty or unknown."""
    digest = hashlib.sha256()
    specs = (find_spec(package) for package in PACKAGES)
    folders = (Path(place) for spec in specs if spec for place in spec.submodule_search_locations or ())
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.suffix in {".py", ".cpp", ".h", ".yaml"}):
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
