"""VllmServer's life, with a stand-in for vLLM: no process may be left, however the block or its process ends."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from caprese_kernels.errors import CapreseError
from caprese_serve.server import VllmServer, vllm_program

FAKE = Path(__file__).with_name("fake_vllm.py")
# A program that serves for ever; its own process is what gets interrupted and killed.
PARENT = """
import sys, time
from pathlib import Path
from caprese_serve.server import VllmServer
with VllmServer("model", log=Path(sys.argv[1]), command=(sys.executable, sys.argv[2])):
    print("ready", flush=True)
    time.sleep(600)
"""
Serve = Callable[..., VllmServer]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    def make(mode: str, *flags: str, timeout: float = 60) -> VllmServer:
        env = {"FAKE_MODE": mode, "FAKE_PIDS": str(tmp_path / "pids")}
        return VllmServer(
            "model", *flags, log=tmp_path / "logs" / "server.log", env=env, timeout=timeout,
            command=(sys.executable, str(FAKE)), console=Console(quiet=True),
        )  # fmt: skip

    return make


def running(pids: Path) -> list[int]:
    """Which of the server's two processes run; zombies, which a container's init may leave, do not."""
    return [pid for pid in map(int, pids.read_text().split()) if _state(pid) not in ("Z", None)]


def _state(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def wait_until_gone(pids: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while running(pids):
        assert time.monotonic() < deadline, f"still running: {running(pids)}"
        time.sleep(0.05)
    folder = Path(pids.with_name("temporary").read_text())
    assert folder.name.startswith("caprese-")
    while folder.exists():
        assert time.monotonic() < deadline, f"left behind: {list(folder.iterdir())}"
        time.sleep(0.05)


def test_serves_and_stops(serve: Serve, tmp_path: Path) -> None:
    with serve("ok", "--dtype", "float32") as server:
        assert server.running
        assert server.startup_seconds > 0
        assert len(running(tmp_path / "pids")) == 2
        assert server.get("/caprese") == {"enabled": True}
        with pytest.raises(CapreseError, match="/absent: expected status 200; found 404"):
            server.get("/absent")
    assert not server.running
    wait_until_gone(tmp_path / "pids", 1)
    log = server.log.read_text()
    assert f"serve model --host 127.0.0.1 --port {server.port} --dtype float32" in log


def test_two_servers_get_two_ports(serve: Serve) -> None:
    assert serve("ok").port != serve("ok").port


def test_an_exception_stops_it(serve: Serve, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), serve("ok"):
        _ = 1 / 0
    wait_until_gone(tmp_path / "pids", 1)


def test_early_exit_reports_code_and_reason(serve: Serve) -> None:
    with (
        pytest.raises(CapreseError, match=r"exit code 3 .* caprese: expected sense; found nonsense") as error,
        serve("exit"),
    ):
        pass
    assert "server.log" in str(error.value)


def test_timeout_stops_it(serve: Serve, tmp_path: Path) -> None:
    with pytest.raises(CapreseError, match=r"no answer within 1.5 s: starting serve model"), serve("hang", timeout=1.5):
        pass
    wait_until_gone(tmp_path / "pids", 1)


def test_what_ignores_sigterm_is_killed(serve: Serve, tmp_path: Path) -> None:
    with serve("stubborn"):
        pass
    wait_until_gone(tmp_path / "pids", 1)


def test_vllm_is_found_where_scripts_have_their_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in vLLM's images: /usr/bin/python3, /usr/local/bin/vllm. One beside python comes first."""
    python, scripts = tmp_path / "bin", tmp_path / "local" / "bin"
    for folder in (python, scripts):
        folder.mkdir(parents=True)
    monkeypatch.setattr("sys.executable", str(python / "python3"))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(scripts) if name == "scripts" else "")
    with pytest.raises(CapreseError, match="the vllm command beside"):
        vllm_program()
    (scripts / "vllm").touch()
    assert vllm_program() == str(scripts / "vllm")
    (python / "vllm").touch()
    assert vllm_program() == str(python / "vllm")


def test_a_missing_program_is_reported(tmp_path: Path) -> None:
    server = VllmServer("model", log=tmp_path / "log", command=("/no/such/vllm",), console=Console(quiet=True))
    with pytest.raises(CapreseError, match=r"exit code 127 .* /no/such/vllm: No such file"), server:
        pass


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_dies_with_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals) -> None:
    monkeypatch.setenv("FAKE_MODE", "ok")
    monkeypatch.setenv("FAKE_PIDS", str(tmp_path / "pids"))
    command = [sys.executable, "-c", PARENT, str(tmp_path / "log"), str(FAKE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        assert len(running(tmp_path / "pids")) == 2
        parent.send_signal(signum)
        parent.wait(30)
    wait_until_gone(tmp_path / "pids", 10)
