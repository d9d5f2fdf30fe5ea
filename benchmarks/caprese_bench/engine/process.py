"""An engine in a process of its own, asked in turn with others: one JSON line in, one JSON line out.

    python -m caprese_bench.engine.process   < {"model": DIR, "caprese": {...} or null, "engine": {...}}, then jobs

Jobs are the functions below with their arguments: {"do": "generate", "prompts": [[token id]], "max_tokens": N, ...}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from caprese_kernels.errors import CapreseError
from caprese_serve import guard

Answer = dict[str, Any]


class Engine:
    """The parent's end. The process starts at once; `ready` waits for it, so that several may start side by side."""

    def __init__(self, log: Path, variables: Mapping[str, str] = MappingProxyType({}), **given: Any):
        """Output goes to `log`; `variables` are added to the environment."""
        environment = {**os.environ, **variables, "VLLM_NO_USAGE_STATS": "1"}
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # `report` and `union` send functions to workers
        self.log, self.is_ready = log, False
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-I", guard.__file__, str(os.getpid()), sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                cwd=log.parent,  # which `-m` puts first on the path: nothing there hides a package
                text=True,
            )
        self._say(given)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ready(self) -> None:
        """Wait until the engine has started."""
        if not self.is_ready:
            self._hear()
            self.is_ready = True

    def ask(self, do: str = "generate", **job: Any) -> Answer:
        self.ready()
        self._say({"do": do} | job)
        return self._hear()

    def close(self) -> None:
        """End the process and all that it started, which would keep a GPU's memory."""
        self.process.terminate()
        self.process.wait()

    def _say(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._ended()

    def _hear(self) -> Answer:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self._ended()
        return dict(json.loads(line))

    def _ended(self) -> None:
        reason = next((line for line in reversed(self.log.read_text().splitlines()) if line.strip()), "no output")
        raise CapreseError("the engine", expected="an answer", found=f"its end: {reason}", fix=f"read {self.log}")


def first_token(answer: Answer) -> list[float]:
    """Seconds from the arrival of all requests to each one's first token."""
    return [times[0] for times in answer["times"]]


def next_token(answer: Answer) -> list[float]:
    """Mean seconds from one token of a request to its next, for each request."""
    return [(times[-1] - times[0]) / max(answer["max_tokens"] - 1, 1) for times in answer["times"]]


def main() -> None:
    answers = _own_stdout()
    given = json.loads(sys.stdin.readline())
    from vllm import LLM

    options = given["engine"]
    if given["caprese"] is not None:
        options["additional_config"] = {"caprese": given["caprese"]}
    llm = LLM(given["model"], **options)
    _answer(answers, {"ready": True})
    for line in sys.stdin:
        job = json.loads(line)
        _answer(answers, JOBS[job.pop("do")](llm, **job))


def generate(llm: Any, prompts: list[list[int]], max_tokens: int, n: int = 1, reset: bool = False) -> Answer:
    """Answer all prompts, which arrive at once, n samples each; `reset` empties the prefix cache first.

    {"times": seconds since the arrival of every step that brought a request tokens, "cached": its cached prompt tokens}
    """
    if reset and not llm.reset_prefix_cache():
        raise CapreseError("the prefix cache", expected="it to be empty", found="blocks in use", fix="report this bug")
    engine, begin = llm.llm_engine, time.perf_counter()
    _add(engine, prompts, max_tokens, n)
    times: dict[str, list[float]] = {}
    cached: dict[str, int] = {}
    while engine.has_unfinished_requests():
        outputs, now = engine.step(), time.perf_counter() - begin
        for request in dict.fromkeys(output.request_id for output in outputs):  # samples come as outputs of their own
            times.setdefault(request, []).append(now)
        cached |= {output.request_id: output.num_cached_tokens or 0 for output in outputs}
    order = [str(i) for i in range(len(prompts))]
    return {"times": [times[i] for i in order], "cached": [cached[i] for i in order], "max_tokens": max_tokens}


def answer(llm: Any, prompts: list[list[int]], max_tokens: int, stop: int) -> Answer:
    """{"ids": the greedy answers' tokens, without the token `stop` that ended them}; all prompts arrive at once."""
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
    """{"caprese": what GET /caprese says, or null where no FF block is replaced}, from the worker itself."""
    return {"caprese": llm.collective_rpc(_report)[0]}


def union(llm: Any, prompts: list[list[int]], max_tokens: int, n: int = 1) -> Answer:
    """{"union": mean share over layers of neurons that some of these requests keeps, null but for GRIFFIN}.

    `max_tokens` must outlast the steps that the prompts take: the first request still runs when the last begins.
    """
    engine = llm.llm_engine
    _add(engine, prompts, max_tokens, n)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        # Every request has made its selection and still holds it.
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
    return float(state.table[:, state.requests.slots_in_use].any(dim=1).float().mean())


def _state(worker: Any) -> Any:
    from caprese_vllm.state import state_of

    return state_of(worker.vllm_config)


def _own_stdout() -> IO[str]:
    """Standard output for answers alone; what others print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _answer(file: IO[str], value: Answer) -> None:
    file.write(json.dumps(value) + "\n")
    file.flush()


def on_one_stack_chunk(run: Callable[[], None]) -> None:
    """Run it in a frame so large that CPython maps half a MiB for it and for the frames that it calls.

    They lie in chunks of 16 KiB else, each mapped when a call crosses into it and unmapped when it returns. Where a
    decode step's hot calls lie at such an edge, by accident of their depth, its pages are mapped anew at every call:
    8,000 page faults in 33 tokens, and 53 instead of 45 ms a token (Qwen 2.5 0.5B's shape, two cores of a Xeon).
    """

    def frame() -> None:
        run()

    words = 40_000  # of 8 bytes: a chunk's size is a power of two, and 200 KiB of it are left
    frame.__code__ = frame.__code__.replace(co_stacksize=words)
    frame()


if __name__ == "__main__":
    on_one_stack_chunk(main)
