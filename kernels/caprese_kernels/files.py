"""Files that may be anything: opened once and checked, written whole or not at all, by one writer at a time.

A reader opens a file with `open_regular` and uses that descriptor alone, so that what it checks is what it reads. A
writer writes into a hidden folder beside the target and moves the finished file over it (`staged`). A run of minutes
holds its output's lock (`output_lock`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shlex
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from .errors import CapreseError

PathLike = str | os.PathLike[str]
MAX_MODEL_CONFIG = 1 << 24  # bytes
_MAX_NAME = 180  # bytes of a name that a hidden one can repeat: file systems allow 255
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def reason(error: OSError) -> str:
    """The error in a few words, without the path: "No such file or directory"."""
    return error.strerror or str(error) or type(error).__name__


@contextlib.contextmanager
def reporting(what: str, *, expected: str, fix: str) -> Iterator[None]:
    """Raise an OSError of the block as a CapreseError about `what`."""
    try:
        yield
    except OSError as error:
        raise CapreseError(what, expected=expected, found=reason(error), fix=fix) from None


def open_regular(path: PathLike) -> BinaryIO:
    """A regular file, opened for reading; never waits.

    Raises OSError for anything else, also for names that no file can have (of a wrong length, with a NUL).
    """
    try:
        _check_regular(os.stat(path), path)  # before opening: opening a device may have effects
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except ValueError:
        raise OSError(errno.EINVAL, "no name of a file", str(path)) from None
    file = os.fdopen(descriptor, "rb")
    try:
        _check_regular(os.fstat(descriptor), path)
    except OSError:
        file.close()
        raise
    return file


def read_bytes(path: PathLike, max_bytes: int) -> bytes:
    """The contents of a regular file. Raises OSError if it cannot be read, or is larger than `max_bytes`."""
    with open_regular(path) as file:
        found = file.read(max_bytes + 1)
    if len(found) > max_bytes:
        raise OSError(errno.EFBIG, f"more than {max_bytes:,} bytes", str(path))
    return found


def read_text(path: PathLike, max_bytes: int) -> str:
    """As `read_bytes`, decoded. Raises OSError for what is not UTF-8, too."""
    try:
        return read_bytes(path, max_bytes).decode()
    except UnicodeDecodeError as error:
        raise OSError(errno.EILSEQ, f"no UTF-8 text (byte {error.start})", str(path)) from None


def check_present(path: Path, what: str) -> None:
    """Raise CapreseError for a link to nothing and for what is neither a file nor a directory: no name on the Hub."""
    if path.is_symlink() and not path.exists():
        found = f"a link to {os.readlink(path)}, where nothing is"
    elif path.exists() and not path.is_dir() and not path.is_file():
        found = f"neither of them at {path}"
    else:
        return
    raise CapreseError(what, expected="a file or a directory", found=found, fix="correct the path")


def check_model(model: str) -> None:
    """Raise CapreseError for a local model whose folder is a link to nothing, or whose config.json is no plain file:
    transformers would ask the Hub for the first, and wait for the second."""
    path = Path(model)
    with reporting(f"model {model}", expected="a folder with a config.json", fix="correct the folder"):
        check_present(path, f"model {model}")
        if path.is_dir() and os.path.lexists(path / "config.json"):
            with open_regular(path / "config.json") as file:
                if os.fstat(file.fileno()).st_size > MAX_MODEL_CONFIG:
                    raise OSError(errno.EFBIG, f"a config.json of more than {MAX_MODEL_CONFIG:,} bytes", str(path))


def check_target(path: PathLike) -> None:
    """Raise OSError unless a regular file is at `path`, or nothing, or a link to either."""
    try:
        _check_regular(os.stat(path), path)
    except FileNotFoundError:
        pass
    except ValueError:
        raise OSError(errno.EINVAL, "no name of a file", str(path)) from None


@contextlib.contextmanager
def staged(path: PathLike) -> Iterator[Path]:
    """Yields the path of a new file, which replaces `path` when the block ends, and is dropped if it raises.

    At any moment `path` is the old file or the new one, whole, whoever else writes it and whatever is killed. Makes the
    folder. A link is kept, and its target replaced. Raises OSError if `path` is no regular file, or cannot be written.
    """
    check_target(path)
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(target.parent, _hidden(target, "")) as folder:
        file = folder / "new"
        file.touch()
        mode = file.stat().st_mode  # as the umask gives it; safetensors makes files that only their owner can read
        yield file
        file.chmod(mode)
        _sync(file)
        check_target(target)
        os.replace(file, target)
        _sync(target.parent)


def write_text(path: PathLike, text: str) -> None:
    """Write a text as `staged` does; what UTF-8 cannot hold is escaped."""
    with staged(path) as new:
        new.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def staging_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A private folder in `parent` for the block; those that killed processes left with the same prefix are removed.

    Its owner holds a lock on it, which ends with the process: so a folder in use is known from one that was left.
    """
    remove_leftovers(parent, prefix)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=parent))
        with contextlib.suppress(FileNotFoundError):  # another process took it for a leftover: make a new one
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            with contextlib.suppress(OSError):  # a file system without locks, where leftovers stay
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if folder.exists():
                break
            os.close(descriptor)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove the staging folders of killed processes whose names begin with `prefix`."""
    with contextlib.suppress(OSError):
        names = [name for name in os.listdir(parent) if name.startswith(prefix) and name.endswith(".partial")]
        for name in names:
            with contextlib.suppress(OSError):  # BlockingIOError: its owner lives
                descriptor = os.open(parent / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(parent / name, ignore_errors=True)
                finally:
                    os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, if it is there, and what killed writers left of it."""
    path.unlink(missing_ok=True)
    target = Path(os.path.realpath(path))
    remove_leftovers(target.parent, _hidden(target, ""))


