"""Adapter files made to break whoever loads them: each is refused in one line, or loads, and then can be saved."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from caprese_kernels import hub
from caprese_kernels.adapters import Adapters, find_adapter, is_adapter_file
from caprese_kernels.config import CapreseConfig
from caprese_kernels.errors import CapreseError, printable, quote
from caprese_kernels.json_text import parse_json
from tests.support.hostile import ESCAPES, TEXTS, VALUES, assert_one_line, damaged, mutated

CONFIG = {
    "base_model": {
        "name_or_path": "tiny/llama",
        "architecture": "LlamaForCausalLM",
        "hidden_size": 4,
        "intermediate_size": 6,
        "num_hidden_layers": 2,
        "hidden_act": "silu",
    },
    "method": "griffin",
    "density": 0.5,
    "rank": 2,
    "layers": [0, 1],
    "training": {"stage": "end-to-end", "samples": 20, "errors": {"0": {"ridge": 1e-3}}},
    "caprese_version": "0.1.0",
}
LABELS = [
    "BF16",
    "F16",
    "F32",
    "F64",
    "I8",
    "U64",
    "BOOL",
    "C64",
    "F4",
    "F6_E2M3",
    "F6_E3M2",
    "F8_E4M3",
    "F8_E8M0",
    "X",
    "",
]


def header(config: Any = CONFIG, layers: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    names = [f"layers.{i}.{part}" for i in layers for part in "LR"]
    entries = {
        name: {"dtype": "F32", "shape": [4, 2] if name[-1] == "L" else [2, 4], "data_offsets": [32 * n, 32 * n + 32]}
        for n, name in enumerate(names)
    }
    text = config if isinstance(config, str) else json.dumps(config)
    return {"__metadata__": {"format": "caprese", "format_version": "1", "config": text}, **entries}


def pack(head: Any, data: bytes = b"\0" * 128) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + data


def load(path: Path) -> Adapters | None:
    """What loads must save and load again, with the same figures; None for a refusal in one line."""
    try:
        found = Adapters.load(path)
    except CapreseError as error:
        assert_one_line(error, path.name)
        return None
    finally:
        is_adapter_file(path)  # never raises
    again = path.with_name("again.safetensors")
    found.save(again)
    assert Adapters.load(again).config.training == found.config.training
    return found


def test_a_campaign(tmp_path: Path) -> None:
    """Mutated headers, configurations, tensors' lines and bytes, some thousand a run, always the same."""
    rng = random.Random(22)
    path = tmp_path / "a.safetensors"
    path.write_bytes(pack(header()))
    assert load(path) is not None, "the file that is mutated loads"
    loaded = 0
    for number in range(3000):
        kind = number % 6
        if kind == 0:
            data = pack(header(mutated(rng, CONFIG)))
        elif kind == 1:
            data = pack(header(rng.choice(TEXTS)))
        elif kind == 2:
            data = pack(mutated(rng, header()))
        elif kind == 3:
            data = damaged(rng, pack(header()))
        elif kind == 4:
            head = header()
            entry = dict(head["layers.0.L"])
            change = rng.choice(
                [
                    {"dtype": rng.choice(LABELS)},
                    {"shape": rng.choice([[8], [4, -2], [2**62, 4], [4, 2, 1], [], [0, 2], [1.5, 2]])},
                    {"data_offsets": rng.choice([[0, 31], [32, 0], [-32, 0], [0, 2**63], [0, 10**30], [64, 96], [5]])},
                ]
            )
            data = pack(head | {"layers.0.L": entry | change})
        else:
            name = rng.choice(
                [
                    "layers.\u0662.L",
                    "layers.²" + ".L",
                    f"layers.{'9' * 5000}.L",
                    "layers.-1.L",
                    "layers.1e3.R",
                    "",
                    ESCAPES,
                ]
            )
            data = pack(header() | {name: {"dtype": "F32", "shape": [0], "data_offsets": [128, 128]}})
        path.write_bytes(data)
        loaded += load(path) is not None
    assert loaded < 1500, "most are refused"
    assert loaded > 10, "some are not broken"


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_json_texts(text: str) -> None:
    """The same values as Python's parser, or a ValueError in one short line."""
    reason = ""
    try:
        value = parse_json(text)
    except ValueError as error:
        reason = str(error)
    assert len(reason) < 300
    assert reason or value == json.loads(text)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_the_configuration_flag(text: str) -> None:
    try:
        CapreseConfig.parse(text, "--caprese-config")
    except CapreseError as error:
        assert_one_line(error)
    else:
        assert text == "{}"


