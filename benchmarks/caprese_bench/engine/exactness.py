"""`caprese bench exactness`: the engine's answers on the demo model against plain Hugging Face's, and graded.

In float32 the greedy tokens must equal, token by token, those of transformers on a CPU with the method written out
(hugging_face/decoding.py), whether the engine is compiled, uses CUDA graphs, or runs on a GPU. In bfloat16 roundings
differ, so the same engines' answers are graded instead: the table of `caprese demo` without a server.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from caprese_kernels.errors import CapreseError
from caprese_serve.provenance import provenance

from ..results.recording import check_writable, progress, recording
from ..results.report import Columns, Result, Row, show
from ..results.settings import ResumableSettings, options_of

if TYPE_CHECKING:
    from caprese_serve.demo.problems import Problem
    from caprese_serve.demo.run import Variant

KEYS = ["section", "variant"]
MEASURES = ["equal", "math", "reading"]
TOKENS, GRADED = "float32, token by token", "bfloat16, graded"


@dataclass(frozen=True, kw_only=True)
class ExactnessSettings(ResumableSettings):
    """Options of `caprese bench exactness`."""

    problems: Annotated[int, typer.Option(min=1, help="Held-out problems of each task whose tokens are compared.")] = 64
    math: Annotated[int, typer.Option(min=1, help="Held-out word problems that are graded.")] = 300
    reading: Annotated[int, typer.Option(min=1, help="Held-out reading questions that are graded.")] = 100
    variants: Annotated[
        str, typer.Option(help="Comma-separated, of full, griffin, caprese-griffin, cats, caprese-cats.")
    ] = "full,griffin,caprese-griffin,cats,caprese-cats"
    eager: Annotated[
        bool | None,
        typer.Option("--eager/--compiled", help="Default: compiled, with CUDA graphs, on a GPU; eager on a CPU."),
    ] = None
    quick: Annotated[bool, typer.Option("--quick", help="16 problems compared, 40 and 20 graded.")] = False


@options_of(ExactnessSettings)
def exactness(settings: ExactnessSettings) -> None:
    """The demo model's answers through vLLM: equal to Hugging Face's in float32, and graded in bfloat16."""
    import torch

    from caprese_serve.demo.problems import problems
    from caprese_serve.demo.run import _chosen

    check_writable(settings.out)
    if settings.quick:
        settings = replace(
            settings,
            problems=min(settings.problems, 16),
            math=min(settings.math, 40),
            reading=min(settings.reading, 20),
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    eager = device == "cpu" if settings.eager is None else settings.eager
    chosen = _chosen(settings.variants.split(","))
    compared = [*problems("math", "test", settings.problems), *problems("reading", "test", settings.problems)]
    graded = [*problems("math", "test", settings.math), *problems("reading", "test", settings.reading)]
    recorded = {"problems": settings.problems, "math": settings.math, "reading": settings.reading}
    recorded |= {"compiled": not eager}
    result = Result("exactness", provenance() | {"settings": recorded}, KEYS, MEASURES)
    with recording(result, settings.out, (), settings.resume, COLUMNS) as record, progress() as bar:
        line = bar.add_task("", total=2 * len(chosen))
        for section, dtype, asked in ((TOKENS, "float32", compared), (GRADED, "bfloat16", graded)):
            todo = [v for v in chosen if not record.has({"section": section, "variant": v.label})]
            bar.update(line, description=f"{section}: engines", advance=len(chosen) - len(todo))
            for variant, answers, counted in _answers(todo, dtype, asked, device, eager, settings.out):
                bar.update(line, description=f"{section}, {variant.label}")
                key = {"section": section, "variant": variant.label}
                figures = (_compare if section == TOKENS else _grade)(variant, asked, answers)
                record.add(key | counted | figures)
                bar.advance(line)
    show(result, COLUMNS, settings.as_json)
    compared_rows = result.sections().get(TOKENS, [])
    if different := [row["variant"] for row in compared_rows if row["equal"] < row["problems"]]:
        raise CapreseError(
            "exactness",
            expected="the tokens of Hugging Face",
            found=f"different ones by {', '.join(different)}",
            fix="report this bug",
        )


def _answers(
    variants: Sequence[Variant], dtype: str, asked: Sequence[Problem], device: str, eager: bool, out: Path
) -> Iterator[tuple[Variant, list[list[int]], Row]]:
    """(variant, token ids of its answers, columns from its engine's counters). On a GPU the engines run together."""
    from caprese_serve.demo import MODEL

    from ..hugging_face.decoding import MAX_TOKENS, prompt_ids
    from .engines import running
    from .process import EngineSettings

    options = {"seed": 0, "dtype": dtype, "max_model_len": 512, "max_num_seqs": 64, "enforce_eager": eager}
    options |= {"skip_tokenizer_init": True}
    if device == "cuda":
        options |= {"kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.1}
    tokenizer = _tokenizer()
    prompts = [prompt_ids(tokenizer, problem) for problem in asked]
    # By default Triton multiplies float32 with 10 bits of mantissa on NVIDIA GPUs, in attention too.
    exact = {"TRITON_F32_DEFAULT": "ieee"} if dtype == "float32" else {}
    batches = [variants] if device == "cuda" else [[variant] for variant in variants]
    for batch in batches:
        engine_settings = {v.id: EngineSettings(str(MODEL), v.settings(), options, exact) for v in batch}
        with running(engine_settings, device, 1.0, out, "exactness") as engines:
            for variant in batch:
                engine = engines[variant.id]
                ids = engine.run("answer", prompts=prompts, max_tokens=MAX_TOKENS, stop=tokenizer.eos_token_id)["ids"]
                yield variant, ids, _counted(variant, ids, engine.run("report")["caprese"])


def _counted(variant: Variant, ids: Sequence[Sequence[int]], report: dict[str, Any] | None) -> Row:
    """Columns from the engine's counters. Raises CapreseError unless they cover the answers' tokens."""
    if variant.method is None and report is None:
        return {"kernel": "plain vLLM"}
    expected = sum(max(len(answer) - 1, 0) for answer in ids)  # an answer's first token comes from its prompt's pass
    if report is None or variant.method is None or report["generated_tokens"] < expected:
        raise CapreseError(
            f"variant {variant.id}",
            expected=f"{expected} tokens generated by sparse FF blocks" if variant.method else "plain vLLM",
            found=str(report),
            fix="report this bug",
        )
    return {key: report[key] for key in ("kernel", "ff_weights_read")} | {"sparse_tokens": report["generated_tokens"]}


def _compare(variant: Variant, asked: Sequence[Problem], answers: Sequence[list[int]]) -> Row:
    """How many answers equal, token by token, those of transformers on a CPU in float32."""
    import torch

    from caprese_distill.loading import load_model
    from caprese_kernels.adapters import Adapters
    from caprese_kernels.config import Method
    from caprese_serve.demo import MODEL

    from ..hugging_face.decoding import FeedForward, SparseFF, adapter_blocks, decode

    settings, model, tokenizer = variant.settings(), load_model(str(MODEL), "float32"), _tokenizer()
    ff: dict[int, FeedForward] = {}
    if variant.method and settings and variant.adapter:
        ff = adapter_blocks(Adapters.load(settings["weights"]), dtype=torch.float32)
    elif variant.method and settings:
        method = Method(variant.method, settings["density"], tuple(settings["layers"]), 0)
        ff = {i: SparseFF(method) for i in method.layers}
    expected = decode(model, tokenizer, asked, ff)
    equal = [ours == theirs for ours, theirs in zip(answers, expected, strict=True)]
    return {"problems": len(equal), "equal": sum(equal), "tokens": sum(map(len, expected))}


def _grade(variant: Variant, asked: Sequence[Problem], answers: Sequence[list[int]]) -> Row:
    """Accuracy of each task, with its standard error."""
    from caprese_serve.demo.problems import TASKS

    from ..hugging_face.decoding import score

    tokenizer = _tokenizer()
    row: Row = {"problems": len(asked), "tokens": sum(map(len, answers))}
    for task in TASKS:
        of_task = [(problem, ids) for problem, ids in zip(asked, answers, strict=True) if problem.task == task]
        graded = score(tokenizer, *zip(*of_task, strict=True))
        row |= {task: graded.accuracy, f"{task}_stderr": graded.stderr}
    return row


def _tokenizer() -> Any:
    from caprese_distill.loading import load_small_parts
    from caprese_serve.demo import MODEL

    return load_small_parts(str(MODEL))[1]


COLUMNS: Columns = {
    "variant": ("variant", str),
    "kernel": ("kernel", str),
    "problems": ("problems", str),
    "tokens": ("tokens", str),
    "answers equal": ("equal", str),
    "math": ("math", "{:.1%}".format),
    "±": ("math_stderr", "{:.1%}".format),
    "reading": ("reading", "{:.1%}".format),
    "± ": ("reading_stderr", "{:.1%}".format),
    "sparse tokens": ("sparse_tokens", str),
    "FF weights read": ("ff_weights_read", "{:.1%}".format),
}