@contextlib.contextmanager
def output_lock(output: PathLike) -> Iterator[None]:
    """Hold the lock of an output for the block, so that no other process makes it at the same time.

    Raises CapreseError that names the holder, or says why nothing can be written there.
    """
    made: list[Path] = []
    with reporting(f"output {output}", expected="a file that can be written", fix="give another output"):
        check_target(output)
        path = Path(os.path.realpath(output))
        made = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(_hidden(path, "lock"))
        descriptor = _acquire(lock, output)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):  # folders that the run left empty
            for parent in made:
                parent.rmdir()


def _acquire(lock: Path, output: PathLike) -> int:
    """The descriptor of the locked file, which says who has it."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        try:
            _check_regular(os.fstat(descriptor), lock)
            with contextlib.suppress(OSError):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise _held(descriptor, output) from None
            with contextlib.suppress(FileNotFoundError):  # removed by its last holder, while it was opened here
                if os.stat(lock).st_ino == os.fstat(descriptor).st_ino:
                    with contextlib.suppress(OSError):  # a full disk: then the holder has no name
                        os.ftruncate(descriptor, 0)
                        os.write(descriptor, _holder().encode(errors="backslashreplace"))
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _holder() -> str:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {now}: {command[:200]}"


def _held(descriptor: int, output: PathLike) -> CapreseError:
    holder = os.pread(descriptor, 1000, 0).decode(errors="replace")
    return CapreseError(
        f"output {output}",
        expected="no other process that writes it",
        found=holder or "one that has its lock",
        fix="wait for that process, stop it, or give another output",
    )


def _check_regular(found: os.stat_result, path: PathLike) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise OSError(errno.EINVAL, f"{kind}, not a regular file", str(path))


def _hidden(path: Path, suffix: str) -> str:
    """A hidden name for what belongs to the file: ".NAME.suffix"; a digest in place of a name that is too long."""
    name = path.name
    if len(os.fsencode(name)) > _MAX_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}.{suffix}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():  # not on every file system
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
