"""The table of what kernels take, and the command line."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import __doc__ as description

if TYPE_CHECKING:
    from .compiling import Compiled, Launch
    from .launches import Need

TABLE = Path(__file__).parent / "table.json"
# kernel's launch -> target -> {registers, spilled, shared}
Entries = dict[str, dict[str, dict[str, int]]]


@dataclass(frozen=True)
class Target:
    """A GPU by its datasheet: multiprocessors, bytes/s of its memory, clock in Hz, KiB of shared memory of one SM."""

    device: str
    capability: int
    sms: int
    bandwidth: float
    clock: float
    shared_kib: int

    def programs(self, resources: dict[str, int], warps: int) -> int:
        """How many programs of a kernel a multiprocessor holds: 64 warps, 65,536 registers, its shared memory."""
        registers = -(-resources["registers"] // 8) * 8 * 32 * warps
        shared = resources["shared"] + 1024  # the driver's share of each program
        return min(32, 64 // warps, 65536 // registers, self.shared_kib * 1024 // shared)

    def least_us(self, launch: Launch, compiled: Compiled, need: Need) -> tuple[float, float]:
        """Least microseconds by bytes, and by instructions at four a cycle on each multiprocessor."""
        whole, loop = compiled.instructions
        passes = need.passes(launch)
        issued = compiled.warps * (passes * loop + (whole - loop if passes else whole) * launch.programs)
        return 1e6 * need.bytes / self.bandwidth, 1e6 * issued / (4 * self.sms * self.clock)


TARGETS = {
    "sm_80": Target("A100", 80, 108, 2.04e12, 1.41e9, 164),
    "sm_90": Target("H200", 90, 132, 4.8e12, 1.98e9, 228),
    "sm_100": Target("B200", 100, 148, 8.0e12, 1.97e9, 228),
}


def main() -> int:
    """0 if everything compiles to what the table says, or the table was written; 1 if not."""
    options = argparse.ArgumentParser(
        prog="compile_kernels", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    options.add_argument("--update", action="store_true", help="write the table anew")
    options.add_argument("--triton", metavar="VERSION", help="compile with that release, fetched by pip")
    options.add_argument("--cache", type=Path, default=Path.home() / ".cache/caprese/triton", help="for --triton")
    given = options.parse_args()
    if given.triton:
        return with_triton(given.triton, given.cache)
    if lacking := missing():
        print(lacking, file=sys.stderr)
        return 1
    import triton

    found: Entries = {}
    for key, target, resources, text in compile_all(given.target or TARGETS):
        found.setdefault(key, {})[target] = resources
        print(text, flush=True)
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if given.update:
        table[triton.__version__] = found
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        print(f"Written: {TABLE}")
        return 0
    if triton.__version__ not in table:
        print(f"{TABLE.name}: no entries for Triton {triton.__version__}; add them with --update", file=sys.stderr)
        return 1
    errors = differences(table[triton.__version__], found, given.target or TARGETS)
    print(*errors, f"{len(found)} launches, {len(errors)} differences from {TABLE.name}", sep="\n")
    return int(bool(errors))


def missing() -> str | None:
    """Why nothing can be compiled here, in one line; None if it can."""
    try:
        import triton

        paths = [triton.knobs.nvidia.ptxas.path, triton.knobs.nvidia.cuobjdump.path]
    except (ImportError, RuntimeError) as error:
        return f"compile_kernels: Triton with NVIDIA's assembler is needed: {error}; install triton, or give --triton"
    absent = [path for path in paths if not Path(path).exists()]
    return f"compile_kernels: no {absent[0]}; install triton's wheel, or give --triton" if absent else None


def compile_all(targets: Iterable[str]) -> Iterator[tuple[str, str, dict[str, int], str]]:
    """Each launch compiled for each target: its key in the table, the target, its resources, a line to print."""
    from .launches import cases, record

    for case in cases():
        for name in targets:
            target = TARGETS[name]
            for launch in record(case, target.sms):
                compiled = launch.compile(target.capability)
                resources = compiled.resources
                by_bytes, by_instructions = target.least_us(launch, compiled, case.needs[launch.name])
                held = target.programs(resources, compiled.warps)
                text = (
                    f"{case.name:38} {launch.name:20} {name:6} {resources['registers']:4} registers"
                    f" {resources['spilled']:4} B spilled {resources['shared']:7} B shared {held:3} programs an SM"
                    f" {by_bytes:7.1f} us by bytes {by_instructions:7.1f} by instructions"
                )
                yield f"{case.name}: {launch.name}", name, resources, text


def differences(expected: Entries, found: Entries, targets: Iterable[str]) -> list[str]:
    """What differs from the table, a line each."""
    errors = []
    for key in sorted({*expected, *found}):
        for target in targets:
            then, now = (entries.get(key, {}).get(target) for entries in (expected, found))
            if then != now:
                errors.append(f"{key}, {target}: expected {then}, found {now}; --update if that is meant")
    return errors


def with_triton(version: str, cache: Path) -> int:
    """Run this command with another release of Triton, which pip fetches once."""
    place = cache / version
    if not (place / "triton").exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(cache)]
        subprocess.run([*pip, f"triton=={version}"], check=True)
        (wheel,) = cache.glob(f"triton-{version}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
        wheel.unlink()
        for program in (place / "triton/backends/nvidia/bin").iterdir():
            program.chmod(0o755)
    words = [word for word in sys.argv[1:] if word not in ("--triton", version) and not word.startswith("--triton=")]
    path = os.pathsep.join(filter(None, (str(place), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache / f"compiled-{version}")}
    return subprocess.run([sys.executable, "-m", "tools.compile_kernels", *words], env=environment).returncode
