"""The files of a run beside its output: what the stages finished, the checkpoints, and the adapter itself."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from caprese_kernels.adapters import Adapters
from caprese_kernels.errors import CapreseError

from . import checkpoint
from .kept import kept_files, set_aside, take_back

Identity = dict[str, Any]  # JSON values


def held_bytes(output: Path) -> int:
    """Bytes of the files that a killed run left beside `output`."""
    return sum(path.stat().st_size for path in hidden_files(output) if path.exists())


def clean_up(output: Path) -> None:
    """Remove this run's hidden files beside `output`, once it is written; those of other runs stay."""
    layer_wise, resume = layer_wise_path(output), checkpoint.resume_path(output)
    continued = bool(kept_files(resume)) and not kept_files(layer_wise)  # another run goes on from this finished stage
    for path in hidden_files(output):
        if path != layer_wise or not continued:
            checkpoint.remove(path)
    shutil.rmtree(scratch_path(output), ignore_errors=True)


def scratch_path(output: Path) -> Path:
    """The directory for Ray Train's own files of a run."""
    return output.with_name(f".{output.name}.ray")


def keep_stage(adapters: Adapters, path: Path, identity: Identity, resume: Path) -> None:
    """Write what a stage made to `path`, and remove its checkpoint `resume`."""
    marked = adapters.config.model_copy(update={"training": adapters.config.training | {"identity": identity}})
    replace(adapters, config=marked).save(path)
    checkpoint.remove(resume)


def load_stage(path: Path, identity: Identity) -> Adapters | None:
    """What a stage with the same identity left at `path`; None without it."""
    if path.exists():
        with contextlib.suppress(CapreseError):  # a file that cannot be read is made again
            found = Adapters.load(path)
            if found.config.training.pop("identity", None) == identity:
                return found
    return None


def earlier_stage(path: Path, identity: Identity, console: Console | None) -> Adapters | None:
    """As `load_stage`; besides, what another run left at `path` is kept beside it, and taken back by its own run."""
    take_back(path, lambda each: load_stage(each, identity) is not None, console)
    found = load_stage(path, identity)
    if found is None and path.exists():
        with contextlib.suppress(CapreseError):  # a file that cannot be read is made again
            there = Adapters.load(path).config.training.get("identity")
            other = [key for key in identity if not isinstance(there, dict) or there.get(key) != identity[key]]
            set_aside(path, f"it belongs to a run with other {', '.join(other)}; starting anew", console)
    return found


def stage_identity(settings: Mapping[str, Any]) -> Identity:
    """All that a stage depends on, as the JSON values that a file's header gives back."""
    found: Identity = json.loads(json.dumps(settings))
    return found


def hidden_files(output: Path) -> list[Path]:
    """All that a killed run may leave beside the output, but for Ray's directory."""
    paths = (checkpoint.resume_path, prior_resume_path, prior_path, layer_wise_path, weighted_path)
    return [path(output) for path in paths]


def prior_path(output: Path) -> Path:
    """The priors."""
    return output.with_name(f".{output.name}.prior")


def prior_resume_path(output: Path) -> Path:
    """The checkpoint of the pass for the priors."""
    return output.with_name(f".{output.name}.prior-resume")


def layer_wise_path(output: Path) -> Path:
    """The adapters of the layer-wise stage."""
    return output.with_name(f".{output.name}.layer-wise")


def weighted_path(output: Path) -> Path:
    """The adapters of the weighted closed form."""
    return output.with_name(f".{output.name}.weighted")
