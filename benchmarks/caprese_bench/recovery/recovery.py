"""`caprese bench recovery`: how much of the accuracy that a sparse method loses each way of training recovers.

On the demo model and its held-out problems, for GRIFFIN and CATS (the paper's tables 1, 2 and 5): Full, the method
alone, L and R layer-wise by Adam and by the closed form, then end to end, and LoRA with as many parameters. Answers are
greedy (hugging_face/decoding.py). The share recovered is (correction - method) / (Full - method); its error comes from
the paired differences.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from caprese_kernels import files, terminal
from caprese_kernels.errors import CapreseError
from caprese_serve.demo import MODEL
from caprese_serve.demo.problems import TASKS, Problem, Task, problems
from caprese_serve.demo.results import Score
from caprese_serve.provenance import git_commit, provenance

from ..results.parsing import read_json
from ..results.plots import Plot
from ..results.recording import recording
from ..results.report import Columns, Result, Row, show
from ..results.settings import OutputSettings, options_of
from .demo_settings import RANK, SETTINGS

if TYPE_CHECKING:
    from caprese_distill.data.samples import Sample

    from .adapters import Correction, CorrectionStore

KEYS = ["section", "variant"]
MEASURES = ["math", "reading", "ff_error", "hidden_error", "seconds"]
LABELS = {"griffin": "GRIFFIN", "cats": "CATS"}


@dataclass(frozen=True, kw_only=True)
class RecoverySettings(OutputSettings):
    """Options of `caprese bench recovery`."""

    problems: Annotated[int, typer.Option(min=2, help="Held-out problems of each task.")] = 1000
    samples: Annotated[int, typer.Option(min=4, help="Training problems, half of each task.")] = 16000
    seed: Annotated[int, typer.Option(help="Seed of the training problems.")] = 1
    adapters: Annotated[
        Path | None,
        typer.Option(help="Folder with METHOD-STAGE.safetensors to use as they are; missing ones are trained."),
    ] = None
    dtype: Annotated[
        str, typer.Option(help="Of the model, in training and answering; auto is the checkpoint's own.")
    ] = "auto"
    quick: Annotated[
        bool, typer.Option("--quick", help="At most 20 problems and 60 samples, one epoch of everything.")
    ] = False


@options_of(RecoverySettings)
def recovery(settings: RecoverySettings) -> None:
    """Accuracy that L and R recover, layer-wise and end to end, beside LoRA; a killed run continues when run again."""
    import torch

    from caprese_distill.blocks import resolve_method
    from caprese_distill.loading import load_model, load_small_parts

    from ..lora.training import lora_rank
    from .adapters import STAGES, CorrectionStore

    given = settings.adapters
    if given is not None and not given.is_dir():
        raise CapreseError("--adapters", expected="a folder", found=f"no folder {given}", fix="correct the path")
    if settings.quick:
        settings = replace(settings, problems=min(settings.problems, 20), samples=min(settings.samples, 60))
    folder = settings.out / "recovery"
    folder.mkdir(parents=True, exist_ok=True)
    config, tokenizer = load_small_parts(str(MODEL))
    model = load_model(str(MODEL), settings.dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    samples = training_samples(tokenizer, settings, model.config.max_position_embeddings)
    asked: dict[Task, list[Problem]] = {task: list(problems(task, "test", settings.problems)) for task in TASKS}

    recorded: dict[str, Any] = {"problems": settings.problems, "samples": settings.samples, "seed": settings.seed}
    recorded |= {"dtype": str(model.dtype), "quick": settings.quick}
    recorded |= {"distillation": {name: asdict(each) for name, each in SETTINGS.items()}}
    result = Result("recovery", provenance() | {"settings": recorded}, KEYS, MEASURES)
    evaluator = Evaluator(model, tokenizer, samples, asked, folder)
    with recording(result, settings.out, plots, resume=None, columns=COLUMNS) as record:
        full = evaluator.evaluate("full")
        for name, chosen in SETTINGS.items():
            info, method = resolve_method(config, "caprese-demo", name, chosen.density, RANK, chosen.layers)
            section = f"{LABELS[name]}, density {method.density:g}, layers {', '.join(map(str, method.layers))}"
            store = CorrectionStore(model, samples, info, method, chosen, folder, given, settings.quick)
            plain = evaluator.evaluate(f"{name}-plain", store, store.plain())
            record.add(row(section, "Full", full, None, full), row(section, LABELS[name], plain, None, full))
            for stage, label in STAGES.items():
                findings = evaluator.evaluate(f"{name}-{stage}", store, store.make(stage))
                record.add(row(section, label, findings, plain, full))
            result.provenance["settings"]["rank"] = {"L, R": RANK, "LoRA": lora_rank(info, RANK)}
    show(result, COLUMNS, settings.as_json)
    if not settings.as_json:
        for rows in result.sections().values():
            for remark in remarks(rows):
                terminal.result().print(remark)


def training_samples(tokenizer: Any, settings: RecoverySettings, max_length: int) -> list[Sample]:
    """Training problems of the demo with their responses, the tasks in turn, as token ids."""
    from caprese_distill.data.chat import ChatRenderer
    from caprese_distill.data.rows import Row as Data
    from caprese_distill.data.samples import encode

    by_task = [problems(task, "train", settings.samples // 2, settings.seed) for task in TASKS]
    drawn = [problem for pair in zip(*by_task, strict=True) for problem in pair]
    rows = [Data(line, problem.prompt, problem.response) for line, problem in enumerate(drawn, start=1)]
    return encode(ChatRenderer(tokenizer), rows, max_length=max_length)[0]


def plots(result: Result) -> list[Plot]:
    """Accuracy over the error that the training minimizes."""
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
    """What was measured of one variant."""

    marks: dict[Task, str]  # a character for each problem, 1 if the answer was right
    parameters: int = 0  # added by the correction
    seconds: float = 0.0  # wall time of its training, all stages
    ff_error: float = 0.0  # eq. 7 on held-out samples, mean over layers
    hidden_error: float = 0.0  # eq. 8 on held-out samples

    def score(self, task: Task) -> Score:
        """Accuracy on a task."""
        return Score.of([mark == "1" for mark in self.marks[task]])


class Evaluator:
    """Grades the model's answers and measures its held-out errors; what an earlier run measured is read from files."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        samples: Sequence[Any],
        asked: Mapping[Task, Sequence[Problem]],
        folder: Path,
    ):
        from caprese_distill.checkpoint import fingerprint

        self.model, self.tokenizer, self.samples, self.asked = model, tokenizer, samples, asked
        self.folder = folder
        counts = {task: len(each) for task, each in asked.items()}
        self.base = fingerprint(model, samples, dtype=str(model.dtype), problems=counts, commit=git_commit())

    def evaluate(
        self, name: str, store: CorrectionStore | None = None, correction: Correction | None = None
    ) -> Findings:
        """The findings of the original model or, with a correction, of the store's method; kept as NAME.json."""
        path, identity = self.folder / f"{name}.json", self._identity(store, correction)
        if path.exists():
            with contextlib.suppress(CapreseError, TypeError, AttributeError):  # a damaged file is measured again
                kept = read_json(path)
                if kept.pop("identity", None) == identity:
                    return Findings(**kept)
        findings = self._measure(name, store, correction)
        files.write_text(path, json.dumps(asdict(findings) | {"identity": identity}, indent=1) + "\n")
        return findings

    def _identity(self, store: CorrectionStore | None, correction: Correction | None) -> str:
        """Digest of all that the findings depend on."""
        from caprese_distill.checkpoint import digest

        from ..lora.training import tensors

        parts: list[Any] = [self.base]
        if store and correction:
            method = store.method
            parts += [method.name, method.density, list(method.layers)]
            parts += [correction.seconds, digest(tensors(correction.ff))]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _measure(self, name: str, store: CorrectionStore | None, correction: Correction | None) -> Findings:
        from caprese_distill.progress import progress_bar

        from ..hugging_face.decoding import decode, score
        from ..hugging_face.students import DecodedFF, held_out_errors

        ff = None
        if store and correction:
            ff = {i: DecodedFF(store.method, each) for i, each in correction.ff.items()}
        findings = Findings({})
        with progress_bar(terminal.notes(), "problems/s") as bar:
            line = bar.add_task(name, total=sum(len(each) for each in self.asked.values()))
            for task, each in self.asked.items():
                answers = decode(self.model, self.tokenizer, each, ff, advance=lambda n: bar.advance(line, n))
                findings.marks[task] = score(self.tokenizer, each, answers).marks
        if store and correction:
            findings.parameters, findings.seconds = correction.parameters, correction.seconds
            errors = held_out_errors(self.model, self.samples, store.info, store.method, correction.ff)
            findings.ff_error, findings.hidden_error = errors
        return findings


