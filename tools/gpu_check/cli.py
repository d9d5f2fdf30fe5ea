"""The command line, and a stage from its plan to its archive."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from . import __doc__ as description
from .machine import COMPLETE, absent, environment, memory_gib, missing, register
from .pack import pack, unpack, unpack_command
from .plan import LIMITS, ROOT, Branch, Context, Step, arch_for, decide, stage_a, stage_b
from .run import last_lines, run

MARGIN = 5.0  # seconds of a stage that are kept for the last archive
LINES = 12  # of a step's output, printed when it has ended
STUB_GIB = 139.0  # the GPU of a plan that is printed where there is none


def main() -> int:
    """0 if all steps passed; 1 if one failed or ran out of time, or something is missing."""
    options = _options()
    if lacking := missing(options.rehearse or options.dry_run):
        print(lacking, file=sys.stderr)
        return 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and so would the steps
    work = (options.work or options.out / "work").resolve()
    if options.after:
        unpack(options.after, work / "a")
    failed = False
    for stage in LIMITS if options.stage == "both" else options.stage:
        failed |= not _stage(stage, options, work)
    return int(failed)


def _options() -> argparse.Namespace:
    options = argparse.ArgumentParser(
        prog="gpu-check", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--stage", choices=("a", "b", "both"), default="both")
    options.add_argument("--out", type=Path, default=ROOT / "out/gpu-check", help="the archives go there")
    options.add_argument("--work", type=Path, help="results and unpacked packages, kept for stage b; default OUT/work")
    options.add_argument("--after", type=Path, help="stage a's archive, for stage b on another machine")
    options.add_argument("--vllm-part", type=Path, help="vLLM's packages, for a machine without network (docs/gpu.md)")
    options.add_argument("--unpack-with", metavar="FILE", type=Path, help="program that unpacks it: FILE FOLDER PART")
    options.add_argument("--arch", help="shape to measure; default: the largest of which four engines fit into memory")
    options.add_argument("--only", action="append", metavar="STEP", help="this step alone; several times for several")
    options.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="environment variable for the steps"
    )
    options.add_argument("--dry-run", action="store_true", help="print the plan alone")
    options.add_argument(
        "--rehearse", action="store_true", help="small versions of all steps under the same limits, without a GPU"
    )
    found = options.parse_args()
    for text in found.set:
        if not text.partition("=")[0] or "=" not in text:
            options.exit(2, f"gpu-check: --set takes NAME=VALUE; found {text!r}\n")
    if found.unpack_with and not (found.vllm_part and found.unpack_with.is_file()):
        options.exit(2, "gpu-check: --unpack-with takes a file, for --vllm-part; give both\n")
    known = step_names()
    if unknown := [name for name in found.only or () if name not in known]:
        options.exit(2, f"gpu-check: --only takes one of {', '.join(known)}; found {unknown[0]!r}\n")
    return found


def step_names() -> list[str]:
    """Every step of every plan, once."""
    context = Context(ROOT, ROOT, unpack=("true",))
    plans = [stage_a(context), *(stage_b(context, branch) for branch in get_args(Branch))]
    return list(dict.fromkeys(step.name for steps in plans for step in steps))


def _stage(stage: str, options: argparse.Namespace, work: Path) -> bool:
    """Run a stage; whether all its steps passed."""
    begin = time.monotonic()
    folder, site = work / stage, work / "site"
    memory = STUB_GIB if options.rehearse else memory_gib() or STUB_GIB
    unpacks = options.vllm_part and not (site / COMPLETE).exists()
    context = Context(
        folder=folder,
        earlier=work / "a",
        arch=options.arch or arch_for(memory),
        small=options.rehearse,
        unpack=_unpacking(options.vllm_part.resolve(), site, options.unpack_with) if unpacks else None,
    )
    branch, why = None, ""
    if stage == "b":
        branch, why = decide(_earlier(work / "a"), work / "a")
    steps = stage_b(context, branch) if branch else stage_a(context)
    if options.only:
        steps = [replace(step, beside=False) for step in steps if step.name in options.only]
    print_plan(stage, steps, f"{context.arch}, {memory:.0f} GiB" + (f"; {branch}: {why}" if branch else ""))
    if options.dry_run:
        return True
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    register(work / "registered")
    changes = dict(text.split("=", 1) for text in options.set)

    from caprese_bench.results.report import Result
    from caprese_serve.provenance import provenance

    settings = {"rehearsal": options.rehearse, "branch": branch, "why": why, "set": changes}
    result = Result("check", provenance() | {"settings": settings}, keys=["step"], measures=["seconds"])
    archive = options.out.resolve() / f"gpu-check-{stage}.tar.gz"

    def save() -> None:
        result.write_json(folder)
        pack(folder, archive)

    save()
    end = begin + LIMITS[stage] - MARGIN
    for records in results(steps, end, folder, work, changes):
        result.rows += [record | {"stage": stage} for record in records]
        save()
    result.partial = False
    save()
    for row in result.rows:
        print(f"{row['status']:12} {row['seconds']:6.1f} of {row.get('given_seconds', 0):5.1f} s  {row['step']}")
    took = time.monotonic() - begin
    print(f"stage {stage}: {took:.0f} of {LIMITS[stage]:.0f} s. Send back: {archive}", flush=True)
    return all(row["status"] in ("passed", "skipped") for row in result.rows)


def results(
    steps: Sequence[Step], end: float, folder: Path, work: Path, changes: dict[str, str]
) -> Iterator[list[dict[str, Any]]]:
    """Run the steps before the time `end`; yields the records of each step, or of those that ran beside it."""
    groups = grouped(steps)
    for position, group in enumerate(groups):
        later = sum(max(step.seconds for step in other) for other in groups[position + 1 :])
        left = end - time.monotonic()
        variables = environment(work / "site", work / "registered", changes)

        def run_one(
            step: Step, left: float = left, spare: float = left - later, variables: dict[str, str] = variables
        ) -> dict[str, Any]:
            if lacking := absent(step.needs, work / "site"):
                return {"step": step.name, "status": "skipped", "seconds": 0.0, "output": f"no {', '.join(lacking)}"}
            seconds = min(max(step.seconds, spare) if step.spare else step.seconds, left)
            if seconds <= 0:
                return {"step": step.name, "status": "out of time", "seconds": 0.0}
            print(f"== {step.name}: begins, {seconds:.0f} s at most", flush=True)
            return run(step, seconds, folder / f"step-{steps.index(step)}.log", variables)

        with ThreadPoolExecutor(len(group)) as pool:
            records = list(pool.map(run_one, group))
        for record in records:
            print(f"== {record['step']}: {record['status']}, {record['seconds']:.1f} s")
            print(*last_lines(record.get("output") or "", LINES), sep="\n", flush=True)
        yield records


def grouped(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps that start together."""
    groups: list[list[Step]] = []
    for step in steps:
        if step.beside:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def print_plan(stage: str, steps: Sequence[Step], title: str) -> None:
    """Each step with its limit; a + marks one that may use spare time, & one that starts with the step before."""
    total = sum(max(step.seconds for step in group) for group in grouped(steps))
    print(f"stage {stage}: {total:.0f} of {LIMITS[stage]:.0f} s; {title}")
    for step in steps:
        command = " ".join(word.replace(str(ROOT) + os.sep, "") for word in step.command)
        print(f"  {'&' if step.beside else ' '} {step.seconds:4.0f}{'+' if step.spare else ' '} s  {step.name}")
        print(f"               {command}")
    sys.stdout.flush()


def _unpacking(part: Path, site: Path, own: Path | None = None) -> tuple[str, ...]:
    """Unpack, and mark the site when it is whole."""
    command = unpack_command(part, site, None if own is None else own.resolve())
    return ("sh", "-c", '"$@" && touch "$0"', str(site / COMPLETE), *command)


def _earlier(folder: Path) -> list[dict[str, Any]]:
    path = folder / "check.json"
    return list(json.loads(path.read_text())["rows"]) if path.exists() else []
