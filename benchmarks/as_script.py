"""Imported first by a verb's file that runs as a script: `python benchmarks/latency.py` is `caprese bench latency`.

The importing file goes no further: this import ends with the command.
"""

import sys
from pathlib import Path

VERBS = {
    "kernel_bench": "kernels",
    "prefix_bench": "prefix",
    "distill_speed": "distill-speed",
}  # files that are not named as their verb
HERE = Path(__file__).resolve().parent

# This folder, which Python put first, would hide other packages: `coverage`, for example.
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != HERE]
sys.path += [str(HERE.parent / name) for name in ("kernels", "distill", "serve")]  # where the project is not installed
name = Path(sys.argv[0]).stem
sys.argv = ["caprese", "bench", VERBS.get(name, name), *sys.argv[1:]]

from caprese_serve.cli import main  # noqa: E402

main()
sys.exit()
