"""Timing calls in turns, and measuring the memory's bandwidth between them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from itertools import cycle
from math import ceil
from typing import Any

import torch

from ..results.stats import iqr

Call = Callable[[], Any]
LEAST_SAMPLE = {"cpu": 10e-3, "cuda": 1e-3}  # seconds; far above the clock's resolution and the launch of a graph


@dataclass
class Timing:
    """Seconds a call takes, over interleaved samples."""

    median: float
    least: float
    iqr: float  # interquartile range
    samples: int


class Timer:
    """Samples the seconds that one of `calls` takes. They work on different memory and are made in turn.

    On CUDA they are replayed as one CUDA graph between events, unless they cannot be captured (`graph=False`).
    """

    def __init__(self, calls: list[Call], device: str, graph: bool = True):
        self.calls, self.device, self.per_round = calls, device, 1
        for call in calls[:2]:  # compile, allocate
            call()
        if device == "cuda":
            torch.cuda.synchronize()
            self._round: Call = self._capture().replay if graph else self._run_all
            self.per_round = len(calls)
        else:
            following = cycle(calls)
            self._round = lambda: next(following)()
        self.rounds = 1
        self.sample()
        self.rounds = max(1, ceil(LEAST_SAMPLE[device] / (self.sample() * self.per_round)))

    def sample(self) -> float:
        """Seconds a call, in one sample of many rounds."""
        if self.device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(self.rounds):
                self._round()
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) / 1e3
        else:
            begin = time.perf_counter()
            for _ in range(self.rounds):
                self._round()
            seconds = time.perf_counter() - begin
        return seconds / (self.rounds * self.per_round)

    def _run_all(self) -> None:
        for call in self.calls:
            call()

    def _capture(self) -> torch.cuda.CUDAGraph:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # warm-up off the default stream, as capture requires
            self._run_all()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run_all()
        return graph


def interleave(timers: dict[Any, Timer], repeats: int, seconds: float) -> dict[Any, Timing]:
    """`repeats` samples of each timer, taken in turn so that a disturbance of the machine affects all of them.

    Every turn starts with another timer. After `seconds` no further turn begins, but there are at least 3.
    """
    order, begin = list(timers), time.perf_counter()
    samples: dict[Any, list[float]] = {name: [] for name in order}
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() - begin > seconds:
            break
        shift = turn % len(order)
        for name in order[shift:] + order[:shift]:
            samples[name].append(timers[name].sample())
    return {name: timing(each) for name, each in samples.items()}


def timing(samples: list[float]) -> Timing:
    """Median, least and spread of the samples."""
    return Timing(statistics.median(samples), min(samples), iqr(samples), len(samples))


def cache_bytes(device: str) -> int:
    """Bytes of the largest cache, in which no weights must stay between calls; 32 MiB if it is unknown."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    for level in (4, 3, 2):
        name = f"SC_LEVEL{level}_CACHE_SIZE"
        if name in os.sysconf_names and (size := os.sysconf(name)) > 0:
            return size
    return 32 << 20


def memory(device: str) -> tuple[str, int, list[Call]]:
    """What measures the bandwidth: (name, bytes that a call moves, calls). On CUDA a copy: bytes read plus written."""
    size = max(512 << 20, 16 * cache_bytes(device))
    if device == "cuda":
        source = torch.ones(size // 4, device=device)
        target = torch.empty_like(source)
        return "device-to-device copy, read and written", 2 * source.nbytes, [lambda: target.copy_(source)]
    buffer = torch.ones(size // 4, dtype=torch.int32)
    try:
        read = import_module("caprese_kernels.cpu").read_memory
        read(buffer)
    except (ImportError, AttributeError, RuntimeError):  # not installed, or no compiler to build it
        # One comparison for each 4 bytes, vectorized and threaded: of torch's reductions the closest to the memory's
        # limit (AMD EPYC Zen 4, 2 threads: amax 45 GB/s, sum 31, dot 15).
        return "torch.amax", buffer.nbytes, [buffer.amax]
    return "caprese_kernels.cpu.read_memory", buffer.nbytes, [lambda: read(buffer)]


def bandwidth(device: str) -> tuple[str, float]:
    """(How the memory's bandwidth is measured, the bandwidth in GB/s): the median of seven samples."""
    source, size, calls = memory(device)
    timer = Timer(calls, device)
    gb_s = size / statistics.median(timer.sample() for _ in range(7)) / 1e9
    del timer, calls
    if device == "cuda":
        torch.cuda.empty_cache()  # engines take what is free
    return source, gb_s
