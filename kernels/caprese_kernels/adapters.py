"""The adapter file, versions 1 and 2: write, read, validate, refuse.

One safetensors file holds, for each sparse layer i, `layers.{i}.L` [D, r] and `layers.{i}.R` [r, D]
(paper, section 3.1), all of one dtype, and in its header `format`, `format_version` and `config`.
Version 2 adds `layers.{i}.prior` [F] float32, which sums to 1: each neuron's share of the statistic of the
distillation data's responses. It may leave L and R out (rank 0). A file without a prior is written as version 1.
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

from . import __version__, hub
from .config import AdapterConfig
from .errors import CapreseError
from .hub import DEFAULT_FILE_NAME
from .validation import validate

FORMAT, FORMAT_VERSIONS = "caprese", ("1", "2")
VERSION_2_SETTINGS = {"score", "prior", "core"}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PRIOR_SUM_ERROR = 1e-3  # how far from 1 a prior may sum: float32's rounding over a million neurons, with room
_TENSOR_NAME = re.compile(r"layers\.(0|[1-9]\d*)\.(L|R|prior)")


@dataclass
class Adapters:
    """All L, R of a model, `left[i]` [D, r] and `right[i]` [r, D] of sparse layer i, and the priors `prior[i]` [F].

    Either may be absent: rank 0 has no L and R, a file of version 1 no priors.
    """

    config: AdapterConfig
    left: dict[int, Tensor] = field(repr=False)
    right: dict[int, Tensor] = field(repr=False)
    prior: dict[int, Tensor] = field(repr=False, default_factory=dict)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of L and R; None where there are none."""
        return next((tensor.dtype for tensor in self.left.values()), None)

    @property
    def num_parameters(self) -> int:
        return sum(t.numel() for t in (*self.left.values(), *self.right.values()))

    @property
    def version(self) -> str:
        """The file version that holds these: 2 with priors, 1 without."""
        return "2" if self.prior else "1"

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by their names in the file."""
        named: dict[str, Tensor] = {}
        for part, tensors in (("L", self.left), ("R", self.right), ("prior", self.prior)):
            named |= {f"layers.{i}.{part}": tensor for i, tensor in tensors.items()}
        return named

    @classmethod
    def from_tensors(cls, config: AdapterConfig, tensors: Mapping[str, Tensor], where: str) -> Adapters:
        """Check every name, shape, dtype and value against `config`; raise CapreseError with the offending name."""
        _check_layers(config, tensors, where)
        base, rank = config.base_model, config.rank
        shapes = {"L": (base.hidden_size, rank), "R": (rank, base.hidden_size), "prior": (base.intermediate_size,)}
        low_rank = [name for name in tensors if not name.endswith(".prior")]
        for name, tensor in tensors.items():
            shape = shapes[name.rpartition(".")[2]]
            if tuple(tensor.shape) != shape:
                _refuse(where, f"{name} of shape {list(shape)}", f"shape {list(tensor.shape)}")
            allowed = DTYPES if name in low_rank else (torch.float32,)
            if tensor.dtype not in allowed:
                names = "bfloat16, float16 or float32" if name in low_rank else "float32"
                _refuse(where, f"{name} in {names}", str(tensor.dtype).removeprefix("torch."))
            if name in low_rank and tensor.dtype != tensors[low_rank[0]].dtype:
                _refuse(
                    where, f"all of L and R in one dtype, {tensors[low_rank[0]].dtype}", f"{name} in {tensor.dtype}"
                )
            if not torch.isfinite(tensor).all():
                _refuse(where, f"finite values in {name}", "NaN or Inf")
            if name not in low_rank:
                _check_prior(name, tensor, where)
        parts = (
            {i: tensors[f"layers.{i}.{part}"] for i in sorted(config.layers) if f"layers.{i}.{part}" in tensors}
            for part in shapes
        )
        return cls(config, *parts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file: it appears whole or not at all. Raises CapreseError for tensors that do not fit."""
        path = Path(path)
        tensors = {name: t.detach().contiguous().cpu() for name, t in self.tensors().items()}
        config = self.config.model_copy(update={"caprese_version": __version__})
        Adapters.from_tensors(config, tensors, str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        settings = config.model_dump_json(exclude=None if self.version == "2" else VERSION_2_SETTINGS)
        header = {"format": FORMAT, "format_version": self.version, "config": settings}
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
    if header.get("format_version") not in FORMAT_VERSIONS:
        raise CapreseError(
            where,
            expected=f"format_version {' or '.join(map(repr, FORMAT_VERSIONS))}",
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
    config.version = header["format_version"]
    if config.version == "1" and (config.rank < 1 or config.uses_version_2):
        found = "rank 0" if config.rank < 1 else f"score {config.score}, prior {config.prior}, core {config.core}"
        _refuse(f"config of {where}", "rank 1 or more, score paper, prior 0, core 0 in a file of version 1", found)
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
    """The adapter file that `weights` names: a file, a directory that holds one, or owner/name[/file]."""
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
    if hub.names_hub(weights):
        return hub.fetch(weights, lambda directory: _find(directory, weights))
    raise CapreseError(
        "adapter weights",
        expected="a file, a directory, or owner/name[/file] on the Hub",
        found=f"nothing at {weights}",
        fix="correct the path",
    )


def _check_layers(config: AdapterConfig, names: Mapping[str, Tensor], where: str) -> None:
    parts = ("L", "R") if config.rank else ()
    has_prior = any(name.endswith(".prior") for name in names)
    if not has_prior and (not config.rank or config.uses_version_2):
        _refuse(where, f"priors of layers {sorted(config.layers)} (its config says that it has them)", "none")
    parts = (*parts, "prior") if has_prior else parts
    expected = {f"layers.{i}.{part}" for i in config.layers for part in parts}
    missing = sorted(expected - set(names), key=_natural)
    surplus = sorted(set(names) - expected, key=_natural)
    if missing:
        _refuse(where, f"tensor {missing[0]} (its config lists layers {sorted(config.layers)})", "no such tensor")
    if surplus:
        known = _TENSOR_NAME.fullmatch(surplus[0])
        kind = "which its config does not announce" if known else "an unknown name"
        _refuse(where, f"only {', '.join(parts)} of layers {sorted(config.layers)}", f"tensor {surplus[0]}, {kind}")


def _check_prior(name: str, prior: Tensor, where: str) -> None:
    if bool((prior < 0).any()):
        _refuse(where, f"shares of 0 or more in {name}", f"{float(prior.min()):g}")
    total = float(prior.double().sum())
    if abs(total - 1.0) > PRIOR_SUM_ERROR:
        _refuse(where, f"shares that sum to 1 in {name}", f"a sum of {total:g}")


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
