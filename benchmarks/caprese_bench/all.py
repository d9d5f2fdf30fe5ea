"""`caprese bench all`: every benchmark one after another, each in a process of its own, and one report of them all."""

from __future__ import annotations

import html
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from caprese_kernels.errors import CapreseError

from .results.recording import check_writable
from .results.report import Result, body_of, document, terminal


@dataclass(frozen=True)
class Step:
    """A verb; what it is given; whether it knows --resume, or keeps what it needs itself."""

    verb: str
    shows: str
    quick: tuple[str, ...] = ("--quick",)
    full: tuple[str, ...] = ()
    resumes: bool = True


# Quick first.
STEPS = (
    Step("parameters", "figure 6: what Caprese adds and spares", quick=(), resumes=False),
    Step("residual", "figure 2: the error and its low rank"),
    Step("ablation", "figure 5: accuracy over density and rank"),
    Step("recovery", "tables 1 and 5 on the demo model: what training gives back", resumes=False),
    Step("accuracy", "tables 1 and 2 through a server, here on the demo's tasks"),
    Step("length", "figures 4 and 7: how long responses are", resumes=False),
    Step("coverage", "figure 3: Pass@K over samples and compute"),
    Step("kernels", "one FF block: bandwidth and ratio to dense"),
    Step("decode", "a whole decode step without vLLM, beside its bytes"),
    Step("latency", "table 4: end to end, to first and to next token"),
    Step("exactness", "the engine's tokens against plain Hugging Face's"),
    Step("prefix", "what prefix caching still saves"),
    Step("distill-speed", "the pace and memory of distilling"),
)


def all_benchmarks(
    quick: Annotated[bool, typer.Option("--quick", help="Everything small, half an hour on two cores.")] = False,
    only: Annotated[
        str | None, typer.Option(help=f"Comma-separated, of {', '.join(step.verb for step in STEPS)}; default all.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in --out where an earlier run was stopped.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for all results, and report.html.")] = Path("out/bench"),
) -> None:
    """Run every benchmark and write one report; a step that fails is told, and the next begins."""
    chosen = _chosen(only)
    check_writable(out)
    console = terminal()
    ended: list[tuple[str, str, float]] = []
    for step in chosen:
        flags = [*(step.quick if quick else step.full), *(["--resume"] if resume and step.resumes else [])]
        console.rule(f"{step.verb}: {step.shows}")
        begin = time.monotonic()
        command = [sys.executable, "-m", "caprese_serve", "bench", step.verb, *flags, "--out", str(out)]
        code = _run(command)
        if code == 130:  # told already
            write_report(out)
            raise KeyboardInterrupt
        ended.append((step.verb, _judge(out / f"{step.verb}.json", code), time.monotonic() - begin))
        write_report(out)
    _show(ended, console)
    console.print(f"Written: {out / 'report.html'}")
    if failed := [verb for verb, status, _ in ended if status != "valid"]:
        raise CapreseError(
            "benchmarks",
            expected="a complete, valid result of each",
            found=f"none of {', '.join(failed)}",
            fix="see above",
        )


def _run(command: list[str]) -> int:
    """Its exit code. Ctrl-C reaches the benchmark as well: it has a minute to write what it has."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            try:
                process.wait(60)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                process.kill()
            return 130


def _judge(path: Path, code: int) -> str:
    """ "valid", or in a word or two why there is no such result."""
    from .results.schemas import check

    if code:
        return f"exit code {code}"
    try:
        check(path)
    except CapreseError as error:
        return str(error)
    return "partial" if Result.load(path).partial else "valid"


def write_report(out: Path) -> Path:
    """report.html: the pages of all results in the folder as one."""
    found = {step: out / f"{step.verb}.html" for step in STEPS if (out / f"{step.verb}.html").exists()}
    contents = "".join(f'<li><a href="#{step.verb}">{step.verb}</a>: {html.escape(step.shows)}</li>' for step in found)
    bodies = [f'<section id="{step.verb}">{body_of(path.read_text())}</section>' for step, path in found.items()]
    path = out / "report.html"
    path.write_text(
        document("Caprese: benchmarks", "\n".join([f"<h1>Caprese: benchmarks</h1><ul>{contents}</ul>", *bodies]))
    )
    return path


def _chosen(only: str | None) -> list[Step]:
    known = {step.verb: step for step in STEPS}
    names = list(known) if only is None else [name.strip() for name in only.split(",")]
    for name in names:
        if name not in known:
            raise CapreseError("--only", expected=f"of {', '.join(known)}", found=repr(name), fix="correct it")
    return [step for name, step in known.items() if name in names]


def _show(ended: list[tuple[str, str, float]], console: Console) -> None:
    shown = Table()
    shown.add_column("benchmark")
    shown.add_column("result")
    shown.add_column("minutes", justify="right")
    for verb, status, seconds in ended:
        shown.add_row(verb, status, f"{seconds / 60:.1f}")
    shown.add_row("together", "", f"{sum(seconds for *_, seconds in ended) / 60:.1f}")
    console.print(shown)
