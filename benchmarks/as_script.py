"""Imported first by a verb's file that runs as a script: `python benchmarks/latency.py` is `caprese bench latency`.

The importing file goes no further: this import ends with the command.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

# This folder, which Python put first, would hide other packages: `coverage`, for example.
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != HERE]
sys.path += [str(HERE.parent / name) for name in ("kernels", "distill", "serve")]  # where the project is not installed

from caprese_serve import cli  # noqa: E402

cli.find_benchmarks()
from benchmarks.cli import VERBS  # noqa: E402

verb = next(verb for verb, (module, _) in VERBS.items() if module == Path(sys.argv[0]).stem)
sys.argv = ["caprese", "bench", verb, *sys.argv[1:]]
cli.main()
sys.exit()
