"""`vllm serve` with Caprese whose engine or worker is killed: clients get an error, and nothing is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from caprese_serve.demo import ADAPTERS, MODEL
from caprese_serve.server import vllm_program

ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "OMP_NUM_THREADS": "1",
}
FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--served-model-name", "demo")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def of_session(session: int) -> list[psutil.Process]:
    """The living processes of a session: all that its leader started, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def process_of(server: int, name: str) -> psutil.Process:
    """The engine, by its title; the worker as the engine's child, whose title is not to be relied on."""
    (engine,) = [each for each in of_session(server) if "EngineCore" in " ".join(each.cmdline())]
    if name == "engine":
        return engine
    (worker,) = [each for each in engine.children() if "resource_tracker" not in " ".join(each.cmdline())]
    return worker


@pytest.mark.parametrize("name", ["engine", "worker"])
def test_a_killed_process_ends_the_server(tmp_path: Path, name: str) -> None:
    port, log = free_port(), tmp_path / "log"
    command = [vllm_program(), "serve", str(MODEL), "--host", "127.0.0.1", "--port", str(port), *FLAGS]
    command += ["--caprese-weights", str(ADAPTERS["griffin"])]
    env = {**os.environ, **ENV}
    url, outcome = f"http://127.0.0.1:{port}", list[object]()
    client = httpx.Client(base_url=url, trust_env=False, timeout=90)

    def ask() -> None:
        request = {"model": "demo", "prompt": "Alex has 15 cookies.", "max_tokens": 480, "ignore_eos": True}
        try:
            while (response := client.post("/v1/completions", json=request)).status_code == 200:
                outcome.append("answered")
            outcome.append(response.status_code)
        except httpx.HTTPError as error:
            outcome.append(error)

    with open(log, "wb") as output:
        server = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while True:
            assert server.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            with suppress(httpx.TransportError):
                if client.get("/health").status_code == 200:
                    break
            time.sleep(0.5)
        assert client.get("/caprese").json()["enabled"]
        victim = process_of(server.pid, name)
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        while "answered" not in outcome:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        victim.send_signal(signal.SIGKILL)
        asking.join(60)
        assert not asking.is_alive(), "the client hangs"
        assert outcome[-1] != "answered"
        assert isinstance(outcome[-1], httpx.HTTPError) or outcome[-1] >= 500, outcome[-1]
        server.wait(60)  # with status 0: that is vLLM's choice
        deadline = time.monotonic() + 30
        while left := of_session(server.pid):
            assert time.monotonic() < deadline, [f"{each.pid} {each.name()}" for each in left]
            time.sleep(0.1)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    finally:
        for process in of_session(server.pid):
            process.kill()
        server.wait(30)
        client.close()
