"""A vLLM engine in a process of its own, so that several can be timed in turn: one JSON line in, one JSON line out.

    python -m caprese_bench.engine.process   < {"model": DIR, "caprese": {...} or null, "options": {...}}, then jobs

A job names a function of JOBS and its arguments: {"do": "generate", "prompts": [[token id]], "max_tokens": N, ...}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from caprese_kernels.errors import CapreseError
from caprese_serve import guard

Answer = dict[str, Any]


@dataclass(frozen=True)
class EngineSettings:
    """What an engine runs: a model, Caprese's configuration or None for plain vLLM, and vLLM's own options."""

    model: str  # directory or Hub id
    caprese: Mapping[str, Any] | None
    options: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)  # variables added to this process's


class Engine:
    """The parent's end. The process starts at once; `wait_until_ready` waits, so that several can start together."""

    def __init__(self, log: Path, settings: EngineSettings):
        """The process's output goes to `log`."""
        environment = {**os.environ, **settings.environment, "VLLM_NO_USAGE_STATS": "1"}
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # `report` and `union` send functions to workers
        self.log, self.is_ready = log, False
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-I", guard.__file__, str(os.getpid()), sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                cwd=log.parent,  # `-m` puts it first on the path, and no file there hides a package
                text=True,
            )
        self._send({"model": settings.model, "caprese": settings.caprese, "options": settings.options})

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.terminate()

    def wait_until_ready(self) -> None:
        """Wait until the engine has started. Raises CapreseError, as `run` does, if its process has ended."""
        if not self.is_ready:
            self._receive()
            self.is_ready = True

    def run(self, job: str = "generate", **arguments: Any) -> Answer:
        """The answer of one of JOBS. Raises CapreseError with the log's last line if the process has ended."""
        self.wait_until_ready()
        self._send({"do": job} | arguments)
        return self._receive()

    def terminate(self) -> None:
        """End the process and all that it started, which would keep a GPU's memory."""
        self.process.terminate()
        self.process.wait()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._raise_ended()

    def _receive(self) -> Answer:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self._raise_ended()
        return dict(json.loads(line))

    def _raise_ended(self) -> None:
        reason = next((line for line in reversed(self.log.read_text().splitlines()) if line.strip()), "no output")
        raise CapreseError(
            "the engine's process", expected="an answer", found=f"it ended: {reason}", fix=f"read {self.log}"
        )


def first_token(answer: Answer) -> list[float]:
    """Seconds from the arrival of all requests to the first token of each."""
    return [times[0] for times in answer["times"]]


def next_token(answer: Answer) -> list[float]:
    """Mean seconds from one token to the next, for each request."""
    return [(times[-1] - times[0]) / max(answer["max_tokens"] - 1, 1) for times in answer["times"]]


def main() -> None:
    """The process: start the engine, then run the jobs that arrive on stdin."""
    answers = _redirect_stdout()
    settings = json.loads(sys.stdin.readline())
    from vllm import LLM

    options = settings["options"]
    if settings["caprese"] is not None:
        options["additional_config"] = {"caprese": settings["caprese"]}
    llm = LLM(settings["model"], **options)
    _answer(answers, {"ready": True})
    for line in sys.stdin:
        job = json.loads(line)
        _answer(answers, JOBS[job.pop("do")](llm, **job))


def generate(llm: Any, prompts: list[list[int]], max_tokens: int, n: int = 1, reset: bool = False) -> Answer:
    """Answer all prompts, which arrive at once, with n samples each; `reset` empties the prefix cache first.

    {"times": for each request the seconds from its arrival to every step that generated tokens of it,
     "cached": for each request its cached prompt tokens, "max_tokens": as given}
    """
    if reset and not llm.reset_prefix_cache():
        raise CapreseError("the prefix cache", expected="no blocks in use", found="some", fix="report this bug")
    engine, begin = llm.llm_engine, time.perf_counter()
    _add(engine, prompts, max_tokens, n)
    times: dict[str, list[float]] = {}
    cached: dict[str, int] = {}
    while engine.has_unfinished_requests():
        outputs, now = engine.step(), time.perf_counter() - begin
        for request in dict.fromkeys(output.request_id for output in outputs):  # each sample is an output of its own
            times.setdefault(request, []).append(now)
        cached |= {output.request_id: output.num_cached_tokens or 0 for output in outputs}
    order = [str(i) for i in range(len(prompts))]
    return {"times": [times[i] for i in order], "cached": [cached[i] for i in order], "max_tokens": max_tokens}