def row(section: str, variant: str, found: Findings, plain: Findings | None, full: Findings) -> Row:
    """A variant's row. With `plain`, the method alone, it includes what the variant recovers of the method's loss."""
    columns: Row = {"section": section, "variant": variant, "problems": len(full.marks["math"])}
    columns |= {key: getattr(found, key) for key in ("parameters", "seconds", "ff_error", "hidden_error")}
    for task in TASKS:
        score = found.score(task)
        below, error = full.score(task).gain_over(score)
        columns |= {task: score.accuracy, f"{task}_stderr": score.stderr}
        columns |= {f"{task}_below_full": below, f"{task}_below_full_stderr": error}
        share = recovered(full.marks[task], plain.marks[task], found.marks[task]) if plain else None
        columns |= {f"{task}_recovered": share and share[0], f"{task}_recovered_stderr": share and share[1]}
    return columns


def recovered(full: str, plain: str, corrected: str) -> tuple[float, float] | None:
    """(Share of the lost points that a correction recovers, its standard error); None without a significant loss.

    A loss is significant if it exceeds two standard errors. With a the points recovered and b those lost, paired by
    problem, the share is mean(a) / mean(b); to first order its error is that of mean(a - share b), over mean(b).
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
    """A section of the table in words, a sentence for each task."""
    _, plain, *corrections = rows
    sentences = []
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
        sentences.append("; ".join(parts) + ".")
    return sentences


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
