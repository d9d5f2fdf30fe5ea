"""Compiles the C++ kernels for this machine's processor, once, and keeps the result."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = ("ff.cpp", "masked.cpp", "statistics.cpp")
HEADERS = ("block.h", "rows.h", "vector.h")
# -fopenmp: the thread pool is torch's, whose libgomp is loaded already under the same name.
FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC")


class Unavailable(RuntimeError):
    """Why there are no C++ kernels on this machine."""


def compiler() -> str:
    """$CXX, or g++, which vLLM's CPU backend needs too (torch.compile)."""
    found = shutil.which(os.environ.get("CXX") or "g++")
    if found is None:
        raise Unavailable(f"no C++ compiler ({os.environ.get('CXX') or 'g++'} is not on the PATH)")
    return found


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/caprese, ~/.cache/caprese, or where neither can be written a folder of this user's under /tmp."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "caprese"
    for folder in (home, Path(tempfile.gettempdir()) / f"caprese-{os.getuid()}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        # Code is loaded from here: nobody else may own it.
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    raise Unavailable(f"no folder for the compiled kernels ({home} cannot be written)")


@functools.cache
def library(march: str = "native") -> ctypes.CDLL:
    """The compiled kernels for a processor as g++'s -march names it; compiled if the cache has none (5 s).

    Raises Unavailable with the reason.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable(f"no kernels for {platform.machine()} processors")
    cxx, here = compiler(), Path(__file__).parent
    target = _run([cxx, f"-march={march}", "-Q", "--help=target"])  # "native" spelled out
    version = _run([cxx, "--version"])
    sources = [(here / name).read_text() for name in (*SOURCES, *HEADERS)]
    key = hashlib.sha256("\0".join([target, version, *FLAGS, *sources]).encode()).hexdigest()[:16]
    path = cache_folder() / f"ff-{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            _run([cxx, *FLAGS, f"-march={march}", *(str(here / name) for name in SOURCES), "-o", str(made)])
            made.replace(path)  # whole or not at all, also when several processes compile at once
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path} cannot be loaded: {error}") from None


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise Unavailable(f"{command[0]} failed: {lines[0] if lines else f'exit {done.returncode}'}")
    return done.stdout
