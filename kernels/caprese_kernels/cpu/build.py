"""Compile the C++ kernels for this machine's processor, once, and keep the result in a cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("ff.cpp", "masked.cpp", "statistics.cpp")
HEADERS = ("block.h", "rows.h", "vector.h")
# -fopenmp: the threads are torch's, whose libgomp is already loaded under the same name.
FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC")


class Unavailable(RuntimeError):
    """Why there are no C++ kernels on this machine."""


def compiler() -> list[str]:
    """$CXX, with options if it has any, or g++, which vLLM's CPU backend needs too (torch.compile)."""
    command = shlex.split(os.environ.get("CXX") or "g++")
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
    try:
        return ctypes.CDLL(str(_compiled(name, sources, march)))
    except OSError as error:
        raise Unavailable(str(error)) from None


def _compiled(name: str, sources: Sequence[Path], march: str) -> Path:
    if platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable(f"no kernels for {platform.machine()} processors")
    cxx = compiler()
    macros = _run([*cxx, f"-march={march}", "-dM", "-E", "-x", "c++", os.devnull])  # the compiler, and what `native` is
    texts = [path.read_text() for path in (*sources, *(HERE / header for header in HEADERS))]
    key = hashlib.sha256("\0".join([macros, *cxx, *FLAGS, *texts]).encode()).hexdigest()[:16]
    path = cache_folder() / f"{name}-{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            _run([*cxx, *FLAGS, f"-march={march}", f"-I{HERE}", *map(str, sources), "-o", str(made)])
            with made.open("rb") as file:
                os.fsync(file.fileno())
            made.replace(path)  # atomic, also when several processes compile at once
    return path


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise Unavailable(f"{command[0]} failed: {lines[0] if lines else f'exit {done.returncode}'}")
    return done.stdout
