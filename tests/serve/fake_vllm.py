"""Stands in for the `vllm` command in tests of how a server is started and stopped.

`FAKE_MODE`: "ok" answers, "exit" fails with code 3, "hang" never answers, "stubborn" answers and ignores SIGTERM. Like
vLLM it has a child process; both process ids go to the file `FAKE_PIDS`. The temporary folder, where it leaves a file,
is named in the file "temporary" beside it.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

ANSWERS = {"/health": {}, "/caprese": {"enabled": True}}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path in ANSWERS else 404)
        self.end_headers()
        self.wfile.write(json.dumps(ANSWERS.get(self.path)).encode())


def main(arguments: list[str], mode: str) -> None:
    assert arguments[0] == "serve"
    print("starting", " ".join(arguments), flush=True)
    if mode == "exit":
        print("caprese: expected sense; found nonsense; think", file=sys.stderr)
        sys.exit(3)
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", ignore])
    folder = Path(tempfile.gettempdir())
    (folder / "vllm_dist_0").touch()  # vLLM leaves such files, and sockets
    Path(os.environ["FAKE_PIDS"]).with_name("temporary").write_text(str(folder))
    Path(os.environ["FAKE_PIDS"]).write_text(f"{os.getpid()} {child.pid}")
    if mode == "hang":
        time.sleep(600)
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    HTTPServer(("127.0.0.1", int(arguments[arguments.index("--port") + 1])), Handler).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:], os.environ["FAKE_MODE"])