def test_configurations_of_wrong_values() -> None:
    for key in (*CapreseConfig.model_fields, "unknown", ESCAPES):
        for value in VALUES:
            try:
                CapreseConfig.parse({key: value}, "additional_config")
            except CapreseError as error:
                assert_one_line(error)


def test_quotations_are_short_and_printable() -> None:
    for value in (*VALUES, 10**5000, 2**100_000, b"\0" * 9999, {1: [VALUES] * 99}, torch.zeros(2)):
        assert len(quote(value)) <= 110
    assert printable("a\x1b[31m\ud800\u202e\n") == "a\\x1b[31m\\ud800\\u202e\\x0a"
    assert printable("ä\n\tb\x07", lines=True) == "ä\n\tb\\x07"


BIG = """
import resource, sys, time
from pathlib import Path
import torch
from caprese_kernels.adapters import Adapters, find_adapter, is_adapter_file
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
for name in sys.argv[1:]:
    try:
        Adapters.load(name)
        print("loaded", name)
    except ValueError as error:
        print(len(str(error)), error)
    is_adapter_file(name)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
print(time.monotonic() - started)
"""


def test_memory_and_time_are_bounded(tmp_path: Path) -> None:
    """Millions of layers, a header of megabytes, terabytes of data that are a hole: refused before they are read."""
    million = list(range(3_000_000))
    cases: dict[str, bytes] = {
        "layers": pack(header(CONFIG | {"layers": million})),
        "layers within the bound": pack(header(CONFIG | {"layers": [0] * 250_000})),
        "wrong layers": pack(header(CONFIG | {"layers": ["x"] * 150_000})),
        "keys": pack(header(CONFIG | {f"k{i}": 0 for i in range(50_000)})),
        "tensors": pack(
            header() | {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [128, 128]} for i in range(14_000)}
        ),
        "name": pack(header() | {"n" * 900_000: {"dtype": "F32", "shape": [0], "data_offsets": [128, 128]}}),
        "nested": pack(header('{"a":' * 150_000)),
        "length": b"\xff" * 8 + b"{}",
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    huge = header()
    huge["layers.0.L"] |= {"shape": [4, 2**38], "data_offsets": [0, 2**42]}
    wide = CONFIG | {"rank": 2**16, "base_model": CONFIG["base_model"] | {"hidden_size": 2**16}}  # type: ignore[operator]
    consistent = header(wide)
    for number, entry in enumerate(list(consistent.values())[1:]):
        entry |= {"shape": [2**16, 2**16], "data_offsets": [number * 2**34, (number + 1) * 2**34]}
    length = len(pack(consistent, b"")) + 4 * 2**34
    holes = (("hole", huge, 2**42), ("hole behind", header(), 2**40), ("hole of that size", consistent, length))
    for name, head, size in holes:
        path = tmp_path / name
        path.write_bytes(pack(head))
        try:
            os.truncate(path, size)
        except OSError:  # a file system with a lower limit
            os.truncate(path, 2**34)
        cases[name] = b""
    paths = [str(tmp_path / name) for name in cases]
    done = subprocess.run([sys.executable, "-c", BIG, *paths], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *lines, mebibytes, seconds = done.stdout.splitlines()
    assert len(lines) == len(cases)
    refused = [line for line in lines if not line.startswith("loaded")]
    assert len(refused) == len(cases) - 1, "50,000 keys of a megabyte are allowed"
    assert max(int(line.split()[0]) for line in refused) < 3000
    assert int(mebibytes) < 256
    assert float(seconds) < 60


def test_what_is_no_plain_file_is_refused_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "b.safetensors")
    (folder / "c.safetensors").symlink_to("nowhere")
    (folder / "a.safetensors").write_bytes(pack(header()))
    assert find_adapter(str(folder)).name == "a.safetensors", "a FIFO in the folder blocks nobody"
    (folder / "adapters.safetensors").symlink_to("nowhere")
    assert find_adapter(str(folder)).name == "a.safetensors"
    for path in (folder / "b.safetensors", Path("/dev/zero"), folder / "c.safetensors"):
        with pytest.raises(CapreseError) as caught:
            find_adapter(str(path))
        assert_one_line(caught.value)
        with pytest.raises(CapreseError) as caught:
            Adapters.load(path)
        assert_one_line(caught.value)


