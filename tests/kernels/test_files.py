"""Files that are not what they seem, several writers of one file, and writers that are killed."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from caprese_kernels import files
from caprese_kernels.errors import CapreseError

KINDS = ("a directory", "a FIFO", "a socket", "a device")


@pytest.fixture(params=KINDS)
def no_file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Something at a path that is no regular file, and what it is called."""
    path = tmp_path / "it"
    if request.param == "a directory":
        path.mkdir()
        yield path, request.param
    elif request.param == "a FIFO":
        os.mkfifo(path)
        yield path, request.param
    elif request.param == "a socket":
        with socket.socket(socket.AF_UNIX) as made:
            here = Path.cwd()
            os.chdir(tmp_path)  # the name of a socket is at most 107 bytes
            made.bind("it")
            os.chdir(here)
            yield path, request.param
    else:
        yield Path("/dev/null"), request.param


def test_what_is_no_file_is_neither_read_nor_written(no_file: tuple[Path, str]) -> None:
    """At once: a FIFO without a writer blocks whoever opens it."""
    path, kind = no_file
    before = os.lstat(path)
    started = time.monotonic()
    with pytest.raises(OSError, match=kind):
        files.open_regular(path)
    with pytest.raises(OSError, match=kind):
        files.write_text(path, "text")
    with pytest.raises(CapreseError, match=kind), files.output_lock(path):
        pass
    link = path.parent / "link" if path.name == "it" else None
    if link is not None:
        link.symlink_to(path)
        with pytest.raises(OSError, match=kind):
            files.write_text(link, "text")
        with pytest.raises(OSError, match=kind):
            files.open_regular(link)
    assert time.monotonic() - started < 5
    after = os.lstat(path)
    assert (before.st_mode, before.st_ino, before.st_rdev) == (after.st_mode, after.st_ino, after.st_rdev)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\ud800"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    for act in (files.open_regular, lambda path: files.write_text(path, ""), files.check_target):
        with pytest.raises(OSError, match=r".") as caught:
            act(tmp_path / name)
        assert caught.value.errno in (errno.EINVAL, errno.ENAMETOOLONG)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link"
    link.symlink_to("folder/file")  # to nothing, at first
    for text in ("one", "two"):
        files.write_text(link, text)
        assert link.is_symlink()
        assert (tmp_path / "folder" / "file").read_text() == text
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")

    def write_half() -> None:
        with files.staged(path) as new:
            new.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_mode_is_that_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with files.staged(tmp_path / "file") as new:
            new.chmod(0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_long_names(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    with files.output_lock(path):
        files.write_text(path, "text")
    assert list(tmp_path.iterdir()) == [path]


WRITER = """
import sys, time
from pathlib import Path
from caprese_kernels import files
path, letter = Path(sys.argv[1]), sys.argv[2]
end = time.monotonic() + float(sys.argv[3])
while time.monotonic() < end:
    files.write_text(path, letter * 300_000)
print("done")
"""


def test_writers_never_mix(tmp_path: Path) -> None:
    """Three processes write one file, one is killed meanwhile: whoever reads meets one text, whole."""
    path = tmp_path / "file"
    files.write_text(path, "z" * 300_000)
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, letter, "3"], stdout=subprocess.PIPE, text=True) for letter in "ab"]
    victim = subprocess.Popen([*command, "c", "60"])
    reads, seen = 0, set()
    while writers[0].poll() is None or writers[1].poll() is None:
        text = path.read_text()
        assert len(text) == 300_000
        seen |= set(text)
        reads += 1
        if reads > 50 and "c" in seen:
            victim.kill()
    victim.kill()
    victim.wait()
    assert [writer.communicate()[0] for writer in writers] == ["done\n", "done\n"]
    assert {"a", "b"} <= seen
    files.write_text(path, "last")
    assert list(tmp_path.iterdir()) == [path], "what the killed writer left is removed by the next"


HOLDER = """
import sys
from caprese_kernels import files
with files.output_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "adapters.safetensors"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(CapreseError, match=f"process {holder.pid} on .*give another output"), files.output_lock(path):
        pass
    with files.output_lock(path.with_name("another")):
        pass
    holder.kill()  # leaves the lock file, but not the lock
    holder.communicate()
    with files.output_lock(path):
        files.write_text(path, "text")
    assert list(path.parent.iterdir()) == [path]


def test_a_lock_leaves_no_folder_that_it_made(tmp_path: Path) -> None:
    with files.output_lock(tmp_path / "a" / "b" / "file"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())


def test_a_hostile_lock_file(tmp_path: Path) -> None:
    """A FIFO or a link in its place: no waiting, nothing written through it."""
    os.mkfifo(tmp_path / ".a.lock")
    with pytest.raises(CapreseError, match="FIFO"), files.output_lock(tmp_path / "a"):
        pass
    canary = tmp_path / "canary"
    canary.write_text("alive")
    (tmp_path / ".b.lock").symlink_to(canary)
    with pytest.raises(CapreseError), files.output_lock(tmp_path / "b"):
        pass
    assert canary.read_text() == "alive"


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a file system")
def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        files.write_text(disk / "file", "old")
        with pytest.raises(OSError, match="No space left"):
            files.write_text(disk / "file", "new" * 100_000)
        assert (disk / "file").read_text() == "old"
        assert [path.name for path in disk.iterdir()] == ["file"]
    finally:
        subprocess.run(["umount", disk], check=True)
