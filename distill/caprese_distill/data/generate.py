"""Responses of the original model itself (`--generate`), made by vLLM in a child process, caprese_vllm.generate.

They gather in `.NAME.responses.jsonl` beside the adapter NAME.safetensors; a run that is killed goes on from there.
Once the adapter is written they become NAME.responses.jsonl, rows of prompt and response that `--data` can read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from caprese_kernels.errors import CapreseError

from ..loading import longest
from ..progress import progress_bar
from .samples import Row, Sample, prompt_ids

CHUNK = 64  # responses that a kill may lose
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Generation:
    """How the model answers. dtype: a name, or "auto" for the checkpoint's; engine: further arguments of vllm.LLM."""

    temperature: float | None = None  # None: the model's own settings, see sampling_of
    max_new_tokens: int | None = None  # None: as many as --max-length leaves
    seed: int = 0
    dtype: str = "auto"
    engine: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    line: int
    ids: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Response:
    """All ids sampled. The last is the stop token, unless the response was cut at max_tokens."""

    ids: array[int]  # 4 bytes each; a list would have 36, over a gigabyte for 20,000 long responses
    cut: bool


@dataclass(frozen=True)
class Generated:
    """Samples made of the very ids that were generated, and what an adapter's provenance says of them."""

    samples: list[Sample]
    skipped: Counter[str]
    provenance: dict[str, Any]
    rows: Sequence[Row]
    responses: Mapping[int, Response]
    output: Path
    tokenizer: Any

    def keep(self) -> Path:
        """Once the adapter is there: the responses as rows for `--data`, written whole; the cache goes."""
        path = responses_path(self.output)
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(self._lines())
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise CapreseError(
                f"responses {path}",
                expected="room for them beside the adapter, which is written",
                found=error.strerror or type(error).__name__,
                fix=f"free some space; their token ids are in {cache_path(self.output)}",
            ) from None
        for rest in (cache_path(self.output), *_own_files(self.output)):
            rest.unlink(missing_ok=True)
        return path

    def _lines(self) -> Iterator[str]:
        for row in self.rows:
            if response := self.responses.get(row.line):
                ids = response.ids.tolist() if response.cut else response.ids[:-1].tolist()
                text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
                yield json.dumps({"prompt": row.prompt, "response": text}, ensure_ascii=False) + "\n"


def responses_path(output: Path) -> Path:
    """The rows that stay beside the adapter `output`."""
    return output.with_name(f"{output.stem}.responses.jsonl")


def cache_path(output: Path) -> Path:
    """What a killed run goes on from."""
    return output.with_name(f".{output.stem}.responses.jsonl")


def _own_files(output: Path) -> tuple[Path, Path]:
    """The child's job and log."""
    return output.with_name(f".{output.stem}.generate.json"), output.with_name(f".{output.stem}.generate.log")


def generate_samples(
    rows: Sequence[Row],
    tokenizer: Any,
    model: str,
    config: Any,
    output: Path,
    settings: Generation,
    max_length: int,
    console: Console | None = None,
) -> Generated:
    """Let the model answer the prompts of `rows`; what a killed run left beside `output` is not made again.

    Prompt and response together have at most `max_length` tokens, nor more than the model has positions. The ids
    are those sampled: text would not always give the same ones. A response that reaches its limit is kept as it is.

    Raises CapreseError when vLLM is missing or fails, with its last words, and for responses of another run.
    """
    text_config = config.get_text_config()
    max_length = longest(config, max_length)
    skipped: Counter[str] = Counter()
    prompts = []
    with progress_bar(console, "prompts/s") as bar:
        for row in bar.track(rows, description="prompts"):
            ids = prompt_ids(tokenizer, row)
            room = min(settings.max_new_tokens or max_length, max_length - len(ids))
            if not ids:
                skipped["empty prompt"] += 1
            elif room < 2:  # one token that is fed, and the last
                skipped[f"prompt too long for a response within {max_length} tokens"] += 1
            else:
                prompts.append(Prompt(row.line, ids, room))
    sampling = sampling_of(model, settings.temperature)
    dtype = settings.dtype
    if dtype == "auto" and text_config.dtype is not None:  # vLLM's own auto makes float32 models half as wide
        dtype = str(text_config.dtype).removeprefix("torch.")
    identity = {
        "model": model_identity(model, config),
        "prompts": hashlib.sha256(json.dumps([vars(p) for p in prompts]).encode()).hexdigest(),
        "sampling": sampling,
        "dtype": dtype,
        "seed": settings.seed,
    }
    responses = _resume(cache_path(output), identity, len(prompts), console)
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
        responses = _read(cache_path(output))[1]
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
    return Generated(samples, skipped, provenance, rows, responses, output, tokenizer)


