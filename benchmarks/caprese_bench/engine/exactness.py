"""`caprese bench exactness`: the engine's answers on the demo model against plain Hugging Face's, and graded.

In float32 greedy tokens must equal those of transformers with the method written out (hf_decode), on a CPU, token by
token, whatever runs the engine: compiled, with CUDA graphs, on a GPU. In bfloat16 roundings differ, so there the same
engines' answers are graded: the table of `caprese demo` without a server.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from caprese_kernels.errors import CapreseError
from caprese_serve.provenance import provenance

from ..results.recording import check_writable, progress, recording
from ..results.report import Columns, Result, Row, table, terminal

if TYPE_CHECKING:
    from caprese_serve.demo.problems import Problem
    from caprese_serve.demo.run import Variant

KEYS = ["section", "variant"]
MEASURES = ["equal", "math", "reading"]
TOKENS, GRADED = "float32, token by token", "bfloat16, graded"


def exactness(
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems of each task, token by token.")] = 64,
    math: Annotated[int, typer.Option(min=1, help="Held-out word problems, graded.")] = 300,
    reading: Annotated[int, typer.Option(min=1, help="Held-out reading questions, graded.")] = 100,
    variants: Annotated[
        str, typer.Option(help="Comma-separated, of the demo's.")
    ] = "full,griffin,caprese-griffin,cats,caprese-cats",
    eager: Annotated[
        bool | None, typer.Option("--eager/--compiled", help="Default: compiled, with CUDA graphs, on a GPU alone.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="16 problems, 40 and 20 graded.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows that are in --out already.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for exactness.json, .csv and .html.")] = Path("out/bench"),
) -> None:
    """The demo model's answers through vLLM: equal to Hugging Face's in float32, and graded in bfloat16."""
    import torch

    from caprese_serve.demo.problems import problems as make
    from caprese_serve.demo.run import _chosen

    check_writable(out)
    if quick:
        problems, math, reading = min(problems, 16), min(math, 40), min(reading, 20)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    eager = device == "cpu" if eager is None else eager
    chosen = _chosen(variants.split(","))
    compared = [*make("math", "test", problems), *make("reading", "test", problems)]
    graded = [*make("math", "test", math), *make("reading", "test", reading)]
    settings = {"problems": problems, "math": math, "reading": reading, "compiled": not eager}
    result = Result("exactness", provenance() | {"settings": settings}, KEYS, MEASURES)
    console = terminal()
    with recording(result, out, (), resume, console, COLUMNS) as record, progress(console) as bar:
        line = bar.add_task("", total=2 * len(chosen))
        for section, dtype, asked in ((TOKENS, "float32", compared), (GRADED, "bfloat16", graded)):
            todo = [v for v in chosen if not record.has({"section": section, "variant": v.label})]
            bar.update(line, description=f"{section}: engines", advance=len(chosen) - len(todo))
            for variant, answers, said in _answers(todo, dtype, asked, device, eager, out):
                bar.update(line, description=f"{section}, {variant.label}")
                row = {"section": section, "variant": variant.label} | said
                record.add(row | (_compare if section == TOKENS else _grade)(variant, asked, answers))
                bar.advance(line)
    for section, rows in result.sections().items():
        console.print(table(section, rows, COLUMNS))
    compared_rows = result.sections().get(TOKENS, [])
    if wrong := [row["variant"] for row in compared_rows if row["equal"] < row["problems"]]:
        raise CapreseError(
            "exactness", expected="the tokens of Hugging Face", found=f"others in {', '.join(wrong)}", fix="report this"
        )


def _answers(
    variants: Sequence[Variant], dtype: str, asked: Sequence[Problem], device: str, eager: bool, out: Path
) -> Any:
    """(variant, its answers' token ids, what its engine's counters say); engines side by side on a GPU."""
    from caprese_serve.demo import MODEL

    from ..hugging_face.decoding import MAX_TOKENS, prompt_ids
    from .engines import running

    options = {"seed": 0, "dtype": dtype, "max_model_len": 512, "max_num_seqs": 64, "enforce_eager": eager}
    options |= {"skip_tokenizer_init": True}
    if device == "cuda":
        options |= {"kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.1}
    tokenizer = _tokenizer()
    prompts = [prompt_ids(tokenizer, problem) for problem in asked]
    # On NVIDIA Triton multiplies float32 with 10 bits of mantissa else, also in attention.
    exact = {"TRITON_F32_DEFAULT": "ieee"} if dtype == "float32" else {}
    job = {"model": str(MODEL), "engine": options, "variables": exact}
    batches = [variants] if device == "cuda" else [[variant] for variant in variants]
    for batch in batches:
        jobs = {v.id: job | {"caprese": v.settings()} for v in batch}
        with running(jobs, device, 1.0, out, terminal()) as engines:
            for variant in batch:
                engine = engines[variant.id]
                ids = engine.ask("answer", prompts=prompts, max_tokens=MAX_TOKENS, stop=tokenizer.eos_token_id)["ids"]
                yield variant, ids, _counted(variant, ids, engine.ask("report")["caprese"])


def _counted(variant: Variant, ids: Sequence[Sequence[int]], said: dict[str, Any] | None) -> Row:
    """The engine's counters; CapreseError unless they cover the answers' tokens."""
    if variant.method is None and said is None:
        return {"kernel": "plain vLLM"}
    expected = sum(max(len(answer) - 1, 0) for answer in ids)  # the first of an answer comes from its prompt
    if said is None or variant.method is None or said["generated_tokens"] < expected:
        raise CapreseError(
            f"variant {variant.id}",
            expected=f"{expected} tokens generated by sparse FF blocks" if variant.method else "plain vLLM",
            found=str(said),
            fix="report this bug",
        )
    return {key: said[key] for key in ("kernel", "ff_weights_read")} | {"sparse_tokens": said["generated_tokens"]}


def _compare(variant: Variant, asked: Sequence[Problem], answers: Sequence[list[int]]) -> Row:
    """How many answers are those of transformers on a CPU in float32, to the token."""
    from caprese_distill.loading import load_model
    from caprese_kernels.adapters import Adapters
    from caprese_kernels.config import Method
    from caprese_serve.demo import MODEL

    from ..hugging_face.decoding import SparseFF, decode

    settings, model, tokenizer = variant.settings(), load_model(str(MODEL), "float32"), _tokenizer()
    ff = {}
    if variant.method and settings:
        adapters = Adapters.load(settings["weights"]) if variant.adapter else None
        config = adapters.config if adapters else None
        density, layers = (config.density, config.layers) if config else (settings["density"], settings["layers"])
        method = Method(variant.method, density, tuple(layers), config.rank if config else 0)
        pairs = {i: (adapters.left[i].float(), adapters.right[i].float()) if adapters else () for i in layers}
        ff = {i: SparseFF(method, *pair) for i, pair in pairs.items()}
    expected = decode(model, tokenizer, asked, ff)
    same = [ours == theirs for ours, theirs in zip(answers, expected, strict=True)]
    return {"problems": len(same), "equal": sum(same), "tokens": sum(map(len, expected))}


def _grade(variant: Variant, asked: Sequence[Problem], answers: Sequence[list[int]]) -> Row:
    """Accuracy of each task with its standard error."""
    from caprese_serve.demo.problems import TASKS

    from ..hugging_face.decoding import score

    tokenizer = _tokenizer()
    row: Row = {"problems": len(asked), "tokens": sum(map(len, answers))}
    for task in TASKS:
        mine = [(problem, ids) for problem, ids in zip(asked, answers, strict=True) if problem.task == task]
        graded = score(tokenizer, *zip(*mine, strict=True))
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
