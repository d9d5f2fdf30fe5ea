"""The adapter file, versions 1 and 2: write, read, validate, refuse.

One safetensors file holds, for each sparse layer i, `layers.{i}.L` [D, r] and `layers.{i}.R` [r, D]
(paper, section 3.1), all of one dtype, and in its header `format`, `format_version` and `config`.
Version 2 adds `layers.{i}.prior` [F] float32, which sums to 1: each neuron's share of the statistic of the
distillation data's responses. It may leave L and R out (rank 0). Only CATS files leave the priors out, which it never
uses. A file of the paper's method without a prior is written as version 1.
It is never a pickle: a file that is not safetensors is refused unread. The header is checked whole, and bounded, before
any tensor is read; tensors are read from the descriptor whose header was checked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from pydantic import ValidationError
from pydantic_core import PydanticSerializationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from . import __version__, files, hub
from .config import AdapterConfig
from .errors import CapreseError, quote
from .hub import DEFAULT_FILE_NAME
from .json_text import parse_json
from .tensor_file import MAX_HEADER, Header, private_copy, read_header, read_metadata
from .validation import validate

FORMAT, FORMAT_VERSIONS = "caprese", ("1", "2")
VERSION_2_SETTINGS = {"score", "prior", "core", "densities"}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PRIOR_SUM_ERROR = 1e-3  # how far from 1 a prior may sum: float32's rounding over a million neurons, with room
_TENSOR_NAME = re.compile(r"layers\.(0|[1-9][0-9]*)\.(L|R|prior)")
_HEADER_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"} | {
    f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}  # others under their names in the file


@dataclass
class Adapters:
    """All L, R of a model, `left[i]` [D, r] and `right[i]` [r, D] of sparse layer i, and the priors `prior[i]` [F].

    Either may be absent: rank 0 has no L and R, a file of version 1 no priors.
    """

    config: AdapterConfig
    left: dict[int, Tensor] = field(repr=False)
    right: dict[int, Tensor] = field(repr=False)
    prior: dict[int, Tensor] = field(repr=False, default_factory=dict)
    digest: str | None = None  # SHA-256 of the file that they were read from

    @property
    def dtype(self) -> torch.dtype | None:
        """Of L and R; None where there are none."""
        return next((tensor.dtype for tensor in self.left.values()), None)

    @property
    def num_parameters(self) -> int:
        return sum(t.numel() for t in (*self.left.values(), *self.right.values()))

    @property
    def version(self) -> str:
        """The file version that holds these: 2 with priors, or a score that version 1 cannot name; else 1."""
        return "2" if self.prior or self.config.uses_version_2 else "1"

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by their names in the file."""
        named: dict[str, Tensor] = {}
        for part, tensors in (("L", self.left), ("R", self.right), ("prior", self.prior)):
            named |= {f"layers.{i}.{part}": tensor for i, tensor in tensors.items()}
        return named

    @classmethod
    def from_tensors(cls, config: AdapterConfig, tensors: Mapping[str, Tensor], where: str) -> Adapters:
        """Check every name, shape, dtype and value against `config`; raise CapreseError with the offending name."""
        shapes = {name: (list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}
        _check_densities(config, where)
        _check_shapes(config, shapes, where)
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                _refuse(where, f"finite values in {name}", "NaN or Inf")
            if name.endswith(".prior"):
                _check_prior(name, tensor, where)
        left, right, prior = (
            {i: tensors[f"layers.{i}.{part}"] for i in sorted(config.layers) if f"layers.{i}.{part}" in tensors}
            for part in ("L", "R", "prior")
        )
        return cls(config, left, right, prior)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file: it appears whole or not at all. Raises CapreseError for tensors or a configuration that
        `load` would refuse, and for a path that cannot be written."""
        where = f"adapter {path}"
        tensors = {name: t.detach().contiguous().cpu() for name, t in self.tensors().items()}
        config = self.config.model_copy(update={"caprese_version": __version__})
        Adapters.from_tensors(config, tensors, where)
        try:
            absent = {"densities"} if config.densities is None else None  # a uniform file is what it always was
            settings = config.model_dump_json(exclude=absent if self.version == "2" else VERSION_2_SETTINGS)
            parse_json(settings, MAX_HEADER)
        except (PydanticSerializationError, ValueError, RecursionError) as error:
            raise CapreseError(
                f"config of {where}", expected="JSON values that load again", found=str(error), fix="correct `training`"
            ) from None
        header = {"format": FORMAT, "format_version": self.version, "config": settings}
        try:
            with files.staged(path) as new:
                save_file(tensors, new, metadata=header)
                _check_header(new, f"config of {where}")
        except (OSError, SafetensorError) as error:
            raise CapreseError(
                where,
                expected="a file that can be written",
                found=files.reason(error) if isinstance(error, OSError) else str(error),
                fix="free some space, or give another path; `caprese distill` continues from its last checkpoint",
            ) from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Adapters:
        """Read and validate a file; raises CapreseError naming what does not fit."""
        where = f"adapter {path}"
        with _open(path) as (file, header):
            config = _config(header.metadata, where)
            shapes = {
                name: (entry.shape, _HEADER_DTYPES.get(entry.dtype, entry.dtype))
                for name, entry in header.tensors.items()
            }
            _check_shapes(config, shapes, where)
            with private_copy(file, header.nbytes) as (copy, digest):
                tensors = {name: copy.get_tensor(name) for name in header.tensors}
        adapters = cls.from_tensors(config, tensors, where)
        adapters.digest = digest
        return adapters


def read_config(path: str | os.PathLike[str]) -> AdapterConfig:
    """Read and validate only the header's configuration."""
    with _open(path) as (_, header):
        return _config(header.metadata, f"adapter {path}")


def _config(header: Mapping[str, str], where: str) -> AdapterConfig:
    if header.get("format") != FORMAT:
        raise CapreseError(
            where,
            expected=f"a header with format {FORMAT!r}",
            found=f"format {quote(header.get('format'))}",
            fix="this safetensors file is not a Caprese adapter (a model's weights?); make one with `caprese distill`",
        )
    if header.get("format_version") not in FORMAT_VERSIONS:
        raise CapreseError(
            where,
            expected=f"format_version {' or '.join(map(repr, FORMAT_VERSIONS))}",
            found=quote(header.get("format_version")),
            fix="upgrade caprese-vllm, or write the adapter again with this version",
        )
    if "config" not in header:
        _refuse(where, "a 'config' entry in the header", "none")
    try:
        value: Any = parse_json(header["config"], MAX_HEADER)
    except ValueError as error:  # not JSON, a number too long, lists too deep
        _refuse(where, "JSON in the header's 'config'", str(error))
    config = validate(AdapterConfig, value, f"config of {where}")
    config.version = header["format_version"]
    if config.version == "1" and (config.rank < 1 or config.uses_version_2):
        found = "rank 0" if config.rank < 1 else f"score {config.score}, prior {config.prior}, core {config.core}"
        found = found if config.densities is None else "densities"
        _refuse(f"config of {where}", "rank 1 or more, score paper, prior 0, core 0 in a file of version 1", found)
    _check_densities(config, where)
    if len(set(config.layers)) != len(config.layers) or max(config.layers) >= config.base_model.num_hidden_layers:
        _refuse(
            f"config of {where}",
            f"different layers from 0 to {config.base_model.num_hidden_layers - 1}",
            f"layers {quote(config.layers)}",
        )
    return config


def _check_densities(config: AdapterConfig, where: str) -> None:
    if config.densities is not None and len(config.densities) != len(config.layers):
        _refuse(
            f"config of {where}", f"a density for each of its {len(config.layers)} layers", f"{len(config.densities)}"
        )


def is_adapter_file(path: str | os.PathLike[str]) -> bool:
    """Whether the file's header says that it is an adapter of any version (never raises)."""
    try:
        with files.open_regular(path) as file:
            return read_metadata(file).get("format") == FORMAT
    except (OSError, ValueError):
        return False


def find_adapter(weights: str) -> Path:
    """The adapter file that `weights` names: a file, a directory that holds one, or owner/name[/file]."""
    try:
        return _find(Path(os.path.expanduser(weights)), weights)
    except (OSError, ValueError) as error:
        if isinstance(error, CapreseError):
            raise
        error = error if isinstance(error, OSError) else OSError(str(error))
        raise CapreseError(
            "adapter weights",
            expected="a path that can be read",
            found=f"{quote(weights)} ({files.reason(error)})",
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
    files.check_present(path, "adapter weights")
    if hub.names_hub(weights):
        return hub.fetch(weights, lambda directory: _find(directory, weights))
    raise CapreseError(
        "adapter weights",
        expected="a file, a directory, or owner/name[/file] on the Hub",
        found=f"nothing at {weights}",
        fix="correct the path",
    )


def _check_shapes(config: AdapterConfig, tensors: Mapping[str, tuple[list[int], str]], where: str) -> None:
    """Check the names of all tensors, and of each its shape and dtype."""
    _check_layers(config, tensors, where)
    base, rank = config.base_model, config.rank
    shapes = {"L": [base.hidden_size, rank], "R": [rank, base.hidden_size], "prior": [base.intermediate_size]}
    names = {str(dtype).removeprefix("torch.") for dtype in DTYPES}
    first: str | None = None
    for name, (shape, dtype) in tensors.items():
        part = name.rpartition(".")[2]
        if shape != shapes[part]:
            _refuse(where, f"{name} of shape {shapes[part]}", f"shape {quote(shape)}")
        if part == "prior":
            if dtype != "float32":
                _refuse(where, f"{name} in float32", dtype)
            continue
        if dtype not in names:
            _refuse(where, f"{name} in bfloat16, float16 or float32", dtype)
        first = first or dtype
        if dtype != first:
            _refuse(where, f"all of L and R in one dtype, {first}", f"{name} in {dtype}")


def _check_layers(config: AdapterConfig, names: Iterable[str], where: str) -> None:
    names = set(names)
    parts = ("L", "R") if config.rank else ()
    layers = quote(sorted(config.layers))
    has_prior = any(name.endswith(".prior") for name in names)
    if not has_prior and (not config.rank or config.prior_required):
        _refuse(where, f"priors of layers {layers} (its config says that it has them)", "none")
    parts = (*parts, "prior") if has_prior else parts
    ordered = [f"layers.{i}.{part}" for i in sorted(config.layers) for part in parts]
    missing = next((name for name in ordered if name not in names), None)
    if missing:
        _refuse(where, f"tensor {missing} (its config lists layers {layers})", "no such tensor")
    surplus = min(names - set(ordered), key=_natural, default=None)
    if surplus is not None:
        kind = "which its config does not announce" if _TENSOR_NAME.fullmatch(surplus) else "an unknown name"
        _refuse(where, f"only {', '.join(parts)} of layers {layers}", f"tensor {quote(surplus)[1:-1]}, {kind}")


def _check_prior(name: str, prior: Tensor, where: str) -> None:
    if bool((prior < 0).any()):
        _refuse(where, f"shares of 0 or more in {name}", f"{float(prior.min()):g}")
    total = float(prior.double().sum())
    if abs(total - 1.0) > PRIOR_SUM_ERROR:
        _refuse(where, f"shares that sum to 1 in {name}", f"a sum of {total:g}")


def _check_header(path: Path, where: str) -> None:
    with files.open_regular(path) as file:
        try:
            read_header(file)
        except ValueError as error:
            raise CapreseError(
                where, expected="settings that load again", found=str(error), fix="shorten `training`"
            ) from None


def _natural(name: str) -> tuple[int, str]:
    """Short names first: layers.9 before layers.10."""
    return len(name), name


def _refuse(where: str, expected: str, found: str) -> NoReturn:
    raise CapreseError(where, expected=expected, found=found, fix="write the file again with `caprese distill`")


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, Header]]:
    """The file and its header for the block; what goes wrong with either, there too, raises CapreseError.

    The first bytes tell a pickle.
    """
    head = b""
    try:
        with files.open_regular(path) as file:
            head = file.read(8)
            file.seek(0)
            yield file, read_header(file)
            return
    except CapreseError:
        raise
    except OSError as error:
        found = files.reason(error)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        found = f"a truncated or foreign file (header: {'.'.join(map(str, first['loc']))}: {first['msg']})"
    except (SafetensorError, ValueError) as error:
        # PyTorch checkpoints are zip archives; bare pickles begin with the protocol mark.
        pickled = head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))
        found = "a pickle or PyTorch archive" if pickled else f"a truncated or foreign file ({error})"
    raise CapreseError(
        f"adapter {path}",
        expected="a readable safetensors file",
        found=found,
        fix="check the path, or copy the file again; pickles are never loaded",
    )
