"""Compile the C++ kernels for this machine's processor, once, and keep the result in a cache.

A library's name in the cache ends with the SHA-256 of its contents. One that does not have it (truncated, replaced) is
removed and compiled again, with a warning: loading it could end the process, or run somebody else's code.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .. import files
from ..errors import printable

logger = logging.getLogger("vllm.caprese")

HERE = Path(__file__).parent
SOURCES = ("ff.cpp", "products.cpp", "statistics.cpp")
HEADERS = ("block.h", "lanes.h", "multiply.h", "rows.h", "vector.h")
COMPILE_SECONDS = 600  # a compiler that takes longer waits for something
MAX_LIBRARY = 1 << 28  # bytes
# -fopenmp: the threads are torch's, whose libgomp is already loaded under the same name.
FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC")


class Unavailable(RuntimeError):
    """Why there are no C++ kernels on this machine."""


def compiler() -> list[str]:
    """$CXX, with options if it has any, or g++, which vLLM's CPU backend needs too (torch.compile)."""
    given = os.environ.get("CXX") or "g++"
    try:
        command = shlex.split(given)
    except ValueError as error:  # a quote that is not closed
        raise Unavailable(f"$CXX cannot be read as a command ({error})") from None
    if not command:
        raise Unavailable("$CXX is empty")
    if shutil.which(command[0]) is None:
        raise Unavailable(f"no C++ compiler ({command[0]} is not on the PATH)")
    return command


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/caprese or ~/.cache/caprese; if neither can be written, this user's folder under /tmp."""
    places = [Path(tempfile.gettempdir()) / f"caprese-{os.getuid()}"]
    with suppress(RuntimeError):  # a user without a home
        places.insert(0, Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "caprese")
    for folder in places:
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.lstat()
            # Code is loaded from here: nobody else may be able to write to the folder.
            own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
            if own and os.access(folder, os.W_OK):
                return folder
    raise Unavailable(f"no private folder for the compiled kernels (tried {', '.join(map(str, places))})")


def library(march: str = "native") -> ctypes.CDLL:
    """The compiled kernels for a processor as the compiler's -march names it; compiled in 10 s if the cache has none.

    Raises Unavailable with the reason.
    """
    found = _library(march)
    if isinstance(found, Unavailable):
        raise found
    return found


@functools.cache
def _library(march: str) -> ctypes.CDLL | Unavailable:
    """`library`, with a failure as a value: trying again would take as long and fail again."""
    try:
        return compiled("ff", [HERE / name for name in SOURCES], march)
    except Unavailable as error:
        return error


def compiled(name: str, sources: Sequence[Path], march: str = "native") -> ctypes.CDLL:
    """The library compiled from C++ sources, which may include this folder's headers; from the cache if it is there.

    Raises Unavailable with the reason.
    """
    path = _compiled(name, sources, march)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        with suppress(OSError):  # so that the next process compiles it again
            path.unlink()
        raise Unavailable(printable(str(error))) from None


def _compiled(name: str, sources: Sequence[Path], march: str) -> Path:
    if platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable(f"no kernels for {platform.machine()} processors")
    cxx = compiler()
    macros = _run([*cxx, f"-march={march}", "-dM", "-E", "-x", "c++", os.devnull])  # the compiler, and what `native` is
    texts = [path.read_text() for path in (*sources, *(HERE / header for header in HEADERS))]
    key = hashlib.sha256("\0".join([macros, *cxx, *FLAGS, *texts]).encode(errors="replace")).hexdigest()[:16]
    folder = cache_folder()
    try:
        kept = _cached(folder, f"{name}-{key}-")
        if kept is not None:
            return kept
        with files.staging_folder(folder, f".{name}-") as scratch:
            made = scratch / f"{name}.so"
            _run([*cxx, *FLAGS, f"-march={march}", f"-I{HERE}", *map(str, sources), "-o", str(made)])
            with made.open("rb") as file:
                os.fsync(file.fileno())
            path = folder / f"{name}-{key}-{_digest(made)}.so"
            made.replace(path)  # atomic, also when several processes compile at once
    except OSError as error:
        raise Unavailable(f"no compiled kernels in {folder}: {files.reason(error)}") from None
    return path


def _cached(folder: Path, prefix: str) -> Path | None:
    """The library in the cache, if its contents are those that were put there; others are removed."""
    for path in sorted(folder.glob(f"{prefix}*.so")):
        try:
            if path.stem == prefix + _digest(path):
                return path
            found = "other contents than those compiled"
        except OSError as error:
            found = files.reason(error)
        logger.warning("Caprese: cached kernels %s: %s; compiling them again", printable(str(path)), found)
        with suppress(OSError):
            path.unlink()
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(files.read_bytes(path, MAX_LIBRARY)).hexdigest()


def _run(command: list[str]) -> str:
    """The command's output. Raises Unavailable if it fails, cannot be started, or takes too long."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise Unavailable(f"{command[0]} cannot be started: {files.reason(error)}") from None
    with process:
        try:
            output, errors = process.communicate(timeout=COMPILE_SECONDS)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what the compiler started: cc1plus does the work
            if isinstance(error, subprocess.TimeoutExpired):
                raise Unavailable(f"{command[0]} took more than {COMPILE_SECONDS} s") from None
            raise
    if process.returncode:
        lines = [line for line in errors.splitlines() if "error" in line] or errors.splitlines()
        reason = printable(lines[0])[:300] if lines else f"exit {process.returncode}"
        raise Unavailable(f"{command[0]} failed: {reason}")
    return output