def sampling_of(model: str, temperature: float | None) -> dict[str, float]:
    """Arguments of SamplingParams: the model's generation_config, as `vllm serve` applies it, or greedy without one.

    A `temperature` that is given replaces the model's; at 0 the limits on what is drawn mean nothing and are left out.
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


def model_identity(model: str, config: Any) -> str:
    """Tells models apart: the Hub's commit, or the size and both ends of each file of weights of a directory."""
    directory = Path(model)
    if not directory.is_dir():
        return f"{model}@{getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.iterdir() if p.suffix in (".safetensors", ".bin")):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(2**20)
            file.seek(max(0, size - 2**20))
            digest.update(f"{path.name} {size} ".encode() + head + file.read())
    return digest.hexdigest()


def _read(cache: Path) -> tuple[dict[str, Any], dict[int, Response], int]:
    """Identity, responses by line, and how many bytes are whole lines: a kill may leave half of the last one."""
    identity: dict[str, Any] = {}
    responses: dict[int, Response] = {}
    whole = 0
    if not cache.exists():
        return identity, responses, whole
    with cache.open("rb") as file:
        for line in file:
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                value = None
            if value is None:
                break
            if whole == 0:
                identity = value
            else:
                responses[value["row"]] = Response(array("i", value["ids"]), value["finish"] != "stop")
            whole += len(line)
    return identity, responses, whole


def _resume(cache: Path, identity: Mapping[str, Any], total: int, console: Console | None) -> dict[int, Response]:
    """The responses that are there; the cache is left ready for more to be appended.

    Those of another run are refused rather than thrown away: they may have taken hours.
    """
    found, responses, whole = _read(cache)
    if not responses:
        partial = cache.with_name(f"{cache.name}.partial")
        with _room_for(cache):
            partial.write_text(json.dumps(identity) + "\n")
            os.replace(partial, cache)
        return {}
    other = [key for key, value in identity.items() if found.get(key) != value]
    if other:
        raise CapreseError(
            f"{len(responses)} responses in {cache}",
            expected="those of this run",
            found=f"those of a run with other {', '.join(other)}",
            fix="give the settings of that run or another --output, or delete the file",
        )
    os.truncate(cache, whole)
    if console:
        console.print(f"{cache}: {len(responses)} of {total} responses are there already")
    return responses


def _run(job: Mapping[str, Any], output: Path, total: int, console: Console | None) -> None:
    """The child process, from beginning to end."""
    if importlib.util.find_spec("vllm") is None:
        raise CapreseError(
            "--generate",
            expected="vLLM, which answers the prompts",
            found="none",
            fix='pip install "caprese-vllm[cuda]" (or [cpu]), or give data with responses',
        )
    job_file, log = _own_files(output)
    with _room_for(job_file):
        job_file.write_text(json.dumps(job))
    # One process for engine and driver: nothing outlives it but what vLLM itself ends with it.
    environment = {"VLLM_NO_USAGE_STATS": "1"} | os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with log.open("w") as errors, progress_bar(console, "responses/s") as bar:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "caprese_vllm.generate", str(job_file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,  # Ctrl-C is for this process, which ends the child below
            text=True,
        )
        first = total - len(job["prompts"])
        line = bar.add_task("starting vLLM", total=total, completed=first, first=first, start=False)
        try:
            assert process.stdout is not None
            for message in map(json.loads, process.stdout):
                if "error" in message:
                    parts = message["error"]
                    raise CapreseError(parts.pop("what"), **parts)
                bar.start_task(line)
                tokens = f"responses ({message['tokens']:,} tokens)"
                bar.update(line, completed=first + message["done"], description=tokens)
            code = process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code:
        raise _failed(output, f"exit code {code}: {_last_words(log)}")


@contextmanager
def _room_for(path: Path) -> Iterator[None]:
    """A disk that refuses `path` is a user's error."""
    try:
        yield
    except OSError as error:
        raise CapreseError(
            f"responses, {path}",
            expected="room for them beside the output",
            found=error.strerror or type(error).__name__,
            fix="free some space, or give another --output",
        ) from None


def _failed(output: Path, found: str) -> CapreseError:
    there, log = len(_read(cache_path(output))[1]), _own_files(output)[1]
    fix = f"see {log}; the same command goes on from the {there} responses that are there"
    return CapreseError("vLLM, answering prompts", expected="a response to each", found=found, fix=fix)


def _last_words(log: Path) -> str:
    """The error that ended the process, or else its last lines."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return (told[-1] if told else " | ".join(lines[-3:]) or "no output")[:500]
