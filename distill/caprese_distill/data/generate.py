"""Responses of the original model itself (`--generate`), made by vLLM in a child process, caprese_vllm.generate.

They are collected in `.NAME.responses.jsonl` beside the adapter NAME.safetensors; a killed run continues from there.
Once the adapter is written they become NAME.responses.jsonl, rows of prompt and response that `--data` can read.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from caprese_kernels import files
from caprese_kernels.errors import CapreseError

from ..loading import max_sample_tokens
from ..progress import progress_bar
from .bad_rows import BadRow, BadRows
from .chat import ChatRenderer
from .responses import Response, cache_path, child_files, model_identity, read, responses_path, resume, writing
from .rows import Row
from .samples import Sample

CHUNK = 64  # responses written at a time: the most that a kill loses
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Generation:
    """Settings of generation. dtype: a name, or "auto" for the checkpoint's; engine: further arguments of vllm.LLM."""

    max_length: int = 2048
    temperature: float | None = None  # None: the model's own, see sampling_parameters
    max_new_tokens: int | None = None  # None: limited by --max-length alone
    seed: int = 0
    dtype: str = "auto"
    engine: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    line: int
    ids: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Generated:
    """Samples of the ids that were generated, and their provenance for the adapter file."""

    samples: list[Sample]
    skipped: Counter[str]
    provenance: dict[str, Any]
    rows: Sequence[Row]
    responses: Mapping[int, Response]
    output: Path
    tokenizer: Any

    def keep(self) -> Path:
        """Once the adapter is written: write the responses as rows for `--data`, and remove the cache."""
        path = responses_path(self.output)
        with (
            files.reporting(
                f"responses {path}",
                expected="room for them beside the adapter, which is written",
                fix=f"free some space; their token ids are in {cache_path(self.output)}",
            ),
            files.staged(path) as new,
            new.open("w", encoding="utf-8") as file,
        ):
            file.writelines(self._lines())
        for rest in (cache_path(self.output), *child_files(self.output)):
            rest.unlink(missing_ok=True)
        return path

    def _lines(self) -> Iterator[str]:
        for row in self.rows:
            if response := self.responses.get(row.line):
                ids = response.ids.tolist() if response.cut else response.ids[:-1].tolist()
                text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
                yield json.dumps({"prompt": row.prompt, "response": text, **row.options}, ensure_ascii=False) + "\n"


def generate_samples(
    rows: Sequence[Row],
    renderer: ChatRenderer,
    model: str,
    config: Any,
    output: Path,
    settings: Generation,
    bad_rows: BadRows | None = None,
    console: Console | None = None,
) -> Generated:
    """Let the model answer the prompts of `rows`; responses that a killed run left beside `output` are reused.

    Prompt and response together have at most `settings.max_length` tokens, and no more than the model has positions.
    Samples have the sampled ids, because encoding the text again does not always give the same ones. A response that
    reaches its limit is kept. Rows that the template does not render are added to `bad_rows` and left out; without it,
    CapreseError for the first.

    CapreseError when vLLM is missing or fails (with its error), and for responses of another run.
    """
    text_config = config.get_text_config()
    max_length = max_sample_tokens(config, settings.max_length)
    skipped: Counter[str] = Counter()
    prompts = []
    with progress_bar(console, "prompts/s") as bar:
        for row in bar.track(rows, description="prompts"):
            try:
                ids = renderer.prompt_ids(row)
            except BadRow as bad:
                if bad_rows is None:
                    raise bad.at(f"data, line {row.line}") from None
                bad_rows.add(row.line, bad)
                continue
            room = min(settings.max_new_tokens or max_length, max_length - len(ids))
            if not ids:
                skipped["empty prompt"] += 1
            elif room < 2:  # a token that is fed, and the last, which is not
                skipped[f"prompt too long for a response within {max_length} tokens"] += 1
            else:
                prompts.append(Prompt(row.line, ids, room))
    sampling = sampling_parameters(model, settings.temperature)
    dtype = settings.dtype
    if dtype == "auto" and text_config.dtype is not None:  # vLLM's own "auto" loads float32 models in 16 bits
        dtype = str(text_config.dtype).removeprefix("torch.")
    identity = {
        "model": model_identity(model, config),
        "prompts": hashlib.sha256(json.dumps([vars(p) for p in prompts]).encode()).hexdigest(),
        "sampling": sampling,
        "dtype": dtype,
        "seed": settings.seed,
    } | ({"date": str(datetime.date.today())} if renderer.prints_date else {})
    responses = resume(cache_path(output), identity, len(prompts), console)
    missing = [p for p in prompts if p.line not in responses]
    if missing:
        job = {
            "model": model,
            "engine": {"dtype": dtype, "max_model_len": max(len(p.ids) + p.max_tokens for p in prompts)}
            | dict(settings.engine),
            "sampling": sampling,
            "seed": settings.seed,
            "prompts": [{"row": p.line, "ids": p.ids, "max_tokens": p.max_tokens} for p in missing],
            "chunk": CHUNK,
            "output": str(cache_path(output).absolute()),
            "parent": os.getpid(),
        }
        _run(job, output, len(prompts), console)
        responses = read(cache_path(output))[1]
    samples = []
    for prompt in prompts:
        if prompt.line not in responses:
            raise _failed(output, f"no response to line {prompt.line}")
        sample = Sample.of(prompt.ids, responses[prompt.line].ids, prompt.line)
        if sample.num_rows:
            samples.append(sample)
        else:
            skipped["empty response"] += 1
    provenance = {
        "sampling": sampling,
        "seed": settings.seed,
        "responses": len(responses),
        "cut": sum(r.cut for r in responses.values()),
        "tokens": sum(len(r.ids) for r in responses.values()),
    }
    return Generated(samples, skipped, provenance, rows, responses, output, renderer.tokenizer)


