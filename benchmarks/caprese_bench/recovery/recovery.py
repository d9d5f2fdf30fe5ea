"""`caprese bench recovery`: what each way of training gives back of the accuracy that a sparse method loses.

On the demo model and its held-out problems, for GRIFFIN and CATS (the paper's tables 1, 2 and 5): Full, the method
alone, L and R layer-wise by Adam and by the closed form, then end to end, and LoRA of as many parameters. Answers are
greedy, of `hf_decode`. Share recovered: (correction - method) / (Full - method), its error by the paired differences.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from caprese_kernels.errors import CapreseError
from caprese_serve.demo import MODEL
from caprese_serve.demo.problems import TASKS, Problem, Task, problems
from caprese_serve.demo.results import Score
from caprese_serve.provenance import git_commit, provenance

from ..results.plots import Plot
from ..results.recording import recording
from ..results.report import Columns, Result, Row, table, terminal
from .demo_settings import RANK, SETTINGS

if TYPE_CHECKING:
    from .adapters import Correction, Maker

KEYS = ["section", "variant"]
MEASURES = ["math", "reading", "ff_error", "hidden_error", "seconds"]
LABELS = {"griffin": "GRIFFIN", "cats": "CATS"}


def recovery(
    count: Annotated[int, typer.Option("--problems", min=2, help="Held-out problems of each task.")] = 1000,
    samples: Annotated[int, typer.Option(min=4, help="Training problems, half of each task.")] = 16000,
    seed: Annotated[int, typer.Option(help="Seed of the training problems.")] = 1,
    adapters: Annotated[
        Path | None,
        typer.Option(help="Folder with METHOD-STAGE.safetensors to take as they are; what is missing is made."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the model, in training and answering; auto is its own.")] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="At most 20 problems, 60 samples; one epoch of everything.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for recovery.json, .csv and .html.")] = Path("out/bench"),
) -> None:
    """Accuracy that L and R give back, layer-wise and end to end, beside LoRA; a killed run goes on where it was."""
    import torch

    from caprese_distill.blocks import resolve_method
    from caprese_distill.data.samples import Row as Data
    from caprese_distill.data.samples import encode
    from caprese_distill.loading import load_model, load_small_parts

    from ..lora.training import lora_rank
    from .adapters import STAGES, Maker

    if adapters is not None and not adapters.is_dir():
        raise CapreseError("--adapters", expected="a folder", found=f"no folder {adapters}", fix="correct it")
    if quick:
        count, samples = min(count, 20), min(samples, 60)
    console, folder = terminal(), out / "recovery"
    folder.mkdir(parents=True, exist_ok=True)
    config, tokenizer = load_small_parts(str(MODEL))
    model = load_model(str(MODEL), dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    drawn = [p for pair in zip(*(problems(t, "train", samples // 2, seed) for t in TASKS), strict=True) for p in pair]
    rows = [Data(line, p.prompt, p.response) for line, p in enumerate(drawn, start=1)]
    encoded, _ = encode(tokenizer, rows, max_length=model.config.max_position_embeddings)
    asked: dict[Task, list[Problem]] = {task: list(problems(task, "test", count)) for task in TASKS}

    told = {name: asdict(each) for name, each in SETTINGS.items()}
    settings = {"problems": count, "samples": samples, "seed": seed, "dtype": str(model.dtype), "quick": quick}
    result = Result("recovery", provenance() | {"settings": settings | {"distillation": told}}, KEYS, MEASURES)
    examiner = Examiner(model, tokenizer, encoded, asked, folder, console)
    with recording(result, out, plots, resume=None, console=console, columns=COLUMNS) as record:
        full = examiner.examine("full")
        for name, chosen in SETTINGS.items():
            info, method = resolve_method(config, "caprese-demo", name, chosen.density, RANK, chosen.layers)
            section = f"{LABELS[name]}, density {method.density:g}, layers {', '.join(map(str, method.layers))}"
            maker = Maker(model, encoded, info, method, chosen, folder, adapters, console, quick)
            plain = examiner.examine(f"{name}-plain", maker, maker.plain())
            record.add(row(section, "Full", full, None, full), row(section, LABELS[name], plain, None, full))
            for stage, label in STAGES.items():
                found = examiner.examine(f"{name}-{stage}", maker, maker.make(stage))
                record.add(row(section, label, found, plain, full))
            result.provenance["settings"]["rank"] = {"L, R": RANK, "LoRA": lora_rank(info, RANK)}
    for section, part in result.sections().items():
        console.print(table(section, part, COLUMNS))
        for remark in remarks(part):
            console.print(remark)


def plots(result: Result) -> list[Plot]:
    """Accuracy against the error that training makes small."""
    error = "held-out error of the last hidden state, eq. 8"
    return [
        Plot(
            section, "hidden_error", task, ("variant",), error, f"{task} accuracy", error=f"{task}_stderr", percent=True
        )
        for section in result.sections()
        for task in TASKS
    ]


@dataclass
class Findings:
    """One variant, examined."""

    marks: dict[Task, str]  # a character a problem, 1 where the answer was right
    parameters: int = 0  # added
    seconds: float = 0.0  # wall time of the training, all stages
    ff_error: float = 0.0  # eq. 7 on held-out samples, mean over layers
    hidden_error: float = 0.0  # eq. 8 on held-out samples

    def score(self, task: Task) -> Score:
        return Score.of([mark == "1" for mark in self.marks[task]])


class Examiner:
    """Asks the model the problems and measures its held-out errors; what an earlier run found is not done again."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        samples: Sequence[Any],
        asked: Mapping[Task, Sequence[Problem]],
        folder: Path,
        console: Console,
    ):
        from caprese_distill.checkpoint import fingerprint

        self.model, self.tokenizer, self.samples, self.asked = model, tokenizer, samples, asked
        self.folder, self.console = folder, console
        counts = {task: len(each) for task, each in asked.items()}
        self.base = fingerprint(model, samples, dtype=str(model.dtype), problems=counts, commit=git_commit())

    def examine(self, name: str, maker: Maker | None = None, correction: Correction | None = None) -> Findings:
        """The original model; given a correction, the method of `maker` with it. Kept as NAME.json."""
        path, identity = self.folder / f"{name}.json", self._identity(maker, correction)
        if path.exists():
            found = json.loads(path.read_text())
            if found.pop("identity") == identity:
                return Findings(**found)
        findings = self._examine(name, maker, correction)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(findings) | {"identity": identity}, indent=1) + "\n")
        os.replace(partial, path)
        return findings

    def _identity(self, maker: Maker | None, correction: Correction | None) -> str:
        from caprese_distill.checkpoint import digest

        from ..lora.training import tensors

        told: list[Any] = [self.base]
        if maker and correction:
            method = maker.method
            told += [
                method.name,
                method.density,
                list(method.layers),
                correction.seconds,
                digest(tensors(correction.ff)),
            ]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def _examine(self, name: str, maker: Maker | None, correction: Correction | None) -> Findings:
        from caprese_distill.progress import progress_bar

        from ..hugging_face.decoding import decode, score
        from ..hugging_face.students import DecodedFF, held_out_errors

        ff = None
        if maker and correction:
            ff = {i: DecodedFF(maker.method, each) for i, each in correction.ff.items()}
        findings = Findings({})
        with progress_bar(self.console, "problems/s") as bar:
            line = bar.add_task(name, total=sum(len(each) for each in self.asked.values()))
            for task, each in self.asked.items():
                answers = decode(self.model, self.tokenizer, each, ff, advance=lambda n: bar.advance(line, n))
                findings.marks[task] = score(self.tokenizer, each, answers).marks
        if maker and correction:
            findings.parameters, findings.seconds = correction.parameters, correction.seconds
            errors = held_out_errors(self.model, self.samples, maker.info, maker.method, correction.ff)
            findings.ff_error, findings.hidden_error = errors
        return findings


