"""`vllm serve` as a context manager: starts on a free port, waits until it answers, and always stops the server."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from rich.console import Console
from rich.text import Text

from caprese_kernels import files, terminal
from caprese_kernels.errors import CapreseError, printable

from . import guard
from .address import NO_KEY, authorization, client_key, served_key, server_url

HOST = "127.0.0.1"
START_TIMEOUT = 600.0  # seconds; large models load for minutes
# A log line with the cause of a failure: a CapreseError, a wrong flag, or the last line of a traceback, but not vLLM's
# "Engine core initialization failed", which follows the cause.
_REASON = re.compile(
    r"^(\([^)]*\) )?((ERROR )?.*\] )?(caprese: |vllm.*: error: |[\w.]*(Error|Exception): (?!Engine core init))"
)


class VllmServer:
    """A server of one model on the local machine, which runs as long as the `with` block.

    The server and all its child processes end with the block: after an exception, Ctrl-C, SIGTERM, and also if this
    process is killed with SIGKILL. The server's output goes to the file `log`. Raises CapreseError if the server ends,
    or does not answer within `timeout` seconds.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *flags: str,
        log: Path,
        env: Mapping[str, str] | None = None,
        command: tuple[str, ...] | None = None,
        timeout: float = START_TIMEOUT,
        console: Console | None = None,
    ) -> None:
        self.log, self.timeout = log, timeout
        self.console = console or terminal.notes()
        self.port = _free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.command = [*(command or (vllm_program(),)), "serve", os.fspath(model), "--host", HOST]
        self.command += ["--port", str(self.port), *flags]
        self.env = {**os.environ, **(env or {})}
        self.api_key = served_key(flags, self.env)
        self.startup_seconds = 0.0
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> VllmServer:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-I", guard.__file__, str(os.getpid()), *self.command]
        with files.reporting(f"log {self.log}", expected="a file that can be written", fix="remove it"):
            files.check_target(self.log)
        with open(self.log, "wb") as log:
            self._guard = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.env, start_new_session=True
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        return self._guard is not None and self._guard.poll() is None

    def stop(self) -> None:
        """Stop the server and its child processes; does nothing if it is stopped."""
        if self._guard is None:
            return
        self._guard.terminate()
        try:
            self._guard.wait(guard.GRACE + 5)
        finally:
            self._guard.kill()

    def get(self, path: str) -> dict[str, Any]:
        """The JSON that the server returns at `path`. Raises CapreseError for any status but 200."""
        return get_json(self.url, path, f"see {self.log}", self.api_key)

    def failure(self, found: str) -> CapreseError:
        """The error for a server that does not work; its message points to the log."""
        return CapreseError("vllm serve", expected="a server that answers", found=found, fix=f"see {self.log}")

    def _wait_until_healthy(self) -> None:
        assert self._guard is not None
        begin = time.monotonic()
        with self.console.status("starting vllm serve") as status:
            while True:
                elapsed = time.monotonic() - begin
                if (code := self._guard.poll()) is not None:
                    raise self.failure(f"exit code {code} after {elapsed:.0f} s: {self._reason()}")
                if elapsed > self.timeout:
                    raise self.failure(f"no answer within {self.timeout:g} s: {self._reason()}")
                if self._healthy():
                    break
                line = "".join(self._tail(1))[: max(self.console.width - 36, 20)]
                status.update(Text.assemble(f"starting vllm serve, {elapsed:.0f} s  ", (printable(line), "dim")))
                time.sleep(0.25)
        self.startup_seconds = time.monotonic() - begin

    def _healthy(self) -> bool:
        try:
            return _get(self.url + "/health").status_code == 200
        except httpx.TransportError:
            return False

    def _tail(self, count: int) -> list[str]:
        """The last lines of the log that are not blank."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()][-count:]

    def _reason(self) -> str:
        """The last log line with a cause, or else the last three lines."""
        lines = self._tail(1000)
        reasons = [line for line in lines if _REASON.match(line)]
        return reasons[-1] if reasons else " | ".join(lines[-3:]) or "no output"


def get_json(url: str, path: str, fix: str, api_key: str | None = None) -> dict[str, Any]:
    """The JSON that a server returns at `path`; `url` with or without /v1, `api_key` as for `address.client_key`.

    Raises CapreseError, with `fix` as what to do, for any other answer.
    """
    url = server_url(url)
    try:
        response = _get(url + path, client_key(api_key))
        found = f"{response.status_code} {response.reason_phrase}"
    except httpx.TransportError as error:
        response, found = None, f"{type(error).__name__}: {error}"
    if response is not None and response.status_code in (401, 403):
        fix = "give --api-key, or set OPENAI_API_KEY"
    if response is None or response.status_code != 200:
        raise CapreseError(f"GET {url}{path}", expected="status 200", found=found, fix=fix)
    return response.json()


def _get(url: str, key: str = NO_KEY) -> httpx.Response:
    with httpx.Client(
        trust_env=False, timeout=30, headers=authorization(key)
    ) as client:  # no proxies: the server is local
        return client.get(url)


def vllm_program() -> str:
    """The `vllm` command of this Python environment."""
    # Debian's own python is in /usr/bin, and what pip installs for it in /usr/local/bin; vLLM's images are like that.
    places = (Path(sys.executable).parent, Path(sysconfig.get_path("scripts")))
    program = next((place / "vllm" for place in places if (place / "vllm").is_file()), None)
    if program is None:
        raise CapreseError(
            "vllm",
            expected=f"the vllm command beside {sys.executable}",
            found="none",
            fix='pip install "caprese-vllm[cuda]", or make setup in a checkout',
        )
    return str(program)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
