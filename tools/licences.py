"""Write docs/licences.md: the packages of requirements/*.txt, with the versions and licences that are installed here.

python -m tools.licences

And docs/licences-cuda.md: those of the hashed file for CUDA. pip describes those that are not installed here in that
version: it reads the metadata in their wheels, and installs nothing.

grep -o '^[^ #]*==[^ ]*' requirements/hashed-cuda-linux-x86_64-py311.txt > pins.txt
pip install --dry-run --ignore-installed --no-deps --only-binary :all: --use-feature=fast-deps --report report.json \\
    -r pins.txt
python -m tools.licences report.json
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE, CUDA_PAGE = ROOT / "docs" / "licences.md", ROOT / "docs" / "licences-cuda.md"
CUDA_LOCK = ROOT / "requirements" / "hashed-cuda-linux-x86_64-py311.txt"
HEAD = """# Packages and their licences

What `make setup` installs, as its packages describe themselves (`python -m tools.licences` writes this page). This
project's own licence is Apache-2.0, and its wheel holds no code of others.

Not listed: torch (BSD-3-Clause), which the Makefile installs before these. [licences-cuda.md](licences-cuda.md) lists
what vLLM with CUDA brings.

| Package | Version | Licence |
|---|---|---|
"""
CUDA_HEAD = """# Packages for CUDA and their licences

What requirements/hashed-cuda-linux-x86_64-py311.txt names, as the packages describe themselves: vLLM, torch and
NVIDIA's CUDA libraries among them. This project has not installed them; it read the metadata in their wheels
(`python -m tools.licences report.json` writes this page). Where that names only a file of a wheel, the file has the
terms. NVIDIA's proprietary ones are the user's to accept.

| Package | Version | Licence |
|---|---|---|
"""


# What a licence's text says, by which it is known where the metadata names none.
_TEXTS = {
    "Apache License": "Apache-2.0",
    "Permission is hereby granted, free of charge": "MIT",
    "Redistribution and use in source and binary": "BSD",
}


def pinned() -> dict[str, str]:
    """The version of every package in requirements/cpu.txt and dev.txt, by name."""
    found: dict[str, str] = {}
    for name in ("cpu.txt", "dev.txt"):
        found |= pins_of(ROOT / "requirements" / name)
    return found


def pins_of(path: Path) -> dict[str, str]:
    """The version of every package in one of them, by its name there."""
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", path.read_text(), re.MULTILINE))


def licence(name: str) -> str:
    """What an installed package's metadata says, or else the first words of its licence's text."""
    if (said := described(metadata.metadata(name).json)) is not None:
        return said
    for file in metadata.files(name) or []:
        if "LICENSE" in file.name.upper():
            text = file.read_text()[:2000]
            return next((title for words, title in _TEXTS.items() if words in text), "not stated")
    return "not stated"


def described(fields: Mapping[str, Any]) -> str | None:
    """The licence expression of a package's metadata, or else its classifiers', or the first line of its licence."""
    if expression := fields.get("license_expression"):
        return str(expression)
    classifiers = [line.rpartition(" :: ")[2] for line in fields.get("classifier", []) if "License ::" in line]
    if classifiers:
        return ", ".join(dict.fromkeys(classifiers))
    lines = str(fields.get("license") or "").strip().splitlines()
    return " ".join(lines[0].split())[:60] if lines else None


def table(licences: Mapping[str, str], versions: Mapping[str, str]) -> str:
    """The rows of a page, by name."""
    rows = ((name, version, licences[name].replace("|", "/")) for name, version in sorted(versions.items()))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page() -> str:
    """The page's text. Raises PackageNotFoundError for a pinned package that is not installed."""
    versions = pinned()
    return HEAD + table({name: licence(name) for name in versions}, versions)


def cuda_page(report: Path) -> str:
    """The page's text, from pip's report. Raises KeyError for a package neither there nor installed in its version."""
    found, licences, versions = dict[tuple[str, str], str](), dict[str, str](), pins_of(CUDA_LOCK)
    for fields in (each["metadata"] for each in json.loads(report.read_text())["install"]):
        files = ", ".join(fields.get("license_file") or [])
        found[normal(fields["name"]), fields["version"]] = described(fields) or files or "not stated"
    for name, version in versions.items():
        licences[name] = licence(name) if installed(name) == version else found[normal(name), version]
    return CUDA_HEAD + table(licences, versions)


def installed(name: str) -> str | None:
    """The installed version of a package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        CUDA_PAGE.write_text(cuda_page(Path(sys.argv[1])), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
