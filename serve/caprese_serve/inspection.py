"""`caprese inspect`: the contents of an adapter file, and whether it fits a model; needs no engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from types import SimpleNamespace
from typing import Any

from rich.console import Group
from rich.table import Table
from torch import Tensor

from caprese_kernels import files
from caprese_kernels.adapters import Adapters, find_adapter
from caprese_kernels.config import BaseModelInfo, Method, describe_density, layer_spans, method_of
from caprese_kernels.errors import CapreseError, printable, quote
from caprese_kernels.hub import use_cache_if_unreachable
from caprese_kernels.json_text import MAX_BYTES, parse_json
from caprese_kernels.selection import LayerSelector

# Of held-out samples, after the layer-wise stage: what `training` has of every layer, by the columns' titles.
ERRORS = {
    "error_before": "error without L R",
    "error_after": "with L R",
    "remaining": "remaining",
    "remaining_fit": "remaining (fitted)",
}
MAX_TEXT = 2000  # characters of a value
MAX_SHOWN = 24  # keys of `training`, and of each table in it


def inspect(weights: str, model: str | None = None) -> dict[str, Any]:
    """An adapter's configuration, size and norms as JSON values.

    Raises CapreseError for a file that a server would refuse, or, with `model`, for a model that it does not fit.
    """
    path = find_adapter(weights)
    adapters = Adapters.load(path)
    config, method = adapters.config, replace(method_of(adapters.config), score="paper")  # a core needs no score
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
        "densities": config.densities and {str(i): method.at(i).density for i in sorted(config.layers)},
        "rank": config.rank,
        "file_version": adapters.version,
        "score": config.score,
        "prior": config.prior,
        "core": config.core,
        "layers": sorted(config.layers),
        "dtype": str(adapters.dtype).removeprefix("torch.") if adapters.dtype else None,
        "parameters": adapters.num_parameters,
        "share_of_ff_parameters": adapters.num_parameters / ff_parameters,
        "core_prior_mass": {str(i): _core_mass(method.at(i), adapters.prior[i]) for i in adapters.prior},
        "norms": {str(i): _product_norm(adapters.left[i], adapters.right[i]) for i in adapters.left},
        "training": config.training,
        "caprese_version": config.caprese_version,
        "fits_model": model,
    }


def model_info(model: str) -> BaseModelInfo:
    """The dimensions of a model directory or Hub id, from its config.json. Raises CapreseError if unreadable."""
    files.check_model(model)
    path = Path(model) / "config.json"
    if not path.parent.is_dir():
        use_cache_if_unreachable()
    try:
        try:
            from transformers import AutoConfig
        except ImportError:  # without transformers only a local file can be read
            return BaseModelInfo.from_hf(SimpleNamespace(**parse_json(files.read_bytes(path, MAX_BYTES))), model)
        config = AutoConfig.from_pretrained(model)
        return BaseModelInfo.from_hf(config.get_text_config(), model, config.architectures)
    except CapreseError:
        raise
    except Exception as error:  # transformers raises many types for a configuration that it cannot read
        raise CapreseError(
            f"model {model}",
            expected="a directory or Hub id of a language model whose config.json can be read",
            found=f"{type(error).__name__}: {shorten(str(error), 200)}",
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
    densities = report["densities"]
    density = describe_density(report["density"], list(densities.values()) if densities else None)
    facts.add_row("method", f"{report['method']}, density {density}, rank {report['rank']}")
    facts.add_row("layers", f"{len(report['layers'])} of {base['num_hidden_layers']}: {layer_spans(report['layers'])}")
    if report["file_version"] == "2":
        facts.add_row("selection", f"score {report['score']}, prior {report['prior']:g}, core {report['core']:g}")
    facts.add_row("dtype", report["dtype"] or "no L and R")
    share = report["share_of_ff_parameters"]
    facts.add_row("parameters", f"{report['parameters']:,} ({share:.2%} of the base model's FF parameters)")
    training = report["training"]
    facts.add_row("training", _facts(training) or "not recorded")
    for name in ("data", "end_to_end", "resources", "versions"):
        if isinstance(training.get(name), dict):
            facts.add_row(name.replace("_", " "), _facts(training[name]))
    if "command" in training:
        facts.add_row("command", _text(training["command"]))
    facts.add_row("written by", f"caprese {report['caprese_version'] or 'unknown'}")
    if report["fits_model"] is not None:
        facts.add_row("fits", f"{report['fits_model']}: yes")
    layers = Table("layer", box=None, pad_edge=False)
    columns = {
        "density": (report["densities"], ".4f"),
        "norm of L R": (report["norms"], ".4g"),
        "prior inside the core": (report["core_prior_mass"], ".1%"),
    }
    shown = {title: column for title, column in columns.items() if column[0]}
    for title in shown:
        layers.add_column(title, justify="right")
    errors = training.get("errors")
    errors = errors if isinstance(errors, dict) else {}
    for title in ERRORS.values() if errors else ():
        layers.add_column(title, justify="right")
    for layer in map(str, report["layers"]):
        cells = [format(values[layer], spec) for values, spec in shown.values()]
        layers.add_row(layer, *cells, *(_share(errors.get(layer), key) for key in (ERRORS if errors else ())))
    return Group(facts, "", layers)


def _facts(values: dict[str, Any]) -> str:
    """The first values that are not tables themselves, nor shown apart; --json has all."""
    shown = [
        f"{printable(key):.40} {_text(value)}"
        for key, value in values.items()
        if key != "command" and not isinstance(value, dict)
    ]
    return ", ".join(shown[:MAX_SHOWN]) + (f", ... ({len(shown)} in all)" if len(shown) > MAX_SHOWN else "")


def _text(value: Any) -> str:
    """A value of a file's header: text as it is, except for what a terminal would obey, other values in few words."""
    if isinstance(value, str):
        return printable(shorten(value, MAX_TEXT))
    return f"{value:.5g}" if isinstance(value, float) else quote(value)


def _share(errors: Any, key: str) -> str:
    value = errors.get(key) if isinstance(errors, dict) else None
    return f"{value:.2%}" if isinstance(value, (int, float)) else "-"


def _core_mass(method: Method, prior: Tensor) -> float:
    """The share of the prior that is in the core: how much of the data's statistic every request keeps."""
    return float(prior[LayerSelector(method, len(prior), None, prior).core].sum())


def _product_norm(left: Tensor, right: Tensor) -> float:
    """Frobenius norm of L R, from r x r products: ||L R||^2 = <L'L, R R'>."""
    left, right = left.double(), right.double()
    return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())