def test_a_broken_link_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "fetch", lambda *_: pytest.fail("asked the Hub"))
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").symlink_to("/nowhere/at/all")
    with pytest.raises(CapreseError, match="a link to /nowhere/at/all, where nothing is"):
        find_adapter("owner/name")


def test_a_file_that_changes_while_it_is_loaded(tmp_path: Path) -> None:
    """Replaced, truncated and rewritten all the time: each load gets one version, or says that it got none.

    Two versions differ in configuration and in every tensor. A mapped file that is truncated would end the process.
    """
    path = tmp_path / "a.safetensors"

    def version(number: int) -> bytes:
        config = CONFIG | {"training": {"version": number}}
        return pack(header(config), torch.full((32,), float(number)).numpy().tobytes())

    versions = [version(1), version(2)]
    path.write_bytes(versions[0])
    stop = threading.Event()

    def disturb() -> None:
        rng = random.Random(0)
        while not stop.is_set():
            kind = rng.randrange(3)
            other = path.with_name("other")
            other.write_bytes(rng.choice(versions))
            if kind == 0:
                os.truncate(other, rng.randrange(len(versions[0])))
            os.replace(other, path)

    thread = threading.Thread(target=disturb)
    thread.start()
    seen = {1: 0, 2: 0, "refused": 0}
    try:
        for _ in range(400):
            try:
                found = Adapters.load(path)
            except CapreseError as error:
                assert_one_line(error)
                seen["refused"] += 1
                continue
            number = found.config.training["version"]
            assert all(bool((tensor == number).all()) for tensor in found.tensors().values())
            seen[number] += 1
    finally:
        stop.set()
        thread.join()
    assert min(seen.values()) > 0, seen


def test_loaded_tensors_are_private(tmp_path: Path) -> None:
    """Whoever overwrites or cuts the file later changes no tensor."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(pack(header(), torch.arange(32.0).numpy().tobytes()))
    found = Adapters.load(path)
    os.truncate(path, 10)
    assert float(sum(tensor.sum() for tensor in found.tensors().values())) == sum(range(32))
    assert found.digest is not None


def test_training_that_cannot_be_saved_does_not_load(tmp_path: Path) -> None:
    """And what a program puts there is refused by name."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(pack(header()))
    good = Adapters.load(path)
    nested: Any = 0
    for _ in range(300):
        nested = [nested]
    for value in (nested, "\ud800", 10**200, "x" * 2**20):
        good.config.training["extra"] = value
        with pytest.raises(CapreseError, match="config of adapter") as caught:
            good.save(tmp_path / "b.safetensors")
        assert_one_line(caught.value)
        assert not (tmp_path / "b.safetensors").exists()


def test_data_are_counted_and_not_blocks(tmp_path: Path) -> None:
    """A file system may hold a whole file in few blocks of its own: only what is no data is a hole."""
    from caprese_kernels.tensor_file import _written

    size, data = 1 << 30, 1 << 20
    with (tmp_path / "file").open("w+b") as file:
        file.truncate(size)
        if _written(file.fileno(), size) == size:
            pytest.skip("a file system without holes")
        assert _written(file.fileno(), size) == 0
        file.write(b"x" * data)
        file.flush()
        assert _written(file.fileno(), size) == _written(file.fileno(), data) == data
