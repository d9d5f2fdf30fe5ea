"""`caprese collect-env`: versions, processor, memory, GPUs, compiler, and whether vLLM finds the plugin."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

PLUGIN = "caprese"
PACKAGES = ("torch", "triton", "vllm", "transformers", "safetensors")
# Instruction sets that matter to the kernels, as Linux names them.
CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
    "bf16",
)


def collect() -> dict[str, Any]:
    """The environment of a bug report, as JSON values. Imports torch, if it is installed, to list the GPUs."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        **hardware(),
        "compiler": _first_line("c++", "--version"),
        "vllm_plugin_registered": any(
            point.name == PLUGIN for point in metadata.entry_points(group="vllm.general_plugins")
        ),
        "vllm_plugins": os.environ.get("VLLM_PLUGINS"),
    }


def versions() -> dict[str, str | None]:
    """The version of each package of interest; None if it is not installed."""
    found: dict[str, str | None] = {"caprese": _version("caprese-vllm"), "python": platform.python_version()}
    return found | {name: _version(name) for name in PACKAGES}


def hardware() -> dict[str, Any]:
    """Processor, memory and GPUs, as JSON values."""
    info = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    return {
        "cpu": {
            "model": model[1] if model else platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "flags": [flag for flag in CPU_FLAGS if flag in present],
        },
        "memory_gib": _memory_gib(),
        "gpus": _gpus(),
    }


def render(found: dict[str, Any]) -> Table:
    """`collect()` as a table."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, version in found["versions"].items():
        table.add_row(name, version or "not installed")
    cpu = found["cpu"]
    table.add_row("platform", found["platform"])
    table.add_row("cpu", f"{cpu['model']}, {cpu['cores']} cores usable ({' '.join(cpu['flags']) or 'no flags known'})")
    table.add_row("memory", f"{found['memory_gib']} GiB")
    for index, gpu in enumerate(found["gpus"]):
        table.add_row(f"gpu {index}", f"{gpu['name']}, {gpu['memory_gib']} GiB, compute {gpu['compute_capability']}")
    if not found["gpus"]:
        table.add_row("gpu", "none")
    table.add_row("c++", found["compiler"] or "none")
    table.add_row("vLLM plugin", _plugin(found))
    return table


def _plugin(found: dict[str, Any]) -> str:
    """Whether vLLM loads the plugin, by what vLLM itself goes by: its entry point, and the names in VLLM_PLUGINS."""
    if not found["vllm_plugin_registered"]:
        return "not registered: install caprese-vllm"
    allowed = found["vllm_plugins"]
    if allowed is None or PLUGIN in allowed.split(","):
        return "registered"
    return (
        f"registered, but kept out by VLLM_PLUGINS={allowed!r}: vLLM serves dense and ignores "
        f'additional_config["caprese"]; add {PLUGIN} to the list, or unset it'
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    try:
        import torch
    except ImportError:
        return []
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {
            "name": gpu.name,
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "compute_capability": f"{gpu.major}.{gpu.minor}",
        }
        for gpu in gpus
    ]


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _first_line(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.splitlines()), None)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
