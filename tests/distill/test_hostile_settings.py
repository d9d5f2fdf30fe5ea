"""Settings files and flags made to break whoever reads them: each is refused in one line."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from caprese_distill.card import _is_ours, _table
from caprese_distill.checkpoint import load, load_progress, save
from caprese_distill.config import DistillConfig
from caprese_distill.settings_file import load_config, read_settings
from caprese_kernels.errors import CapreseError
from tests.support.hostile import ESCAPES, TEXTS, VALUES, assert_one_line, damaged, mutated

SETTINGS: dict[str, Any] = {
    "model": "m",
    "data": "d.jsonl",
    "generate": True,
    "engine": {"a": 1},
    "rank": 8,
    "layers": [0, 1],
}
YAMLS = [
    "rank: 0x" + "f" * 60_000, "rank: 1" + ":1" * 20_000, "rank: " + "9" * 5000, "rank: 1e99999", "rank: .inf",
    "a: *a", "&a [*a]",
    "rank: 2024-13-45", "rank: !!binary ====", "rank: !!set {a, b}", "? [a]\n: b", "? {a: b}\n: c", "<<: 1",
    "<<: [1]", "=: 1", "rank: =",
    "rank: !!timestamp x", "rank: !!int x", "rank: !!float ''", "rank: !!bool x", "rank: !!omap [1]",
    "rank: !!pairs [1]", "%YAML 9.9\n---\na",
    'output: "a\\0b"', 'output: "\\ud800"', 'model: "\\e[31m"', "{" * 9999, "- " * 9999, "a: |\n b\n c",
    "rank: '[/red]'", "\t", "%", "@", "`",
    'data: "\\uD83D"', "!!python/name:os.system", "\u2028", "a: b: c", "---\n---", "...", "rank: _",
    "rank: 0b", "rank: -", "rank: +.e",
]  # fmt: skip


def refused(act: Any) -> bool:
    try:
        act()
    except CapreseError as error:
        assert_one_line(error)
        return True
    return False


def test_yaml_files(tmp_path: Path) -> None:
    rng = random.Random(22)
    path = tmp_path / "[red]\x1b[31m.yaml"
    good = yaml.safe_dump(SETTINGS)
    path.write_text(good)
    assert not refused(lambda: load_config(DistillConfig, {}, path)), "the file that is mutated is right"
    started, count = time.monotonic(), 0
    for number in range(400):
        kind = number % 4
        if number < len(YAMLS):
            data = YAMLS[number].encode(errors="surrogatepass")
        elif kind == 0:
            data = damaged(rng, good.encode())
        elif kind == 1:
            text = yaml.safe_dump(mutated(rng, SETTINGS), allow_unicode=True)
            data = text.encode(errors="surrogatepass")
        elif kind == 2:
            data = (good + f"{rng.choice(list(DistillConfig.options()))}: {rng.choice(YAMLS)[:300]}").encode(
                errors="surrogatepass"
            )
        else:
            data = TEXTS[number // 4 % len(TEXTS)].encode(errors="surrogatepass")
        path.write_bytes(data)
        count += refused(lambda: load_config(DistillConfig, {"data": "d"}, path))
    assert count > 200
    assert time.monotonic() - started < 300


def test_flags_of_wrong_values() -> None:
    for name in DistillConfig.options():
        for value in VALUES:
            refused(lambda name=name, value=value: DistillConfig(**(SETTINGS | {name: value})))
    for text in TEXTS:
        accepted = not refused(lambda text=text: DistillConfig(**(SETTINGS | {"engine": text})))
        assert accepted == (text in ("{}", '{"a": "\\u0000"}')), text[:50]


def test_the_reason_is_said(tmp_path: Path) -> None:
    with pytest.raises(CapreseError, match=r"engine: expected a JSON object .a number of 5,000 digits"):
        DistillConfig(**(SETTINGS | {"engine": '{"a": ' + "9" * 5000 + "}"}))


@pytest.mark.parametrize("kind", ["FIFO", "device", "directory", "broken link"])
def test_what_is_no_plain_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "settings.yaml"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(CapreseError, match="No such file" if kind == "broken link" else kind):
        read_settings(path)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    """A string with the reason, or the checkpoint; never an exception, and never a wait."""
    import torch

    rng = random.Random(22)
    path = tmp_path / "resume"
    save(path, {"a": torch.ones(3)}, {"step": 1}, {"token ids": "x"})
    whole = path.read_bytes()
    for _ in range(500):
        path.write_bytes(damaged(rng, whole))
        load(path, {"token ids": "x"})
        load_progress(path, {"token ids": "x"})
    path.unlink()
    os.mkfifo(path)
    assert load(path, {}) == "it cannot be read (OSError)"
    assert load_progress(path, {}) is None


def test_cards_of_hostile_text(tmp_path: Path) -> None:
    """What is no plain file is no card of ours; text of the data cannot leave its cell, nor reach a terminal."""
    readme = tmp_path / "README.md"
    os.mkfifo(readme)
    assert not _is_ours(readme, "a.safetensors")
    row = _table(("a", "b"), [("|\n| x |", ESCAPES)]).splitlines()[2:]
    assert len(row) == 1
    assert row[0].isprintable()
