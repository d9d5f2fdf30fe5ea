"""An adapter's files, as they go to the Hugging Face Hub: the adapter, its card, and the report of its making."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from caprese_kernels.adapters import Adapters
from caprese_kernels.hub import DEFAULT_FILE_NAME, upload

from .card import MARK, make_card

REPORT = "report.json"
LOCAL = ("adapter", "card", "responses")  # what of a report is paths of this machine


def push(repo: str, output: Path, report: Mapping[str, Any], adapters: Adapters) -> str:
    """Upload the adapter file `output`, a card that says how to serve it from there, and `report`; the address.

    CapreseError if that fails.
    """
    weights = repo if output.name == DEFAULT_FILE_NAME else f"{repo}/{output.name}"
    kept = {key: value for key, value in report.items() if key not in LOCAL}
    calibrated = adapters.config.training["stage"] == "calibration"
    card = calibration_card(adapters, weights) if calibrated else make_card(adapters, weights)
    return upload(
        repo,
        {output.name: output, "README.md": card.encode(), REPORT: json.dumps(kept, indent=1).encode()},
    )


def calibration_card(adapters: Adapters, weights: str) -> str:
    """The card of a file that `caprese calibrate` made; `weights` is what to serve."""
    config, model = adapters.config, adapters.config.base_model.name_or_path
    hub = {} if Path(model).is_dir() else {"base_model": model}  # the Hub expects a repository's name
    tags = ["caprese", "vllm", "sparse", config.method]
    front = {MARK: weights, **hub, "library_name": "caprese", "tags": tags}
    head = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in front.items())
    selection = f"density {config.density:g}, score {config.score}, prior {config.prior:g}, core {config.core:g}"
    return (
        f"---\n{head}---\n\n# Caprese calibration of {model}\n\n"
        f"Which neurons of its feed-forward blocks each generated token runs through ({config.method}, {selection}), "
        f"chosen by data and by the prompt, without training.\n\n## Serve it\n\n"
        f'```\npip install "caprese-vllm[cuda]"\nvllm serve {quote(model)} --caprese-weights {quote(weights)}\n```\n\n'
        f"What it costs is in {REPORT}.\n\n## How it was made\n\n```\n{config.training['command']}\n```\n"
    )
