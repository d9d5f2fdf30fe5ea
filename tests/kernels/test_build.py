"""The cache of compiled kernels: what is in it is checked, what killed compilers leave is removed, odd compilers fall
back."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from caprese_kernels.cpu import build

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
SOURCE = 'extern "C" int answer() { return %d; }\n'


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "caprese"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE % 42)
    return path


def answer(source: Path) -> int:
    return int(build.compiled("answer", [source], "x86-64").answer())


@needs_compiler
def test_a_damaged_library_is_compiled_again(cache: Path, source: Path) -> None:
    """In a process of its own: loading a truncated library ends it with SIGBUS."""
    code = (
        "import sys; from pathlib import Path; from caprese_kernels.cpu import build\n"
        "for path in sys.argv[1:]: print(build.compiled('answer', [Path(path)], 'x86-64').answer())"
    )
    sources = []
    other = source.with_name("other.so")
    for number, damage in enumerate(("truncated", "empty", "foreign", "a FIFO", "a broken link")):
        path = source.with_name(f"{number}.cpp")
        path.write_text(SOURCE % number)
        before = set(cache.iterdir()) if cache.exists() else set()
        assert answer(path) == number
        (made,) = set(cache.iterdir()) - before
        whole = made.read_bytes()
        made.unlink()  # the library that this process has loaded stays as it is
        if damage == "truncated":
            made.write_bytes(whole[: len(whole) // 3])
        elif damage == "empty":
            made.touch()
        elif damage == "foreign":
            source.write_text(SOURCE % 13)
            subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(other)], check=True)
            shutil.copy(other, made)
        elif damage == "a FIFO":
            os.mkfifo(made)
        else:
            made.symlink_to("nowhere")
        sources.append((path, made, whole))
    paths = [str(path) for path, _, _ in sources]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0", "1", "2", "3", "4"], done.stderr
    assert done.stderr.count("compiling them again") == 5
    for _, made, whole in sources:
        assert stat.S_ISREG(made.lstat().st_mode)
        assert made.read_bytes() == whole


@needs_compiler
def test_what_a_killed_compiler_left_is_removed(cache: Path, source: Path) -> None:
    cache.mkdir(mode=0o700, parents=True)
    left = cache / ".answer-abc.partial"
    left.mkdir()
    (left / "answer.so").write_bytes(b"half")
    assert answer(source) == 42
    assert [path.suffix for path in cache.iterdir()] == [".so"]


COMPILERS = {
    "a quote that is not closed": "g++ '",
    "spaces": "   ",
    "absent": "no-such-compiler",
    "a folder": "/",
    "fails": "false",
    "writes nothing": "true",
    "reads its input": "cat",
}


@pytest.mark.parametrize("case", COMPILERS)
def test_a_compiler_that_does_not_work(monkeypatch: pytest.MonkeyPatch, cache: Path, source: Path, case: str) -> None:
    monkeypatch.setenv("CXX", COMPILERS[case])
    with pytest.raises(build.Unavailable) as caught:
        build.compiled("answer", [source])
    assert "\n" not in str(caught.value)
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize(
    "body",
    [
        "printf '\\377\\376\\000'; exit 1",  # no text
        "printf '\\033[31merror: red\\n' >&2; exit 1",
        'for last; do :; done; echo "not a library" > "$last"',
        "chmod -x $0; exit 1",
        "yes error: | head -c 3000000 >&2; exit 1",
    ],
)
def test_a_compiler_with_odd_output(
    monkeypatch: pytest.MonkeyPatch, cache: Path, source: Path, tmp_path: Path, body: str
) -> None:
    program = tmp_path / "odd compiler"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{program}'")
    with pytest.raises(build.Unavailable) as caught:
        build.compiled("answer", [source])
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 1000
    assert not list(cache.iterdir()) if cache.exists() else True, "a library that does not load is not kept"


@needs_compiler
def test_a_compiler_that_never_ends(monkeypatch: pytest.MonkeyPatch, cache: Path, source: Path, tmp_path: Path) -> None:
    program = tmp_path / "slow"
    left = tmp_path / "child"
    program.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {left}\nwait\n")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setattr(build, "COMPILE_SECONDS", 1.0)
    with pytest.raises(build.Unavailable, match="took more than"):
        build.compiled("answer", [source])
    state = Path(f"/proc/{int(left.read_text())}/stat")  # it may wait for a parent to collect it
    assert not state.exists() or state.read_text().rpartition(") ")[2].startswith("Z"), "the compiler's child is left"


def test_auto_falls_back_in_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import torch

    from caprese_kernels import backend

    monkeypatch.setenv("CXX", "g++ '")
    build._library.cache_clear()
    backend._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert backend.choose("auto", torch.device("cpu")).NAME == "reference"
    build._library.cache_clear()
    backend._warn_once.cache_clear()
    assert sum("No closing quotation" in record.message for record in caplog.records) == 1
