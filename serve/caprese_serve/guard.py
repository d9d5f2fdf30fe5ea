"""Runs a command that must not outlive the process that asked for it: `python guard.py PARENT COMMAND...`.

The command gets a process group of its own. When the parent process ends, in whatever way, or this one is told to
stop, the whole group is asked to end, and killed if it does not. A process that is killed hard cannot stop its
children itself, which is why this stands between. Standard library only; run as a script.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

GRACE = 5.0  # seconds between asking the group to end and killing it
POLL = 0.1


def main(parent: int, command: Sequence[str]) -> int:
    """The command's exit code, or 128 + n where signal n ended it."""
    told = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, stop)
    try:
        process = subprocess.Popen(command, start_new_session=True)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    while process.poll() is None and not told and os.getppid() == parent:
        time.sleep(POLL)
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    _signal_group(process.pid, signal.SIGKILL)  # whoever is left, also where the command has ended by itself
    code = process.wait()
    return code if code >= 0 else 128 - code


def _signal_group(group: int, signum: int) -> None:
    # An empty group; macOS says the latter of a group of zombies.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signum)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