def row(section: str, variant: str, found: Findings, plain: Findings | None, full: Findings) -> Row:
    """One line of the table; `plain` is the method alone, for what a correction of it recovers."""
    made: Row = {"section": section, "variant": variant, "problems": len(full.marks["math"])}
    made |= {key: getattr(found, key) for key in ("parameters", "seconds", "ff_error", "hidden_error")}
    for task in TASKS:
        score = found.score(task)
        below, error = full.score(task).gain_over(score)
        made |= {task: score.accuracy, f"{task}_stderr": score.stderr}
        made |= {f"{task}_below_full": below, f"{task}_below_full_stderr": error}
        share = recovered(full.marks[task], plain.marks[task], found.marks[task]) if plain else None
        made |= {f"{task}_recovered": share and share[0], f"{task}_recovered_stderr": share and share[1]}
    return made


def recovered(full: str, plain: str, corrected: str) -> tuple[float, float] | None:
    """The share of the lost points that a correction gives back, and its standard error; None where no loss shows.

    A ratio of means of paired differences, a / b over problems: its error, to first order, is that of the mean of
    a - share b, divided by the mean of b. A loss shows where it is more than two standard errors.
    """
    right = [[int(mark) for mark in marks] for marks in (full, plain, corrected)]
    lost = [f - p for f, p, _ in zip(*right, strict=True)]
    back = [c - p for _, p, c in zip(*right, strict=True)]
    count, mean = len(lost), sum(lost) / len(lost)
    if mean <= 2 * sqrt(sum((b - mean) ** 2 for b in lost)) / count:
        return None
    share = sum(back) / count / mean
    return share, sqrt(sum((a - share * b) ** 2 for a, b in zip(back, lost, strict=True))) / count / mean


def remarks(rows: Sequence[Row]) -> list[str]:
    """A method's part of the table in words."""
    _, plain, *corrections = rows
    told = []
    for task in TASKS:
        lost, error = (100 * plain[f"{task}_below_full{part}"] for part in ("", "_stderr"))
        parts = [f"{plain['variant']} loses {lost:.1f} ± {error:.1f} points of {task}"]
        for each in corrections:
            share, error = each[f"{task}_recovered"], each[f"{task}_recovered_stderr"]
            if share is None:
                below, error = (100 * each[f"{task}_below_full{part}"] for part in ("", "_stderr"))
                parts.append(f"{each['variant']} is {below:.1f} ± {error:.1f} below Full")
            else:
                parts.append(f"{each['variant']} gives back {share:.0%} ± {100 * error:.0f}")
        told.append("; ".join(parts) + ".")
    return told


def _points(value: float) -> str:
    return f"{100 * value:.1f}"


COLUMNS: Columns = {
    "variant": ("variant", str),
    "parameters": ("parameters", "{:,}".format),
    "training, s": ("seconds", "{:.1f}".format),
    "eq. 7": ("ff_error", "{:.2%}".format),
    "eq. 8": ("hidden_error", "{:.2%}".format),
    "math %": ("math", _points),
    "±": ("math_stderr", _points),
    "recovered %": ("math_recovered", _points),
    "± ": ("math_recovered_stderr", _points),
    "reading %": ("reading", _points),
    " ±": ("reading_stderr", _points),
    "below Full": ("reading_below_full", _points),
    " ± ": ("reading_below_full_stderr", _points),
    "problems": ("problems", str),
}
