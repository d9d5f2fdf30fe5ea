"""`caprese inspect`: the contents of an adapter file, and whether it fits a model; needs no engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Group
from rich.table import Table
from torch import Tensor

from caprese_kernels import files
from caprese_kernels.adapters import Adapters, find_adapter
from caprese_kernels.config import AdapterConfig, BaseModelInfo, Method, layer_spans
from caprese_kernels.errors import CapreseError, quote
from caprese_kernels.json_text import MAX_BYTES, parse_json
from caprese_kernels.selection import LayerSelector

MAX_SHOWN = 24  # keys of `training` in the table


def inspect(weights: str, model: str | None = None) -> dict[str, Any]:
    """An adapter's configuration, size and norms as JSON values.

    Raises CapreseError for a file that a server would refuse, or, with `model`, for a model that it does not fit.
    """
    path = find_adapter(weights)
    adapters = Adapters.load(path)
    config = adapters.config
    if model is not None:
        config.base_model.check_serves(model_info(model), f"adapter {path}")
    base = config.base_model
    ff_parameters = base.num_ff_matrices * base.hidden_size * base.intermediate_size * base.num_hidden_layers
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "base_model": base.model_dump(),
        "method": config.method,
        "density": config.density,
        "rank": config.rank,
        "file_version": adapters.version,
        "score": config.score,
        "prior": config.prior,
        "core": config.core,
        "layers": sorted(config.layers),
        "dtype": str(adapters.dtype).removeprefix("torch.") if adapters.dtype else None,
        "parameters": adapters.num_parameters,
        "share_of_ff_parameters": adapters.num_parameters / ff_parameters,
        "core_prior_mass": {str(i): _core_mass(config, adapters.prior[i]) for i in adapters.prior},
        "norms": {str(i): _product_norm(adapters.left[i], adapters.right[i]) for i in adapters.left},
        "training": config.training,
        "caprese_version": config.caprese_version,
        "fits_model": model,
    }


def model_info(model: str) -> BaseModelInfo:
    """The dimensions of a model directory or Hub id, from its config.json. Raises CapreseError if unreadable."""
    files.check_model(model)
    path = Path(model) / "config.json"
    try:
        try:
            from transformers import AutoConfig
        except ImportError:  # without transformers only a local file can be read
            return BaseModelInfo.from_hf(SimpleNamespace(**parse_json(files.read_bytes(path, MAX_BYTES))), model)
        return BaseModelInfo.from_hf(AutoConfig.from_pretrained(model).get_text_config(), model)
    except Exception as error:  # transformers raises many types for a configuration that it cannot read
        raise CapreseError(
            f"model {model}",
            expected="a directory or Hub id of a language model whose config.json can be read",
            found=f"{type(error).__name__}: {str(error)[:200]}",
            fix="check the path, the Hub id, and the network",
        ) from None


def render(report: dict[str, Any]) -> Group:
    """An `inspect` report as tables."""
    base = report["base_model"]
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_row("file", f"{report['file']} ({report['bytes'] / 2**20:.2f} MiB)")
    facts.add_row("base model", f"{base['name_or_path']} ({base['architecture']})")
    sizes = f"D {base['hidden_size']}, F {base['intermediate_size']}, {base['num_hidden_layers']} layers"
    facts.add_row("", f"{sizes}, {base['hidden_act']}")
    facts.add_row("method", f"{report['method']}, density {report['density']:g}, rank {report['rank']}")
    facts.add_row("layers", f"{len(report['layers'])} of {base['num_hidden_layers']}: {layer_spans(report['layers'])}")
    if report["file_version"] == "2":
        facts.add_row("selection", f"score {report['score']}, prior {report['prior']:g}, core {report['core']:g}")
    facts.add_row("dtype", report["dtype"] or "no L and R")
    share = report["share_of_ff_parameters"]
    facts.add_row("parameters", f"{report['parameters']:,} ({share:.2%} of the base model's FF parameters)")
    facts.add_row("training", _shown(report["training"]) or "not recorded")
    facts.add_row("written by", f"caprese {report['caprese_version'] or 'unknown'}")
    if report["fits_model"] is not None:
        facts.add_row("fits", f"{report['fits_model']}: yes")
    layers = Table("layer", box=None, pad_edge=False)
    columns = {"norm of L R": (report["norms"], ".4g"), "prior inside the core": (report["core_prior_mass"], ".1%")}
    shown = {title: column for title, column in columns.items() if column[0]}
    for title in shown:
        layers.add_column(title, justify="right")
    for layer in map(str, report["layers"]):
        layers.add_row(layer, *(format(values[layer], spec) for values, spec in shown.values()))
    return Group(facts, "", layers)


def _shown(training: dict[str, Any]) -> str:
    """The first keys and values; --json has all."""
    shown = [
        f"{key:.40} {value if isinstance(value, int | float) else quote(value)}" for key, value in training.items()
    ]
    return ", ".join(shown[:MAX_SHOWN]) + (f", ... ({len(shown)} in all)" if len(shown) > MAX_SHOWN else "")


def _core_mass(config: AdapterConfig, prior: Tensor) -> float:
    """The share of the prior that is in the core: how much of the data's statistic every request keeps."""
    method = Method(config.method, config.density, tuple(config.layers), 0, "paper", config.prior, config.core)
    return float(prior[LayerSelector(method, len(prior), None, prior).core].sum())


def _product_norm(left: Tensor, right: Tensor) -> float:
    """Frobenius norm of L R, from r x r products: ||L R||^2 = <L'L, R R'>."""
    left, right = left.double(), right.double()
    return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())
