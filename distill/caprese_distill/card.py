"""The model card: a README.md beside the adapter, for the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from caprese_kernels import files
from caprese_kernels.adapters import Adapters
from caprese_kernels.config import AdapterConfig, describe_density, layer_spans
from caprese_kernels.errors import printable

from .plan import ResourceUsage
from .quality import ADAPTER, PAPER, SELECTION
from .report import describe_resources, describe_solver

# A key of the front matter: a card that names the adapter file was written by this package, and may be overwritten.
MARK = "caprese_adapter"
MAX_CARD = 1 << 22  # bytes; larger ones are not ours


def write_card(adapters: Adapters, output: Path) -> Path | None:
    """Write the card of the adapter file `output` beside it, and return its path.

    README.md, unless that exists and is not this adapter's; then the adapter's name with .md. None if that, too, is
    not this adapter's.
    """
    for path in (output.with_name("README.md"), output.with_name(f"{output.stem}.md")):
        if not os.path.lexists(path) or _is_ours(path, output.name):
            with files.reporting(
                f"model card {path}",
                expected="room for it beside the adapter, which is written",
                fix="nothing: the adapter serves without it",
            ):
                files.write_text(path, make_card(adapters, output.name))
            return path
    return None


def make_card(adapters: Adapters, name: str) -> str:
    """The card's text, for an adapter file of that name whose `training` `Job.run` wrote."""
    config, training = adapters.config, adapters.config.training
    model = config.base_model.name_or_path
    low_rank = (
        f"L [{config.base_model.hidden_size}, {config.rank}] and R [{config.rank}, {config.base_model.hidden_size}]"
    )
    parts = [
        _front_matter(config, name, *_TAGS, "low-rank"),
        f"# Caprese adapter for {model}",
        f"Low-rank layers that recover what {model} loses when each generated token runs through "
        f"{config.density:.0%} of the neurons of its feed-forward (FF) blocks, chosen by {_choice(config)}. "
        f"Prompts run through the original model. Caprese: [arXiv 2505.07861](https://arxiv.org/abs/2505.07861).",
        _serving(model, name),
        "## What it is",
        _table(
            ("", ""),
            [
                ("method", config.method),
                ("selection", f"score {config.score}, prior {config.prior:g}, core {config.core:g}"),
                ("density", describe_density(config.density, config.densities)),
                ("rank", str(config.rank)),
                ("layers", f"{layer_spans(config.layers)} of {config.base_model.num_hidden_layers}"),
                ("tensors", f"{low_rank} a layer, {str(adapters.dtype).removeprefix('torch.')}"),
                ("parameters", f"{adapters.num_parameters:,}"),
                ("made by", f"{training['stage']}, {describe_solver(training)}"),
            ],
        ),
        "## Errors on held-out samples",
        f"{training['samples_held_out']} of {training['samples']} samples were held out. Of every sparse layer, after "
        "the layer-wise stage: the error of the sparse block's output, as a share of the full block's, without and "
        "with L R (squared norms).",
        _table(
            ("layer", "without L R", "with L R", "remaining", "remaining (fitted)"),
            [
                (layer, *(f"{row[key]:.2%}" for key in ("error_before", "error_after", "remaining", "remaining_fit")))
                for layer, row in training["errors"].items()
            ],
        ),
    ]
    parts += [_COSTS, _quality_table("selection", {_QUALITIES[name]: q for name, q in training["quality"].items()})]
    if "end_to_end" in training:
        errors = enumerate(training["end_to_end"]["held_out_errors"])
        parts += [
            "Of the last hidden state, end to end, before the first epoch and after each: ||M - M_student||²/||M||².",
            _table(("epoch", "error"), [(str(n), f"{error:.3%}") for n, error in errors]),
            f"L and R are those of epoch {training['end_to_end']['kept_epoch']}.",
        ]
    source, versions = training["data"], training["versions"]
    parts += [
        "## How it was made",
        _table(
            ("", ""),
            [
                (
                    "data",
                    ", ".join(f"{key} {_code(value)}" for key, value in source.items() if value not in (None, "")),
                ),
                ("samples", f"{training['samples']:,}, {training['tokens']:,} response tokens"),
                ("versions", ", ".join(f"{key} {value}" for key, value in versions.items())),
                *(
                    [("memory and time", describe_resources(ResourceUsage(**training["resources"])))]
                    if training["resources"]
                    else []
                ),
            ],
        ),
        f"```\n{training['command']}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def make_calibration_card(adapters: Adapters, name: str) -> str:
    """The text of the card of a file that `caprese calibrate` made; `name` is what to serve."""
    config, training = adapters.config, adapters.config.training
    model = config.base_model.name_or_path
    parts = [
        _front_matter(config, name, *_TAGS),
        f"# Caprese calibration of {model}",
        f"Which neurons of the feed-forward (FF) blocks of {model} each generated token runs through: "
        f"{config.density:.0%} of them, chosen by {_choice(config)}, without low-rank layers. Prompts run through the "
        "original model. Caprese: [arXiv 2505.07861](https://arxiv.org/abs/2505.07861).",
        _serving(model, name),
        "## What it costs",
        _COSTS,
        _quality_table("selection", {_QUALITIES[key]: q for key, q in training["quality"].items()}),
        "By density, the same in every layer, with this file's score, prior and core:",
        _quality_table("density", training["quality_by_density"]),
        "## How it was made",
        _table(
            ("", ""),
            [
                ("method", config.method),
                ("selection", f"score {config.score}, prior {config.prior:g}, core {config.core:g}"),
                ("density", describe_density(config.density, config.densities)),
                ("layers", f"{layer_spans(config.layers)} of {config.base_model.num_hidden_layers}"),
                ("samples", f"{training['samples']:,}, {training['samples_held_out']:,} of them held out"),
            ],
        ),
        f"```\n{training['command']}\n```",
    ]
    return "\n\n".join(parts) + "\n"


_TAGS = ["caprese", "vllm", "sparse"]
_COSTS = (
    "Of the next token on held-out responses: the divergence of its distribution from the original model's, and "
    "how often the most likely one is the same."
)
_QUALITIES = {
    PAPER: "each prompt's own (the paper), without L and R",
    SELECTION: "this adapter's, without L and R",
    ADAPTER: "this adapter's, with L and R",
}
_METHODS = {
    "griffin": "GRIFFIN, from its prompt",
    "cats": "CATS, by a threshold that its prompt sets",
}


def _choice(config: AdapterConfig) -> str:
    """What chooses the neurons."""
    if config.core == 1.0 or config.prior == 1.0:
        return "what the data's responses used most"
    shared = f", {config.core:.0%} of them by the data's responses" if config.core else ""
    return _METHODS[config.method] + shared


def _serving(model: str, name: str) -> str:
    command = f"vllm serve {quote(model)} --caprese-weights {quote(name)}"
    return f'## Serve it\n\n```\npip install "caprese-vllm[cuda]"\n{command}\n```'


def _quality_table(what: str, qualities: Mapping[str, Mapping[str, float]]) -> str:
    rows = [(name, f"{found['kl']:.3f}", f"{found['agreement']:.1%}") for name, found in qualities.items()]
    return _table((what, "KL, nats", "same token"), rows)


def _front_matter(config: AdapterConfig, name: str, *tags: str) -> str:
    model = config.base_model.name_or_path
    hub = {} if Path(model).is_dir() else {"base_model": model}  # the Hub expects a repository's name
    entries = {MARK: name, **hub, "library_name": "caprese", "tags": [*tags, config.method]}
    lines = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in entries.items())
    return f"---\n{lines}---"  # JSON values are YAML


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines: list[tuple[str, ...]] = [head, ("---",) * len(head), *rows]
    escaped = ([printable(" ".join(cell.split())).replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _code(value: Any) -> str:
    """Inline code, in more backticks than the value has in a row."""
    text = str(value)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _is_ours(path: Path, name: str) -> bool:
    """Whether the front matter of the file `path` names that adapter file."""
    try:
        head, _, rest = files.read_text(path, MAX_CARD).partition("---\n")
    except OSError:
        return False
    return not head and f"{MARK}: {json.dumps(name, ensure_ascii=False)}" in rest.partition("\n---")[0].split("\n")
