"""An adapter's files, as they go to the Hugging Face Hub: the adapter, its card, and the report of its making."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from caprese_kernels.adapters import Adapters
from caprese_kernels.hub import DEFAULT_FILE_NAME, upload

from .card import make_calibration_card, make_card

REPORT = "report.json"
LOCAL = ("adapter", "card", "responses")  # what of a report is paths of this machine


def push(repo: str, output: Path, report: Mapping[str, Any], adapters: Adapters) -> str:
    """Upload the adapter file `output`, a card that says how to serve it from there, and `report`; the address.

    CapreseError if that fails.
    """
    weights = repo if output.name == DEFAULT_FILE_NAME else f"{repo}/{output.name}"
    kept = {key: value for key, value in report.items() if key not in LOCAL}
    calibrated = adapters.config.training["stage"] == "calibration"
    card = make_calibration_card(adapters, weights) if calibrated else make_card(adapters, weights)
    return upload(
        repo,
        {output.name: output, "README.md": card.encode(), REPORT: json.dumps(kept, indent=1).encode()},
    )
