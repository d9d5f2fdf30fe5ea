"""Runs a command that ends when a given process ends: `python guard.py PARENT COMMAND...`.

The command runs in its own process group. When the process PARENT (a process id) ends in any way, or this one gets
SIGTERM, SIGINT or SIGHUP, the whole group gets SIGTERM and, after a grace period, SIGKILL. A separate process does this
because a process that is killed with SIGKILL cannot stop its own children. Standard library only; run as a script.

vLLM makes UNIX sockets and vllm_dist_* files in the temporary folder and leaves them there when it stops. The command
gets a temporary folder of its own, which is removed with it.
"""

import contextlib
import getpass
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from types import FrameType

GRACE = 5.0  # seconds between SIGTERM and SIGKILL
POLL = 0.1  # seconds


def main(parent: int, command: Sequence[str]) -> int:
    """Run the command; returns its exit code, 128 + n if signal n ended it, or 127 if it does not start."""
    stopped = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, stop)
    # torch keeps what it compiled in the temporary folder too: that stays where it was, for the next start.
    compiled = os.path.join(tempfile.gettempdir(), f"torchinductor_{_user()}")
    with tempfile.TemporaryDirectory(prefix="caprese-", ignore_cleanup_errors=True) as folder:
        env = {**os.environ, "TMPDIR": folder}
        # Last: torch sets it again, and vLLM's processes can rename themselves (VLLM::EngineCore) only while their
        # first variable is where it was.
        env.setdefault("TORCHINDUCTOR_CACHE_DIR", compiled)
        try:
            process = subprocess.Popen(command, start_new_session=True, env=env)
        except OSError as error:
            print(f"{command[0]}: {error.strerror}", file=sys.stderr)
            return 127
        return _watch(process, parent, lambda: stopped)


def _user() -> str:
    """The user as torch names them in that folder's name."""
    try:
        return re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    except (KeyError, ModuleNotFoundError, OSError):  # a user id without a name, as containers have
        return f"uid_{os.getuid()}"


def _watch(process: "subprocess.Popen[bytes]", parent: int, stopped: Callable[[], bool]) -> int:
    while process.poll() is None and not stopped() and os.getppid() == parent:
        time.sleep(POLL)
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    _signal_group(process.pid, signal.SIGKILL)  # child processes that are left, also if the command has ended
    code = process.wait()
    return code if code >= 0 else 128 - code


def _signal_group(group: int, signum: int) -> None:
    # ProcessLookupError: the group is empty. PermissionError: on macOS, the group has only zombies.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signum)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
