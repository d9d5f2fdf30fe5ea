"""Reading a safetensors file that may be anything: one descriptor, a bounded header, a private copy of the tensors."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open

from .json_text import parse_json

MAX_HEADER = 1 << 20  # bytes: names, shapes and settings of thousands of layers
LARGE = 1 << 28  # bytes; a larger file is not read if most of it was never written
_CHUNK = 1 << 22


class TensorEntry(BaseModel):
    """A tensor's line of the header."""

    model_config = ConfigDict(strict=True, extra="forbid")
    dtype: str = Field(max_length=16)  # as safetensors names it: BF16, F16, F32 ...
    shape: list[int] = Field(max_length=8)
    data_offsets: list[int] = Field(min_length=2, max_length=2)


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file."""

    metadata: dict[str, str]
    tensors: dict[str, TensorEntry]
    nbytes: int  # of the whole file, as the header says


def read_header(file: BinaryIO) -> Header:
    """The header, read from the file's start. Raises ValueError with the reason for anything but safetensors, and for
    a header of more than `MAX_HEADER` bytes."""
    value = _read_object(file)
    length = file.tell()
    metadata = value.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(each, str) for each in metadata.values()):
        raise ValueError("metadata that are not texts")
    tensors = {name: TensorEntry.model_validate(entry) for name, entry in value.items()}
    end = max((entry.data_offsets[1] for entry in tensors.values()), default=0)
    return Header(metadata, tensors, length + end)


def read_metadata(file: BinaryIO) -> dict[str, Any]:
    """The header's metadata alone. Raises ValueError as `read_header`."""
    metadata = _read_object(file).get("__metadata__", {})
    return metadata if isinstance(metadata, dict) else {}


def _read_object(file: BinaryIO) -> dict[str, Any]:
    size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER:
        raise ValueError(f"a header of {size:,} bytes, more than the {MAX_HEADER:,} of an adapter")
    text = file.read(size)
    if size < 2 or len(text) < size:
        raise ValueError("no header")
    value = parse_json(text, MAX_HEADER)
    if not isinstance(value, dict):
        raise ValueError("a header that is no object")
    return value


@contextlib.contextmanager
def private_copy(file: BinaryIO, nbytes: int) -> Iterator[tuple[Any, str]]:
    """The first `nbytes` bytes of an open file as safetensors reads them (`safe_open`), and their SHA-256.

    The copy is in memory, so that whoever truncates or overwrites the file while its tensors are used changes nothing.
    Raises ValueError if the file has another size, or changes it meanwhile; SafetensorError for wrong contents.
    """
    found = os.fstat(file.fileno())
    if found.st_size != nbytes:
        raise ValueError(f"{found.st_size:,} bytes where its header announces {nbytes:,}")
    if nbytes > LARGE and (written := _written(file.fileno(), nbytes)) < nbytes // 8:
        raise ValueError(f"{nbytes:,} bytes, of which {written:,} are written and the rest is a hole")
    digest = hashlib.sha256()
    descriptor = os.memfd_create("caprese-adapter", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as copy:
            file.seek(0)
            while copy.tell() < nbytes:
                part = file.read(min(_CHUNK, nbytes - copy.tell()))
                if not part:
                    raise ValueError("a file that shrank while it was read")
                digest.update(part)
                copy.write(part)
        with safe_open(f"/proc/self/fd/{descriptor}", framework="pt") as tensors:
            yield tensors, digest.hexdigest()
    finally:
        os.close(descriptor)


def _written(descriptor: int, nbytes: int) -> int:
    """How many of the file's first bytes are data; all of them on a file system that knows of no holes.

    Not by st_blocks: what compresses, or keeps files elsewhere, reports fewer for a file that is whole.
    """
    written = end = 0
    try:
        while end < nbytes and written < nbytes // 8:  # as much as is asked for: extents can be many
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, begin, os.SEEK_HOLE)
            written += end - begin
    except OSError as error:
        return written if error.errno == errno.ENXIO else nbytes  # ENXIO: no data behind `end`
    return written


__all__ = ["MAX_HEADER", "Header", "SafetensorError", "TensorEntry", "private_copy", "read_header", "read_metadata"]
