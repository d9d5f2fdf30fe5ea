"""Write requirements/hashed-linux-x86_64-py311.txt: the pins of the other files with the SHA-256 of each wheel.

pip install --dry-run --ignore-installed --no-deps --report report.json -r requirements/cpu.txt -r requirements/dev.txt
python -m tools.lock report.json

The report is pip's, on the platform that the file's name says; pip has the hashes from the index.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

LOCK = Path(__file__).parents[1] / "requirements" / "hashed-linux-x86_64-py311.txt"
HEAD = """# Pins of cpu.txt and dev.txt with the SHA-256 of their wheels: Linux, x86-64, CPython 3.11 (tools/lock.py).
# pip install --no-deps --require-hashes -r requirements/hashed-linux-x86_64-py311.txt
"""


def locked(report: Path) -> str:
    """The file's text from pip's report. Raises KeyError for a package without a hash."""
    lines = {}
    for each in json.loads(report.read_text())["install"]:
        name, version = each["metadata"]["name"], each["metadata"]["version"]
        digest = each["download_info"]["archive_info"]["hashes"]["sha256"]
        lines[name.lower()] = f"{name}=={version} \\\n    --hash=sha256:{digest}\n"
    return HEAD + "".join(lines[name] for name in sorted(lines))


if __name__ == "__main__":
    LOCK.write_text(locked(Path(sys.argv[1])), encoding="utf-8")
