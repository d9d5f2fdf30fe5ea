"""The files of a run beside its output: what the stages finished, the checkpoints, and the adapter itself."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from caprese_kernels.adapters import Adapters
from caprese_kernels.errors import CapreseError

from . import checkpoint
from .kept import kept_files, set_aside, take_back

Identity = dict[str, Any]  # JSON values


def held_bytes(paths: Iterable[Path]) -> int:
    """Bytes of those of the files that exist."""
    return sum(path.stat().st_size for path in paths if path.exists())


def all_progress(output: Path) -> list[Path]:
    """Every file from which a run with this output may go on; whether it does, only its model and data say."""
    return [each for path in hidden_files(output) for each in (path, *kept_files(path))]


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
    """Write what a stage made to `path`, and remove its checkpoint `resume`.

    The file names that checkpoint: after a kill between the two, `earlier_stage` removes it.
    """
    marks = {"identity": identity, "checkpoint": checkpoint.header_digest(resume)}
    marked = adapters.config.model_copy(update={"training": adapters.config.training | marks})
    replace(adapters, config=marked).save(path)
    checkpoint.remove(resume)


@dataclass(frozen=True)
class Stage:
    """The file of a finished stage, its contents, and the digest of the checkpoint that it took the place of."""

    path: Path
    adapters: Adapters
    checkpoint: str | None


def load_stage(path: Path, identity: Identity) -> Stage | None:
    """What a stage with the same identity left at `path`; None without it."""
    if path.exists():
        with contextlib.suppress(CapreseError):  # a file that cannot be read is made again
            found = Adapters.load(path)
            mark = found.config.training.pop("checkpoint", None)
            if found.config.training.pop("identity", None) == identity:
                return Stage(path, found, mark)
    return None


def find_stage(path: Path, identity: Identity) -> Stage | None:
    """As `load_stage`, at `path` or kept beside it."""
    found = (load_stage(each, identity) for each in (path, *kept_files(path)))
    return next((stage for stage in found if stage is not None), None)


def earlier_stage(path: Path, identity: Identity, resume: Path, console: Console | None) -> Adapters | None:
    """The adapters of `load_stage`; besides, what another run left at `path` is kept beside it, and taken back by its
    own run. The stage's own checkpoint `resume` is removed where a kill left it."""
    take_back(path, lambda each: load_stage(each, identity) is not None, console)
    found = load_stage(path, identity)
    if found is not None:
        for left in (resume, *kept_files(resume)) if found.checkpoint else ():
            if checkpoint.header_digest(left) == found.checkpoint:
                checkpoint.remove(left)
        return found.adapters
    if path.exists():
        with contextlib.suppress(CapreseError):  # a file that cannot be read is made again
            there = Adapters.load(path).config.training.get("identity")
            other = [key for key in identity if not isinstance(there, dict) or there.get(key) != identity[key]]
            set_aside(path, f"it belongs to a run with other {', '.join(other)}; starting anew", console)
    return None


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
