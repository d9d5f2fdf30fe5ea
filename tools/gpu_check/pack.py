"""The archive of a stage, and packages brought to a machine without network."""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

KEPT = 1 << 20  # bytes of the start and of the end of a file that the archive keeps


def pack(folder: Path, archive: Path) -> None:
    """Write all files of `folder` to `archive`, in one step: an interruption leaves the earlier archive whole."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    new = archive.with_name(f".{archive.name}.new")
    with tarfile.open(new, "w:gz") as tar:
        for path in _files(folder):
            data = _read(path)
            info = tarfile.TarInfo(f"{folder.name}/{path.relative_to(folder)}")
            info.size, info.mtime = len(data), int(path.stat().st_mtime)
            tar.addfile(info, io.BytesIO(data))
    new.replace(archive)


def _files(folder: Path) -> Iterator[Path]:
    yield from (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())


def _read(path: Path) -> bytes:
    """The file; of a longer one (a log) its first and last KEPT bytes."""
    size = path.stat().st_size
    if size <= 2 * KEPT:
        return path.read_bytes()
    with path.open("rb") as file:
        start = file.read(KEPT)
        file.seek(-KEPT, io.SEEK_END)
        return start + f"\n[{size - 2 * KEPT} bytes left out]\n".encode() + file.read()


def unpack(archive: Path, folder: Path) -> None:
    """Put a stage's archive back into `folder`, whose name is the stage's."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder.parent, filter="data")


def unpack_command(part: Path, site: Path, own: Path | None = None) -> tuple[str, ...]:
    """The command that puts the packages of `part` into `site`.

    A part is a tar of wheels; one that is packed in another way needs the program `own`, called as `own SITE PART`.
    """
    if own is not None:
        return (sys.executable, str(own), str(site), str(part))
    wheels = site.parent / "wheels"
    pip = f"{sys.executable} -m pip install -q --no-index --no-deps --no-compile --upgrade --target"
    return ("sh", "-ec", f"mkdir -p {wheels}; tar -xf {part} -C {wheels}; {pip} {site} $(find {wheels} -name '*.whl')")
