"""Answers prompts with the original model, offline: `python -m caprese_vllm.generate JOB.json`.

A separate process, because only its end frees the device's memory; `caprese distill --generate` starts it.
Caprese is not enabled here. The job:

    {"model": directory or Hub id, "engine": {arguments of vllm.LLM}, "sampling": {arguments of SamplingParams},
     "seed": N, "prompts": [{"row": N, "ids": [token id], "max_tokens": N}], "chunk": responses, "output": path,
     "parent": process id}

Finished responses are appended to the output, `chunk` at a time and at least every few seconds, and synced to the
disk: {"row": N, "ids": [token id], "finish": "stop" | "length"}. A row's ids end with the stop token, if one was
sampled. Each row samples from its own seed, so that other rows affect it only through rounding.

Standard output: a JSON line {"done": responses, "tokens": N} when the engine is ready and every second, with the tokens
of unfinished responses too; or {"error": {...}}, the parts of a CapreseError. All other output goes to standard error.
The process ends when its parent does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from caprese_kernels import files
from caprese_kernels.errors import CapreseError

from . import compat

FLUSH_SECONDS = 5.0
REPORT_SECONDS = 1.0
CPU_BATCH_TOKENS = 4096  # of a step, or as many as the longest prompt and response have


def main(job: str) -> int:
    """The exit code."""
    answers = _own_stdout()

    def send(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    asked = json.loads(Path(job).read_text())
    threading.Thread(target=_end_with, args=(asked["parent"],), daemon=True).start()
    try:
        run(asked, send)
    except CapreseError as error:
        send(error={part: getattr(error, part) for part in ("what", "expected", "found", "fix")})
        return 1
    return 0


def run(job: Mapping[str, Any], send: Callable[..., None]) -> None:
    """Answer the job's prompts; all of them wait in the engine, which batches as it can."""
    try:
        import vllm
        from vllm import LLM
    except ImportError as error:
        raise CapreseError(
            "vLLM", expected="an installation that can be imported", found=str(error), fix="install it again"
        ) from None
    compat.check_version(vllm.__version__)
    engine = LLM(job["model"], **_engine_arguments(job)).llm_engine
    for prompt in job["prompts"]:
        engine.add_request(str(prompt["row"]), {"prompt_token_ids": prompt["ids"]}, _params(job, prompt))
    done = tokens = 0
    send(done=done, tokens=tokens)
    ids: defaultdict[str, list[int]] = defaultdict(list)  # of unfinished responses
    pending: list[dict[str, Any]] = []
    saved = sent = time.monotonic()
    while engine.has_unfinished_requests():
        for output in engine.step():
            answer = output.outputs[0]
            ids[output.request_id] += answer.token_ids
            tokens += len(answer.token_ids)
            if output.finished:
                response = ids.pop(output.request_id)
                pending.append({"row": int(output.request_id), "ids": response, "finish": answer.finish_reason})
        now, last = time.monotonic(), not engine.has_unfinished_requests()
        if pending and (len(pending) >= job["chunk"] or now - saved > FLUSH_SECONDS or last):
            _append(Path(job["output"]), pending)
            done, saved = done + len(pending), now
            pending = []
        if now - sent > REPORT_SECONDS or last:
            send(done=done, tokens=tokens)
            sent = now


def _engine_arguments(job: Mapping[str, Any]) -> dict[str, Any]:
    """The job's, and on a CPU prompts whole: vLLM's V1 runner cannot draw by a seed after a part of a prompt there."""
    from vllm.platforms import current_platform

    given = dict(job["engine"])
    if not current_platform.is_cpu():
        return given
    whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(given["max_model_len"], CPU_BATCH_TOKENS)}
    return whole | given


def _params(job: Mapping[str, Any], prompt: Mapping[str, Any]) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        **job["sampling"],
        max_tokens=prompt["max_tokens"],
        seed=job["seed"] * 1_000_003 + prompt["row"],
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    fix = "free some space and run the same command again: it continues from the saved responses"
    with files.reporting(f"responses {path}", expected="space on the disk", fix=fix), path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def _own_stdout() -> IO[str]:
    """Standard output for messages alone; what others print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _end_with(parent: int) -> None:
    """Kill this process group once the parent is gone: nobody waits for the answers, but it holds the device."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
