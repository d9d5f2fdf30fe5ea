"""The adapter file, version 1: write, read, validate, refuse.

One safetensors file holds, for each sparse layer i, `layers.{i}.L` [D, r] and `layers.{i}.R` [r, D]
(paper, section 3.1), all of one dtype, and in its header `format`, `format_version` and `config`.
It is never a pickle: a file that is not safetensors is refused unread.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import __version__
from .config import AdapterConfig
from .errors import CapreseError
from .validation import validate

FORMAT, FORMAT_VERSION = "caprese", "1"
DEFAULT_FILE_NAME = "adapters.safetensors"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TENSOR_NAME = re.compile(r"layers\.(0|[1-9]\d*)\.([LR])")


@dataclass
class Adapters:
    """All L, R of a model: `left[i]` [D, r] and `right[i]` [r, D] of sparse layer i."""

    config: AdapterConfig
    left: dict[int, Tensor] = field(repr=False)
    right: dict[int, Tensor] = field(repr=False)

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.left.values())).dtype

    @property
    def num_parameters(self) -> int:
        return sum(t.numel() for t in (*self.left.values(), *self.right.values()))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by their names in the file."""
        named = {}
        for i in self.left:
            named[f"layers.{i}.L"], named[f"layers.{i}.R"] = self.left[i], self.right[i]
        return named

    @classmethod
    def from_tensors(cls, config: AdapterConfig, tensors: Mapping[str, Tensor], where: str) -> Adapters:
        """Check every name, shape, dtype and value against `config`; raise CapreseError with the offending name."""
        _check_layers(config, tensors, where)
        depth, rank = config.base_model.hidden_size, config.rank
        first = next(iter(tensors.values())).dtype
        for name, tensor in tensors.items():
            shape = (depth, rank) if name.endswith("L") else (rank, depth)
            if tuple(tensor.shape) != shape:
                _refuse(where, f"{name} of shape {list(shape)}", f"shape {list(tensor.shape)}")
            if tensor.dtype not in DTYPES:
                _refuse(where, f"{name} in bfloat16, float16 or float32", str(tensor.dtype).removeprefix("torch."))
            if tensor.dtype != first:
                _refuse(where, f"all tensors in one dtype, {first}", f"{name} in {tensor.dtype}")
            if not torch.isfinite(tensor).all():
                _refuse(where, f"finite values in {name}", "NaN or Inf")
        layers = sorted(config.layers)
        return cls(config, {i: tensors[f"layers.{i}.L"] for i in layers}, {i: tensors[f"layers.{i}.R"] for i in layers})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file: it appears whole or not at all. Raises CapreseError for tensors that do not fit."""
        path = Path(path)
        tensors = {name: t.detach().contiguous().cpu() for name, t in self.tensors().items()}
        config = self.config.model_copy(update={"caprese_version": __version__})
        Adapters.from_tensors(config, tensors, str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        header = {"format": FORMAT, "format_version": FORMAT_VERSION, "config": config.model_dump_json()}
        try:
            partial.touch()
            mode = partial.stat().st_mode  # as the umask gives it; save_file makes files that only their owner can read
            save_file(tensors, partial, metadata=header)
            partial.chmod(mode)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Adapters:
        """Read and validate a file; raises CapreseError naming what does not fit."""
        where = f"adapter {path}"
        config = read_config(path)
        with _open(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return cls.from_tensors(config, tensors, where)


def read_config(path: str | os.PathLike[str]) -> AdapterConfig:
    """Read and validate only the header's configuration."""
    where = f"adapter {path}"
    with _open(path) as file:
        header = file.metadata() or {}
    if header.get("format") != FORMAT:
        raise CapreseError(
            where,
            expected=f"a header with format {FORMAT!r}",
            found=f"format {header.get('format')!r}",
            fix="this safetensors file is not a Caprese adapter (a model's weights?); make one with `caprese distill`",
        )
    if header.get("format_version") != FORMAT_VERSION:
        raise CapreseError(
            where,
            expected=f"format_version {FORMAT_VERSION!r}",
            found=repr(header.get("format_version")),
            fix="upgrade caprese-vllm, or write the adapter again with this version",
        )
    if "config" not in header:
        _refuse(where, "a 'config' entry in the header", "none")
    try:
        value: Any = json.loads(header["config"])
    except (ValueError, RecursionError) as error:  # not JSON, a number too long, lists too deep
        _refuse(where, "JSON in the header's 'config'", str(error))
    config = validate(AdapterConfig, value, f"config of {where}")
    if len(set(config.layers)) != len(config.layers) or max(config.layers) >= config.base_model.num_hidden_layers:
        _refuse(
            f"config of {where}",
            f"different layers from 0 to {config.base_model.num_hidden_layers - 1}",
            f"layers {config.layers}",
        )
    return config


