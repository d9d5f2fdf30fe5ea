"""An engine in a process of its own, asked in turn with others: one JSON line in, one JSON line out.

    python -m benchmarks.engine_process   < {"model": DIR, "caprese": {...} or null, "engine": {...}}, then jobs

A job is {"prompts": [[token id]], "max_tokens": N, "n": N, "reset": bool}; its answer {"ttft": [s], "tpot": [s],
"cached": [tokens]}, for each prompt. All prompts arrive at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from caprese_kernels.errors import CapreseError

ROOT = Path(__file__).parents[1]


class Engine:
    """The parent's end."""

    def __init__(self, log: Path, **job: Any):
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ  # GiB; several engines share a machine
        environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.engine_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                cwd=ROOT,
                text=True,
            )
        self.ask(**job)

    def ask(self, **job: Any) -> dict[str, Any]:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(job) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise CapreseError("the engine", expected="an answer", found="its end", fix=f"read {self.log}")
        return dict(json.loads(line))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


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
        _answer(answers, _run(llm, json.loads(line)))


def _run(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    if job.get("reset"):
        assert llm.reset_prefix_cache()
    n = job.get("n", 1)
    params = SamplingParams(n=n, temperature=1.0 if n > 1 else 0.0, max_tokens=job["max_tokens"], ignore_eos=True)
    begin = time.perf_counter()
    for i, prompt in enumerate(job["prompts"]):
        llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    times: dict[str, list[float]] = {}  # of every output that brought tokens
    cached: dict[str, int] = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            times.setdefault(output.request_id, []).append(time.perf_counter() - begin)
            cached[output.request_id] = output.num_cached_tokens or 0
    order = [str(i) for i in range(len(job["prompts"]))]
    return {
        "ttft": [times[i][0] for i in order],
        "tpot": [(times[i][-1] - times[i][0]) / max(job["max_tokens"] - 1, 1) for i in order],
        "cached": [cached[i] for i in order],
    }


def _own_stdout() -> IO[str]:
    """Standard output for answers alone; what others print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _answer(file: IO[str], value: dict[str, Any]) -> None:
    file.write(json.dumps(value) + "\n")
    file.flush()


if __name__ == "__main__":
    main()
