"""deploy/'s Dockerfiles as their instructions, and what .dockerignore leaves of the tree for a build."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "deploy").glob("Dockerfile.*"))


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name, and its text with continued lines joined and comments dropped."""

    name: str
    text: str

    @property
    def mounts(self) -> list[dict[str, str]]:
        """The options of a RUN's --mount flags."""
        found = re.findall(r"--mount=(\S+)", self.text) if self.name == "RUN" else []
        return [dict(option.partition("=")[::2] for option in mount.split(",")) for mount in found]

    @property
    def script(self) -> str:
        """What a RUN gives to the shell."""
        return re.sub(r"--mount=\S+\s*", "", self.text)


def instructions(dockerfile: Path) -> list[Instruction]:
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [Instruction(name, text) for name, text in pairs]


def in_context(path: str) -> bool:
    """Whether a build sees this file of the tree. Of .dockerignore's language: `*`, `!path`, and `**/name`."""
    inside = True
    parts = path.split("/")
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        if pattern.startswith("**/"):
            matches = any(fnmatch(part, pattern[3:]) for part in parts)
        else:
            matches = pattern == "*" or path == pattern or path.startswith(f"{pattern}/")
        if matches:
            inside = line.startswith("!")
    return inside


def copy_context(folder: Path) -> Path:
    """A copy of what a build sees. Files that git ignores are not looked at where they fill .venv and out."""
    for top in sorted(path for path in ROOT.iterdir() if path.name not in (".git", ".venv", "out")):
        for path in sorted(top.rglob("*") if top.is_dir() else [top]):
            name = path.relative_to(ROOT).as_posix()
            if path.is_file() and in_context(name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / name)
    return folder


def engine() -> tuple[str | None, str]:
    """docker or podman with a service that answers, else None; and what was found, for a test's reason to skip."""
    found = []
    for program in ("docker", "podman"):
        if shutil.which(program) is None:
            found.append(f"no {program}")
            continue
        try:
            done = subprocess.run([program, "info"], capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            found.append(f"{program}: {type(error).__name__}")
            continue
        if done.returncode == 0:
            return program, program
        found.append(f"{program} info: exit {done.returncode}, no service answers")
    return None, "; ".join(found)
