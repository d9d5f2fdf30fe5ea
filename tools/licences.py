"""Write docs/licences.md: the packages of requirements/*.txt, with the versions and licences that are installed here.

python -m tools.licences
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "licences.md"
HEAD = """# Packages and their licences

What `make setup` installs, as its packages describe themselves (`python -m tools.licences` writes this page). This
project's own licence is Apache-2.0, and its wheel holds no code of others.

Not listed: torch (BSD-3-Clause), which the Makefile installs before these, and the CUDA libraries that its CUDA
build brings, under NVIDIA's own terms.

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
    """The licence expression of an installed package, or else its classifiers', or the first line of its text."""
    described = metadata.metadata(name)
    for field in described.get_all("License-Expression", []):
        return str(field)
    classifiers = [line.rpartition(" :: ")[2] for line in described.get_all("Classifier", []) if "License ::" in line]
    if classifiers:
        return ", ".join(dict.fromkeys(classifiers))
    for field in described.get_all("License", []):
        if field.strip():
            return str(field).strip().splitlines()[0][:60]
    for file in metadata.files(name) or []:
        if "LICENSE" in file.name.upper():
            text = file.read_text()[:2000]
            return next((title for words, title in _TEXTS.items() if words in text), "not stated")
    return "not stated"


def page() -> str:
    """The page's text. Raises PackageNotFoundError for a pinned package that is not installed."""
    rows = [f"| {name} | {version} | {licence(name).replace('|', '/')} |" for name, version in sorted(pinned().items())]
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