def sampling_parameters(model: str, temperature: float | None) -> dict[str, float]:
    """Arguments of SamplingParams: the model's generation_config, as `vllm serve` applies it, or greedy without one.

    A given `temperature` replaces the model's; at 0, top_p, top_k and min_p have no effect and are left out.
    """
    from transformers import GenerationConfig

    try:
        own = GenerationConfig.from_pretrained(model)
    except OSError:  # the model has none
        own = GenerationConfig()
    found = {name: value for name in _SAMPLING if (value := getattr(own, name, None)) is not None}
    draws = own.do_sample or found.keys() & {"top_p", "top_k", "min_p"}
    found["temperature"] = temperature if temperature is not None else found.get("temperature", 1.0 if draws else 0.0)
    if found["temperature"] == 0:
        return {name: found[name] for name in ("temperature", "repetition_penalty") if name in found}
    return found


def _run(job: Mapping[str, Any], output: Path, total: int, console: Console | None) -> None:
    """Run the child process to its end."""
    if importlib.util.find_spec("vllm") is None:
        raise CapreseError(
            "--generate",
            expected="vLLM, which answers the prompts",
            found="none",
            fix='pip install "caprese-vllm[cuda]" (or [cpu]), or give data with responses',
        )
    job_file, log = child_files(output)
    with writing(job_file):
        job_file.write_text(json.dumps(job))
    # Engine and driver in one process, so that killing it ends the engine too.
    environment = {"VLLM_NO_USAGE_STATS": "1"} | os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with log.open("w") as errors, progress_bar(console, "responses/s") as bar:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "caprese_vllm.generate", str(job_file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,  # Ctrl-C goes to this process alone, which ends the child below
            text=True,
        )
        first = total - len(job["prompts"])
        line = bar.add_task("starting vLLM", total=total, completed=first, first=first, start=False)
        started = 0.0  # when the engine was ready
        try:
            assert process.stdout is not None
            for message in map(json.loads, process.stdout):
                if "error" in message:
                    parts = message["error"]
                    raise CapreseError(parts.pop("what"), **parts)
                bar.start_task(line)
                bar.update(line, completed=first + message["done"], description=_pace(message["tokens"], started))
                started = started or time.monotonic()
            code = process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code:
        raise _failed(output, f"exit code {code}: {_last_error(log)}")


def _pace(tokens: int, started: float) -> str:
    """How many tokens were sampled, and how fast, since the time `started` (0: just now)."""
    seconds = time.monotonic() - started if started else 0.0
    return f"responses ({tokens:,} tokens" + (f", {tokens / seconds:,.0f} tok/s)" if tokens and seconds else ")")


def _failed(output: Path, found: str) -> CapreseError:
    made, log = len(read(cache_path(output))[1]), child_files(output)[1]
    fix = f"see {log}; the same command continues from the {made} responses made so far"
    return CapreseError("vLLM, answering prompts", expected="a response to each", found=found, fix=fix)


def _last_error(log: Path) -> str:
    """The error that ended the process, or else the last lines of its log."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return (errors[-1] if errors else " | ".join(lines[-3:]) or "no output")[:500]