def is_adapter_file(path: str | os.PathLike[str]) -> bool:
    """Whether the file's header says that it is an adapter of any version (never raises)."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def find_adapter(weights: str) -> Path:
    """The adapter file that `weights` names: a file, a directory that holds one, or a Hub id."""
    try:
        return _find(Path(os.path.expanduser(weights)), weights)
    except OSError as error:
        raise CapreseError(
            "adapter weights", expected="a path that can be read", found=f"{weights[:100]!r} ({error.strerror})",
            fix="correct the path",
        ) from None  # fmt: skip


def _find(path: Path, weights: str) -> Path:
    if path.is_file():
        return path.resolve()
    if path.is_dir():
        if (path / DEFAULT_FILE_NAME).is_file():
            return (path / DEFAULT_FILE_NAME).resolve()
        found = sorted(p for p in path.glob("*.safetensors") if is_adapter_file(p))
        if len(found) == 1:
            return found[0].resolve()
        raise CapreseError(
            f"adapter directory {weights}",
            expected=f"{DEFAULT_FILE_NAME}, or one adapter file",
            found=", ".join(p.name for p in found) or "none",
            fix="name the file itself",
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", weights) and not weights.endswith(".safetensors"):
        return _download(weights)
    raise CapreseError(
        "adapter weights", expected="a file, a directory or a Hub id (owner/name)", found=f"nothing at {weights}",
        fix="correct the path",
    )  # fmt: skip


def _download(repo: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, DEFAULT_FILE_NAME))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CapreseError(
            "adapter weights",
            expected=f"a local path, or a Hub id whose {DEFAULT_FILE_NAME} can be fetched",
            found=f"{repo!r} ({type(error).__name__})",
            fix="check the path, the Hub id, and the network",
        ) from None


def _check_layers(config: AdapterConfig, names: Mapping[str, Tensor], where: str) -> None:
    expected = {f"layers.{i}.{part}" for i in config.layers for part in "LR"}
    missing = sorted(expected - set(names), key=_natural)
    surplus = sorted(set(names) - expected, key=_natural)
    if missing:
        _refuse(where, f"tensor {missing[0]} (its config lists layers {sorted(config.layers)})", "no such tensor")
    if surplus:
        kind = "a layer that its config does not list" if _TENSOR_NAME.fullmatch(surplus[0]) else "an unknown name"
        _refuse(where, f"only L and R of layers {sorted(config.layers)}", f"tensor {surplus[0]}, {kind}")


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _refuse(where: str, expected: str, found: str) -> NoReturn:
    raise CapreseError(where, expected=expected, found=found, fix="write the file again with `caprese distill`")


def _open(path: str | os.PathLike[str]) -> Any:
    """`safe_open` that raises CapreseError; reads the first bytes to recognize a pickle."""
    try:
        with open(path, "rb") as file:
            head = file.read(8)
        return safe_open(path, framework="pt")
    except OSError as error:
        found = error.strerror or type(error).__name__
    except SafetensorError as error:
        # PyTorch checkpoints are zip archives; bare pickles begin with the protocol mark.
        pickled = head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))
        found = "a pickle or PyTorch archive" if pickled else f"a truncated or foreign file ({error})"
    raise CapreseError(
        f"adapter {path}",
        expected="a readable safetensors file",
        found=found,
        fix="check the path, or copy the file again; pickles are never loaded",
    )