def answer(llm: Any, prompts: list[list[int]], max_tokens: int, stop: int) -> Answer:
    """{"ids": tokens of the greedy answers, without the token `stop` that ends them}; all prompts arrive at once."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        stop_token_ids=[stop],
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    engine = llm.llm_engine
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    found: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        found |= {output.request_id: list(output.outputs[0].token_ids) for output in engine.step()}
    answers = [found[str(i)] for i in range(len(prompts))]
    return {"ids": [ids[:-1] if ids[-1:] == [stop] else ids for ids in answers]}


def report(llm: Any) -> Answer:
    """{"caprese": what GET /caprese reports, or null if no FF block is replaced}, from the worker itself."""
    return {"caprese": llm.collective_rpc(_report)[0]}


def union(llm: Any, prompts: list[list[int]], max_tokens: int, n: int = 1) -> Answer:
    """{"union": share of neurons that at least one of these requests keeps, mean over layers; null except for GRIFFIN}.

    `max_tokens` must be larger than the number of steps that the prompts take, so that the first request is still
    running when the last one begins to generate.
    """
    engine = llm.llm_engine
    _add(engine, prompts, max_tokens, n)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        # By now every request has selected its neurons and still holds them.
        if len({output.request_id for output in outputs}) == len(prompts):
            break
    share = llm.collective_rpc(_union)[0]
    engine.abort_request([str(i) for i in range(len(prompts))])
    while engine.has_unfinished_requests():
        engine.step()
    return {"union": share}


JOBS: dict[str, Callable[..., Answer]] = {"generate": generate, "answer": answer, "report": report, "union": union}


def _add(engine: Any, prompts: list[list[int]], max_tokens: int, n: int) -> None:
    from vllm import SamplingParams

    params = SamplingParams(
        n=n, temperature=1.0 if n > 1 else 0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
    )
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)


def _report(worker: Any) -> Answer | None:
    from caprese_vllm.state import merge

    state = _state(worker)
    return merge([state.report()]) if state else None


def _union(worker: Any) -> float | None:
    state = _state(worker)
    if state is None or state.method.name != "griffin":
        return None
    tails = state.table[:, state.requests.slots_in_use].any(dim=1).sum(dim=1).tolist()  # without the core's neurons
    cores = [0 if block.core is None else block.core.num_neurons for block in state.blocks]
    shares = [(tail + core) / block.num_neurons for tail, core, block in zip(tails, cores, state.blocks, strict=True)]
    return sum(shares) / len(shares)


def _state(worker: Any) -> Any:
    from caprese_vllm.state import state_of

    return state_of(worker.vllm_config)


def _redirect_stdout() -> IO[str]:
    """The process's stdout, for answers only; anything else that is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _answer(file: IO[str], value: Answer) -> None:
    file.write(json.dumps(value) + "\n")
    file.flush()


def on_one_stack_chunk(run: Callable[[], None]) -> None:
    """Run it in a frame so large that CPython maps half a MiB for it and for the frames of its calls.

    Otherwise CPython keeps frames in chunks of 16 KiB, each mapped when a call crosses into it and unmapped when the
    call returns. If the depth of a decode step's hot calls happens to be at such an edge, their pages are mapped again
    at every call: 8,000 page faults in 33 tokens, and 53 instead of 45 ms a token (Qwen 2.5 0.5B's shape, two cores of
    a Xeon).
    """

    def frame() -> None:
        run()

    words = 40_000  # of 8 bytes: a chunk's size is a power of two, so 200 KiB remain for the calls
    frame.__code__ = frame.__code__.replace(co_stacksize=words)
    frame()


if __name__ == "__main__":
    on_one_stack_chunk(main)
