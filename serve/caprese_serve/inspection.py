"""`caprese inspect`: the contents of an adapter file, and whether it fits a model; needs no engine."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Group
from rich.table import Table
from torch import Tensor

from caprese_kernels.adapters import Adapters, find_adapter
from caprese_kernels.config import BaseModelInfo, layer_spans
from caprese_kernels.errors import CapreseError


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
        "layers": sorted(config.layers),
        "dtype": str(adapters.dtype).removeprefix("torch."),
        "parameters": adapters.num_parameters,
        "share_of_ff_parameters": adapters.num_parameters / ff_parameters,
        "norms": {str(i): _product_norm(adapters.left[i], adapters.right[i]) for i in adapters.left},
        "training": config.training,
        "caprese_version": config.caprese_version,
        "fits_model": model,
    }


def model_info(model: str) -> BaseModelInfo:
    """The dimensions of a model directory or Hub id, from its config.json. Raises CapreseError if unreadable."""
    path = Path(model) / "config.json"
    try:
        try:
            from transformers import AutoConfig
        except ImportError:  # without transformers only a local file can be read
            return BaseModelInfo.from_hf(SimpleNamespace(**json.loads(path.read_text())), model)
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
    facts.add_row("dtype", report["dtype"])
    share = report["share_of_ff_parameters"]
    facts.add_row("parameters", f"{report['parameters']:,} ({share:.2%} of the base model's FF parameters)")
    facts.add_row("training", ", ".join(f"{k} {v}" for k, v in report["training"].items()) or "not recorded")
    facts.add_row("written by", f"caprese {report['caprese_version'] or 'unknown'}")
    if report["fits_model"] is not None:
        facts.add_row("fits", f"{report['fits_model']}: yes")
    norms = Table("layer", "norm of L R", box=None, pad_edge=False)
    for layer, norm in report["norms"].items():
        norms.add_row(layer, f"{norm:.4g}")
    return Group(facts, "", norms)


def _product_norm(left: Tensor, right: Tensor) -> float:
    """Frobenius norm of L R, from r x r products: ||L R||^2 = <L'L, R R'>."""
    left, right = left.double(), right.double()
    return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())
