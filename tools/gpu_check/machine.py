"""What this machine has: packages, a GPU, the plugin's entry points."""

from __future__ import annotations

import os
import shutil
import sys
import tomllib
from contextlib import suppress
from importlib import invalidate_caches, metadata
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from .plan import ROOT

PACKAGES = ("caprese_vllm", "caprese_kernels", "caprese_distill", "caprese_serve", "caprese_bench")
COMPLETE = ".complete"  # a file in a folder of packages that was unpacked to its end
CUDA_PROGRAMS = "/usr/local/cuda/bin"  # compute-sanitizer's place, which is not on every PATH
NEEDED = ("torch", "triton", "numpy", "safetensors", "typer", "rich", "pytest", "hypothesis")


def missing(small: bool = False) -> str | None:
    """What is missing on this machine, in one line; None if nothing is."""
    if [name for name in PACKAGES if find_spec(name) is None]:
        return "gpu-check: the project is neither installed nor on the path; run it as make gpu-check"
    absent = [name for name in NEEDED if find_spec(name) is None]
    if absent:
        return f"gpu-check: packages missing: {', '.join(absent)}; install them for {sys.executable}"
    import torch

    if not small and not torch.cuda.is_available():
        return "gpu-check: needs an NVIDIA GPU that torch can use; found none"
    return None


def memory_gib() -> float | None:
    """Free memory of the GPU; None without one."""
    import torch

    return torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else None


def absent(needs: tuple[str, ...], site: Path) -> list[str]:
    """Those of the modules and programs that are neither installed, nor in `site`, nor on the PATH."""
    invalidate_caches()  # what was not there before an unpacking
    places = [*unpacked(site), *sys.path]
    return [
        name for name in needs if not PathFinder.find_spec(name, places) and not shutil.which(name, path=programs())
    ]


def unpacked(site: Path) -> list[str]:
    """The folder, if it was unpacked to its end: half of vLLM would be found and not run."""
    return [str(site)] if (site / COMPLETE).exists() else []


def programs() -> str:
    """Where programs are looked for."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), CUDA_PROGRAMS])


def environment(site: Path, registered: Path, changes: dict[str, str]) -> dict[str, str]:
    """The steps' environment: packages of `site` and entry points of `registered` first, and the changes asked for."""
    paths = [*unpacked(site), str(registered), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    flashinfer = "0" if absent(("flashinfer",), site) else "1"  # vLLM asks for its sampler also where it is absent
    variables = {"VLLM_USE_FLASHINFER_SAMPLER": flashinfer, "HF_HUB_OFFLINE": "1", **os.environ, "PATH": programs()}
    return {**variables, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **changes}


def register(folder: Path) -> None:
    """Write to `folder` the metadata that an installation would, unless there is one: vLLM finds the plugin, and
    `caprese` its verbs, by pyproject.toml's entry points."""
    with suppress(metadata.PackageNotFoundError):
        metadata.distribution("caprese-vllm")
        return
    from caprese_kernels import __version__

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    place = folder / f"caprese_vllm-{__version__}.dist-info"
    place.mkdir(parents=True, exist_ok=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {__version__}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (place / "entry_points.txt").write_text("\n".join(lines) + "\n")
