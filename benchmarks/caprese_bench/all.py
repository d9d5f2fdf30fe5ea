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
from rich.table import Table

from caprese_kernels import files, terminal
from caprese_kernels.errors import CapreseError

from .results.lists import names
from .results.recording import check_writable
from .results.report import Result, body_of, document
from .results.settings import ResumableSettings, options_of


@dataclass(frozen=True)
class Step:
    """A verb with its flags for a quick and a full run. A verb without --resume (`resumes`) continues by itself."""

    verb: str
    title: str
    quick: tuple[str, ...] = ("--quick",)
    full: tuple[str, ...] = ()
    resumes: bool = True


# The quick ones first.
STEPS = (
    Step("parameters", "figure 6: what Caprese adds and spares", quick=(), resumes=False),
    Step("residual", "figure 2: the error and its low rank"),
    Step("ablation", "figure 5: accuracy over density and rank"),
    Step("recovery", "tables 1 and 5 on the demo model: what training gives back", resumes=False),
    Step("accuracy", "tables 1 and 2 through a server, on the demo's tasks"),
    Step("length", "figures 4 and 7: how long responses are", resumes=False),
    Step("coverage", "figure 3: Pass@K over samples and compute"),
    Step("kernels", "one FF block: bandwidth and ratio to dense"),
    Step("decode", "a whole decode step without vLLM, beside the bytes that it reads"),
    Step("latency", "table 4: end to end, to first and to next token"),
    Step("exactness", "the engine's tokens against plain Hugging Face's"),
    Step("prefix", "what prefix caching saves"),
    Step("distill-speed", "speed and memory of distillation"),
)


@dataclass(frozen=True, kw_only=True)
class AllSettings(ResumableSettings):
    """Options of `caprese bench all`."""

    quick: Annotated[bool, typer.Option("--quick", help="Everything small: half an hour on two cores.")] = False
    only: Annotated[
        str | None, typer.Option(help=f"Comma-separated, of {', '.join(step.verb for step in STEPS)}. Default: all.")
    ] = None


@dataclass(frozen=True)
class Outcome:
    """How a step ended."""

    verb: str
    status: str  # "valid", or why there is no complete, valid result
    seconds: float


@options_of(AllSettings)
def all_benchmarks(settings: AllSettings) -> None:
    """Run every benchmark and write one report; after a step that fails the next one still runs."""
    only = names("--only", settings.only, [step.verb for step in STEPS]) if settings.only is not None else None
    out = settings.out
    check_writable(out)
    outcomes = []
    for step in STEPS:
        if only is not None and step.verb not in only:
            continue
        terminal.notes().rule(f"{step.verb}: {step.title}")
        begin = time.monotonic()
        code = _run(step, settings)
        if code == 130:  # interrupted, which the benchmark has reported
            write_report(out)
            raise KeyboardInterrupt
        outcomes.append(Outcome(step.verb, _status(out / f"{step.verb}.json", code), time.monotonic() - begin))
        write_report(out)
    if settings.as_json:
        steps = [{"verb": each.verb, "status": each.status, "seconds": each.seconds} for each in outcomes]
        terminal.print_json({"report": str(out / "report.html"), "steps": steps})
    else:
        terminal.result().print(_table(outcomes))
    terminal.notes().print(f"Written: {out / 'report.html'}", soft_wrap=True, markup=False)
    if failed := [each.verb for each in outcomes if each.status != "valid"]:
        raise CapreseError(
            "benchmarks",
            expected="a complete, valid result of each",
            found=f"none of {', '.join(failed)}",
            fix="see above",
        )


def _run(step: Step, settings: AllSettings) -> int:
    """The exit code of the step's process. After Ctrl-C, which reaches it too, it has a minute to write its rows.

    With --json its tables go to stderr.
    """
    command = [sys.executable, "-m", "caprese_serve", "bench", step.verb, "--out", str(settings.out)]
    command += step.quick if settings.quick else step.full
    command += ["--resume"] if settings.resume and step.resumes else []
    command += {terminal.Verbosity.QUIET: ["--quiet"], terminal.Verbosity.VERBOSE: ["--verbose"]}.get(
        terminal.verbosity(), []
    )
    with subprocess.Popen(command, stdout=sys.stderr if settings.as_json else None) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            try:
                process.wait(60)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                process.kill()
            return 130


def _status(path: Path, code: int) -> str:
    """ "valid", or why there is no complete, valid result."""
    from .results.schemas import check

    if code:
        return f"exit code {code}"
    try:
        check(path)
    except CapreseError as error:
        return str(error)
    return "partial" if Result.load(path).partial else "valid"


def write_report(out: Path) -> Path:
    """Write report.html, with the pages of all results in the folder on one; returns its path."""
    pages = {step: out / f"{step.verb}.html" for step in STEPS if (out / f"{step.verb}.html").exists()}
    contents = "".join(f'<li><a href="#{step.verb}">{step.verb}</a>: {html.escape(step.title)}</li>' for step in pages)
    bodies = [f'<section id="{step.verb}">{body_of(path.read_text())}</section>' for step, path in pages.items()]
    path = out / "report.html"
    text = document("Caprese: benchmarks", "\n".join([f"<h1>Caprese: benchmarks</h1><ul>{contents}</ul>", *bodies]))
    files.write_text(path, text)
    return path


def _table(outcomes: list[Outcome]) -> Table:
    shown = Table()
    shown.add_column("benchmark")
    shown.add_column("result")
    shown.add_column("minutes", justify="right")
    for each in outcomes:
        shown.add_row(each.verb, each.status, f"{each.seconds / 60:.1f}")
    shown.add_row("together", "", f"{sum(each.seconds for each in outcomes) / 60:.1f}")
    return shown
