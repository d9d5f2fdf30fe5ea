"""The paper's table 4: `python benchmarks/latency.py` is `caprese bench latency`."""

from caprese_bench.cli import main

main("latency")
