"""`caprese bench latency`: the paper's table 4 through vLLM: Full, GRIFFIN, LoRA, Caprese, CATS, Caprese (CATS).

Each variant is an engine of its own; as many as memory holds live at once and take turns, so that whatever disturbs the
machine disturbs all, and a ratio is that of one round. Full is plain vLLM. Its floor is the bytes a token must read
(floor.py); beside every measured ratio stands the one that those bytes predict.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, quantiles
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from caprese_kernels.errors import CapreseError
from caprese_serve.provenance import provenance

from ..results.plots import Plot
from ..results.recording import check_writable, progress, recording
from ..results.report import Columns, Result, Row, iqr, table, terminal
from .models import ARCHS

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from .engines import Subject, Variant
    from .process import Answer, Engine

KEYS = ["section", "arch", "setup", "batch", "samples", "variant"]
MEASURES = ["tpot_ms", "e2e_s", "ttft_s", "ratio"]
ONE, BATCH, SAMPLES = "one request", "distinct prompts", "samples of one prompt"
PAPER, CPU = "2048+256,2048+2048", "256+32,256+128"
WARM_UP = 8  # tokens


def latency(
    arch: Annotated[
        str | None, typer.Option(help=f"Shape, with dummy weights, of: {', '.join(ARCHS)}. Default fits the machine.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Directory or Hub id of a checkpoint, instead of a shape.")] = None,
    weights: Annotated[
        list[str] | None, typer.Option(help="Adapter for the checkpoint, for each Caprese variant's method.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Text for prompts, as for `caprese distill`; default random.")
    ] = None,
    setups: Annotated[
        str | None, typer.Option(help=f"P+G prompt and generated tokens; default {PAPER} on a GPU, else {CPU}.")
    ] = None,
    variants: Annotated[
        str, typer.Option(help="Comma-separated, of full, griffin, lora, caprese, caprese-all, cats, caprese-cats.")
    ] = "full,griffin,lora,caprese,cats,caprese-cats",
    batch: Annotated[str, typer.Option(help="Comma-separated: so many prompts at once, in the first setup.")] = "",
    samples: Annotated[str, typer.Option("--n", help="Comma-separated: so many samples of one prompt at once.")] = "",
    rounds: Annotated[int, typer.Option(min=2, help="Times that every case is run on every engine.")] = 5,
    density: Annotated[float, typer.Option(min=0.01, max=1, help="Of the plain methods and random adapters.")] = 0.5,
    rank: Annotated[int, typer.Option(min=1, help="Of random L, R, and of what LoRA has as many parameters as.")] = 256,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    eager: Annotated[bool, typer.Option("--eager", help="No compiling and no CUDA graphs.")] = False,
    together: Annotated[
        int | None, typer.Option(min=2, help="Engines alive at once; default what memory holds.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One short setup, two rounds, four variants, eager.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows that are in --out already.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for latency.json, .csv and .html.")] = Path("out/bench"),
) -> None:
    """End-to-end latency, time to first and to next token of the paper's table 4, through vLLM."""
    import torch

    from . import engines as parts

    check_writable(out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if quick:
        setups, rounds, eager = setups or "64+16", 2, True
        variants = "full,griffin,lora,caprese" if variants.count(",") > 3 else variants
    chosen = _variants(variants)
    cases = make_cases(setups or (PAPER if device == "cuda" else CPU), batch, samples)
    arch = arch or ("qwen2.5-14b" if device == "cuda" else "qwen2.5-0.5b")
    with TemporaryDirectory() as scratch:
        subject = parts.subject_of(arch, model, weights or [], density, rank, dtype, Path(scratch))
        kv = parts.kv_gib(subject, max(case.batch * case.samples * (case.prompt + case.generated) for case in cases))
        pace = bandwidth(device)
        size = together or parts.room(subject, device, kv)
        settings = {"rounds": rounds, "density": density, "rank": rank, "dtype": dtype, "compiled": not eager}
        settings |= {"data": data and Path(data).name, "weights": _fingerprints(subject)}
        settings |= {"threads": torch.get_num_threads() if device == "cpu" else None}
        result = Result("latency", provenance() | {"settings": settings}, KEYS, MEASURES)
        result.provenance |= {"bandwidth": pace[0], "bandwidth_gb_s": pace[1]}
        console = terminal()
        with recording(result, out, plots, resume, console, COLUMNS) as record:
            for group in parts.groups(chosen, min(size, len(chosen))):
                todo = [case for case in cases if any(not record.has(case.key(subject, v)) for v in group[1:] or group)]
                if not todo:
                    continue
                longest = max(case.prompt + case.generated for case in cases) + WARM_UP
                most = max(case.batch * case.samples for case in cases)
                options = parts.engine_options(subject, device, longest, most, kv, 0.9 / len(group), eager)
                jobs = {v.id: parts.job_of(subject, v, options, Path(scratch)) for v in group}
                with parts.running(jobs, device, kv, out, console) as engines, progress(console) as bar:
                    line = bar.add_task("", total=len(todo) * len(group) * (rounds + 1))
                    for case in todo:
                        runs = measure(case, subject, data, group, engines, rounds, bar, line)
                        record.add(*rows(case, subject, runs, pace[1]))
            result.rows.sort(key=_place)
        for section, found in result.sections().items():
            console.print(table(section, found, COLUMNS))


@dataclass(frozen=True)
class Case:
    """`batch` different prompts of `prompt` tokens at once, `samples` answers of `generated` tokens to each."""

    section: str
    prompt: int
    generated: int
    batch: int = 1
    samples: int = 1

    def key(self, subject: Subject, variant: Variant) -> Row:
        return {
            "section": f"{self.section}, {subject.name}",
            "arch": subject.name,
            "setup": f"{self.prompt}+{self.generated}",
            "batch": self.batch,
            "samples": self.samples,
            "variant": variant.label,
        }


@dataclass
class Run:
    """One variant's answers to a case, a round each, and what the engine's counters say of them."""

    variant: Variant
    answers: list[Answer]
    kept: float  # neurons that some request keeps, of all: a step's share
    path: Row


def make_cases(setups: str, batch: str, samples: str) -> list[Case]:
    """The setups with one request each, then the sweeps in the first of them."""
    pairs = []
    for text in setups.split(","):
        prompt, _, generated = text.strip().partition("+")
        if not (prompt.isdigit() and generated.isdigit() and int(prompt) and int(generated) > 1):
            raise CapreseError(
                "--setups", expected="P+G, as 2048+256: prompt and generated tokens", found=text, fix="correct it"
            )
        pairs.append((int(prompt), int(generated)))
    cases = [Case(ONE, *pair) for pair in pairs]
    cases += [Case(BATCH, *pairs[0], batch=count) for count in _counts("--batch", batch)]
    return cases + [Case(SAMPLES, *pairs[0], samples=count) for count in _counts("--n", samples)]


def measure(
    case: Case,
    subject: Subject,
    data: str | None,
    group: list[Variant],
    engines: dict[str, Engine],
    rounds: int,
    bar: Progress,
    line: TaskID,
) -> list[Run]:
    """Every engine in turn, each round with other prompts and another engine first; the first round is not counted."""
    from .engines import prompts

    answers: dict[str, list[Answer]] = {variant.id: [] for variant in group}
    before: dict[str, Any] = {}
    unions: dict[str, float | None] = {}
    for turn in range(rounds + 1):
        asked = prompts(subject, data, case.batch, case.prompt, seed=turn)
        shift = turn % len(group)
        for variant in group[shift:] + group[:shift]:
            told = f"{case.section} {case.prompt}+{case.generated}, {case.batch * case.samples} at once, {variant.id}"
            bar.update(line, description=told)
            engine = engines[variant.id]
            if turn == 0:
                engine.ask(prompts=asked, max_tokens=WARM_UP, n=case.samples, reset=True)
                said = engine.ask("union", prompts=asked, max_tokens=case.generated, n=case.samples)
                unions[variant.id] = said["union"]
                before[variant.id] = engine.ask("report")["caprese"]
            else:
                answer = engine.ask(prompts=asked, max_tokens=case.generated, n=case.samples, reset=True)
                answers[variant.id].append(answer)
            bar.advance(line)
    runs = []
    for variant in group:
        after = engines[variant.id].ask("report")["caprese"]
        path = proof(subject, variant, case, rounds, before[variant.id], after)
        kept = unions[variant.id]
        if variant.method == "cats":  # every token has a choice of its own; several are taken as independent
            kept = 1 - (1 - path["kept_share"]) ** (case.batch * case.samples)
        elif kept is not None and kept < 0.99 * path["kept_share"]:  # the requests never held slots at once
            raise CapreseError(
                f"variant {variant.id}",
                expected=f"a union of selections of {path['kept_share']:.1%} at least",
                found=f"{kept:.1%}",
                fix="more generated tokens",
            )
        runs.append(Run(variant, answers[variant.id], 1.0 if kept is None else kept, path))
    return runs


def proof(subject: Subject, variant: Variant, case: Case, rounds: int, before: Any, after: Any) -> Row:
    """What the engine's own counters say of a variant's tokens; CapreseError unless they ran the variant's path."""
    from caprese_kernels.reference import griffin_count  # torch

    def refuse(expected: str, found: object) -> None:
        raise CapreseError(f"variant {variant.id}", expected=expected, found=str(found), fix="report this bug")

    if variant.method is None:
        if after is not None:
            refuse("plain vLLM", after)
        return {}
    if after is None or after["method"] != variant.method or tuple(after["layers"]) != subject.layers(variant):
        refuse(f"{variant.method} in layers {list(subject.layers(variant))}", after)
    if after["rank"] != subject.rank_of(variant):
        refuse(f"rank {subject.rank_of(variant)}", after["rank"])
    if after["kernel"].startswith("lora") != (variant.correction == "lora"):
        refuse("LoRA" if variant.correction == "lora" else "no LoRA", after["kernel"])
    tokens = after["generated_tokens"] - before["generated_tokens"]
    expected = rounds * case.batch * case.samples * (case.generated - 1)  # the prompt's pass makes the first
    if tokens < expected:
        refuse(f"{expected} tokens generated by sparse FF blocks", tokens)
    read = (
        after["ff_weights_read"] * after["generated_tokens"]
        - (before["ff_weights_read"] or 0) * before["generated_tokens"]
    )
    kept = kept_share(subject, variant, read / tokens)
    density = subject.density_of(variant.method)
    if abs(after["density"] - density) > 1e-9:
        refuse(f"density {density:g}", after["density"])
    goal = griffin_count(density, subject.weights.neurons) / subject.weights.neurons
    # CATS' threshold is the prompt's: generated tokens may keep other shares, but not nearly all.
    if abs(kept - goal) > (1e-6 if variant.method == "griffin" else 0.9 * (1 - goal)):
        refuse(f"{goal:.0%} of the neurons kept", f"{kept:.1%}")
    return {"sparse_tokens": tokens, "ff_weights_read": read / tokens, "kept_share": kept, "kernel": after["kernel"]}


def kept_share(subject: Subject, variant: Variant, ff_read: float) -> float:
    """Share of a sparse layer's neurons that a token keeps, from the share of all FF weights that it needs."""
    weights, sparse = subject.weights, len(subject.layers(variant))
    matrix = weights.neurons * weights.hidden_size
    block = (ff_read * weights.layers - (weights.layers - sparse)) / sparse * 3 * matrix  # values read of one
    block -= 2 * subject.rank_of(variant) * weights.hidden_size
    return block / (3 * matrix) if variant.method == "griffin" else (block - matrix) / (2 * matrix)


def rows(case: Case, subject: Subject, runs: list[Run], pace: float) -> list[Row]:
    """A row a variant. Times are medians over rounds, with interquartile ranges; a ratio is to Full in that round."""
    from ..kernels.floor import step_bytes

    full = [means(answer) for answer in runs[0].answers]
    requests = case.batch * case.samples

    def needed(run: Run) -> float:
        sparse, added = len(subject.layers(run.variant)), subject.added(run.variant)
        context = case.prompt + case.generated / 2
        return step_bytes(
            subject.weights, run.variant.method, sparse, run.kept, added, context, requests, subject.itemsize
        )

    made = []
    for run in runs:
        mine = [means(answer) for answer in run.answers]
        gaps = [b - a for answer in run.answers for times in answer["times"] for a, b in pairwise(times)]
        ratios, e2e = (
            [own[name] / other[name] for own, other in zip(mine, full, strict=True)] for name in ("tpot", "e2e")
        )
        tpot = median(each["tpot"] for each in mine)
        centiles = quantiles(gaps, n=100, method="inclusive")
        row = case.key(subject, run.variant) | {"dummy_weights": subject.dummy, "rounds": len(mine)}
        for name, scale in (("e2e", 1), ("ttft", 1), ("tpot", 1e3)):
            unit = "ms" if scale > 1 else "s"
            values = [scale * each[name] for each in mine]
            row |= {f"{name}_{unit}": median(values), f"{name}_iqr_{unit}": iqr(values)}
        row |= {"tpot_p50_ms": 1e3 * centiles[49], "tpot_p99_ms": 1e3 * centiles[98]}
        row |= {"tokens_per_s": requests / tpot, "ratio": median(ratios), "ratio_iqr": iqr(ratios)}
        row |= {"predicted_ratio": needed(run) / needed(runs[0]), "e2e_ratio": median(e2e)}
        row |= {"full_tpot_ms": 1e3 * median(each["tpot"] for each in full), "mb_a_step": needed(run) / 1e6}
        row |= {"gb_s": needed(run) / tpot / 1e9, "bandwidth_share": needed(run) / tpot / 1e9 / pace}
        made.append(row | {"union_share": run.kept if run.variant.method else None} | run.path)
    return made


def means(answer: Answer) -> dict[str, float]:
    """Seconds of one round: until the last answer's end; to first and to next token, means over requests."""
    from .process import first_token, next_token

    last = max(times[-1] for times in answer["times"])
    return {"e2e": last, "ttft": mean(first_token(answer)), "tpot": mean(next_token(answer))}


def bandwidth(device: str) -> tuple[str, float]:
    """What reads the memory at its pace, and GB/s: the median of seven, before the engines start."""
    import torch

    from ..kernels.timing import Timer, memory

    source, size, calls = memory(device)
    timer = Timer(calls, device)
    pace = size / median(timer.sample() for _ in range(7)) / 1e9
    del timer, calls
    if device == "cuda":
        torch.cuda.empty_cache()  # the engines take what is free
    return source, pace


def _place(row: Row) -> tuple[Any, ...]:
    """Of a row in the tables: by model, then setups by size, then variants as they are listed."""
    from .engines import VARIANTS

    labels = [variant.label for variant in VARIANTS.values()]
    kind = [ONE, BATCH, SAMPLES].index(row["section"].partition(", ")[0])
    length = sum(map(int, row["setup"].split("+")))
    return kind, row["arch"], length, row["batch"], row["samples"], labels.index(row["variant"])


def _variants(text: str) -> list[Variant]:
    from .engines import VARIANTS

    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in VARIANTS:
            raise CapreseError("--variants", expected=f"of {', '.join(VARIANTS)}", found=repr(name), fix="correct it")
    if "full" not in names:
        raise CapreseError("--variants", expected="full among them, which ratios are to", found=text, fix="add it")
    return [variant for name, variant in VARIANTS.items() if name in names]


def _fingerprints(subject: Subject) -> dict[str, str] | None:
    """The adapters that the user gave, by method."""
    found = {str(method): sha256(path.read_bytes()).hexdigest()[:16] for method, (path, _) in subject.adapters.items()}
    return found or None


def _counts(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() and int(part) for part in parts):
        raise CapreseError(option, expected="comma-separated numbers from 1", found=repr(text), fix="correct it")
    return [int(part) for part in parts]


COLUMNS: Columns = {
    "variant": ("variant", str),
    "setup": ("setup", str),
    "prompts": ("batch", str),
    "samples": ("samples", str),
    "end to end, s": ("e2e_s", "{:.2f}".format),
    "±": ("e2e_iqr_s", "{:.2f}".format),
    "first token, s": ("ttft_s", "{:.3f}".format),
    "next token, ms": ("tpot_ms", "{:.2f}".format),
    "± ": ("tpot_iqr_ms", "{:.2f}".format),
    "p50": ("tpot_p50_ms", "{:.2f}".format),
    "p99": ("tpot_p99_ms", "{:.2f}".format),
    "of Full": ("ratio", "{:.3f}".format),
    " ±": ("ratio_iqr", "{:.3f}".format),
    "by bytes": ("predicted_ratio", "{:.3f}".format),
    "MB a step": ("mb_a_step", "{:.0f}".format),
    "GB/s": ("gb_s", "{:.1f}".format),
    "of bandwidth": ("bandwidth_share", "{:.0%}".format),
}


def plots(result: Result) -> list[Plot]:
    """Table 4 as bars; the sweeps as lines, whose level is Full."""
    next_token, ratio, setup = "time to next token, ms", "time to next token / Full's", "prompt + generated tokens"
    made = []
    for section in result.sections():
        kind = section.partition(", ")[0]
        if kind == ONE:
            made += [
                Plot(section, "setup", "tpot_ms", ("variant",), setup, next_token, error="tpot_iqr_ms", kind="bar",
                     show="{:.1f}".format),
                Plot(section, "setup", "e2e_s", ("variant",), setup, "end to end, s", error="e2e_iqr_s", kind="bar",
                     show="{:.1f}".format),
                Plot(section, "setup", "ratio", ("variant",), setup, ratio, error="ratio_iqr", kind="bar", level=1,
                     show="{:.2f}".format),
                Plot(section, "setup", "predicted_ratio", ("variant",), setup, "bytes / Full's", kind="bar", level=1,
                     show="{:.2f}".format),
            ]  # fmt: skip
            continue
        x = "batch" if kind == BATCH else "samples"
        made += [
            Plot(section, x, "ratio", ("variant",), kind, ratio, error="ratio_iqr", log2_x=True, level=1),
            Plot(section, x, "tokens_per_s", ("variant",), kind, "tokens/s", log2_x=True),
        ]
    return made
