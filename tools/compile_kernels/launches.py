"""The registry: calls of the backend whose launches are compiled, with the bytes and loop passes each kernel needs.

A new kernel gets a line in a case's `needs`; a new way to call one gets a case. A kernel that no case launches, or a
launch without a line, is an error (tests/tools/test_compile_kernels.py).
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from math import ceil
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime.jit import JITFunction

from caprese_kernels import gpu, reference
from caprese_kernels.gpu import tuning
from caprese_kernels.packed import PackedFF

from .compiling import Launch, intercepted

DEPTH, NEURONS, RANK = 5120, 13824, 256  # Qwen 2.5 14B's block, at density 1/2
ITEM = 2  # bytes of bfloat16
PROMPT = 2048
WIDE = 28672  # Llama 3.1 70B's F, whose row takes a block of 32,768


@dataclass(frozen=True)
class Need:
    """Bytes that a launch must move through device memory, and passes of its longest loop, all programs together."""

    bytes: float
    passes: Callable[[Launch], float] = lambda launch: 0.0


@dataclass(frozen=True)
class Case:
    """`call` launches kernels; `needs` has a line for each."""

    name: str
    call: Callable[[], object]
    needs: dict[str, Need]


def cases() -> Iterator[Case]:
    """All cases, with tensors that have shapes and types but no memory."""
    for tokens in (1, 4, 64):
        yield from _gathering(tokens)
    yield from _masking()
    yield from _statistics()


def record(case: Case, sms: int) -> list[Launch]:
    """The case's launches on a GPU with so many multiprocessors."""
    recorded: list[Launch] = []
    with patch.object(tuning, "num_sms", lambda device: sms), torch.device("meta"), intercepted(recorded.append):
        case.call()
    return recorded


def launched_kernels() -> set[str]:
    """Names of the Triton kernels that the backend's code launches, as `kernel[grid](...)`."""
    found = set()
    for module in (import_module(info.name) for info in pkgutil.iter_modules(gpu.__path__, f"{gpu.__name__}.")):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                kernel = eval(ast.unparse(node.func.value), vars(module))
                if isinstance(kernel, JITFunction):
                    found.add(kernel.__name__)
    return found


def _block(activation: str = "silu", scaled: bool = False) -> PackedFF:
    with torch.device("meta"):
        up = torch.empty(2 * NEURONS + RANK, DEPTH, dtype=torch.bfloat16)
        down = torch.empty(NEURONS + RANK, DEPTH, dtype=torch.bfloat16)
        return PackedFF(up, down, activation, RANK, scale=torch.empty(NEURONS) if scaled else None)


def _tiles(rows: float) -> Callable[[Launch], float]:
    """Passes over so many rows of D values, in tiles of ROWS and COLUMNS."""

    def passes(launch: Launch) -> float:
        return ceil(rows / launch.constant("ROWS")) * ceil(DEPTH / launch.constant("COLUMNS"))

    return passes


def _gathering(tokens: int) -> Iterator[Case]:
    """Few tokens, each with half of the neurons, independently: the rows that some token needs, each read once."""
    needed = NEURONS * (1 - 0.5**tokens)
    row = DEPTH * ITEM

    def call(ff: PackedFF, griffin: bool) -> object:
        x, slots = torch.empty(tokens, DEPTH, dtype=torch.bfloat16), torch.empty(tokens, dtype=torch.int64)
        if griffin:
            return gpu.griffin_ff(x, ff, torch.empty(8, NEURONS, dtype=torch.bool), slots, path="gather")
        return gpu.cats_ff(x, ff, torch.empty(8), slots, path="gather")

    name = "1 token" if tokens == 1 else f"{tokens} tokens"
    yield Case(
        f"GRIFFIN, {name}",
        partial(call, _block(), True),
        {
            "plan_rows": Need(NEURONS * tokens + 4 * needed),
            "griffin_up": Need((2 * needed + RANK) * row, _tiles(2 * needed + RANK)),
            "down": Need((needed + RANK) * row, _tiles(needed + RANK)),
        },
    )
    cats = {
        "cats_up": Need((NEURONS + needed + RANK) * row, _tiles(2 * NEURONS + RANK)),
        "down": Need((needed + RANK) * row, _tiles(NEURONS + RANK)),
    }
    yield Case(f"CATS, {name}", partial(call, _block(), False), cats)
    if tokens == 1:
        yield Case(f"CATS with scales, {name}", partial(call, _block(scaled=True), False), cats)
        yield Case(f"CATS with GELU, {name}", partial(call, _block("gelu_pytorch_tanh"), False), cats)


def _masking() -> Iterator[Case]:
    """Many tokens: one kernel between two products of cuBLAS."""
    tokens = 256
    moved = {"_activate_and_mask": Need(tokens * (3 * NEURONS + 2 * RANK) * ITEM)}

    def call(method: str) -> object:
        x, slots = torch.empty(tokens, DEPTH, dtype=torch.bfloat16), torch.empty(tokens, dtype=torch.int64)
        if method == "GRIFFIN":
            return gpu.griffin_ff(x, _block(), torch.empty(8, NEURONS, dtype=torch.bool), slots, path="masked")
        if method == "CATS":
            return gpu.cats_ff(x, _block(), torch.empty(8), slots, path="masked")
        return gpu.dense_ff(x, _block())

    yield Case(f"GRIFFIN, {tokens} tokens", partial(call, "GRIFFIN"), moved)
    yield Case(f"CATS, {tokens} tokens", partial(call, "CATS"), moved)
    dense = {"_activate_and_mask": Need(tokens * 3 * NEURONS * ITEM)}
    yield Case(f"dense, {tokens} tokens", partial(call, "dense"), dense)


def _statistics() -> Iterator[Case]:
    """One prompt's statistics, and a selection."""

    def prompt(neurons: int) -> tuple[Any, ...]:
        offsets, slots = torch.empty(2, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
        return torch.empty(PROMPT, neurons, dtype=torch.bfloat16), offsets, slots

    def observe(neurons: int, norms: bool) -> None:
        z, offsets, slots = prompt(neurons)
        statistic = torch.empty(8, neurons)
        gpu.griffin_observe(z, offsets, slots, statistic, gpu.griffin_norms(z) if norms else None)

    def count(scaled: bool) -> None:
        gate, offsets, slots = prompt(NEURONS)
        histogram = torch.empty(8, reference.NUM_MAGNITUDES, dtype=torch.int64)
        gpu.cats_observe(gate, "silu", offsets, slots, histogram, torch.empty(NEURONS) if scaled else None)

    def select(neurons: int) -> object:
        return gpu.griffin_select(torch.empty(1, neurons), neurons // 2)

    for neurons in (NEURONS, WIDE):
        size, parts = PROMPT * neurons * ITEM, 4 * neurons * ceil(PROMPT / tuning.OBSERVED_TOKENS)
        needs = {
            "_partial_statistics": Need(size + parts, lambda launch: PROMPT),
            "_add_statistics": Need(parts),
        }
        if neurons == WIDE:
            needs["_factors"] = Need(size)
        yield Case(f"GRIFFIN's statistic, F {neurons}", partial(observe, neurons, False), needs)
        yield Case(f"GRIFFIN's selection, F {neurons}", partial(select, neurons), {"_select": Need(5 * neurons)})
    size, parts = PROMPT * NEURONS * ITEM, 4 * NEURONS * ceil(PROMPT / tuning.OBSERVED_TOKENS)
    needs = {
        "_norms": Need(size),
        "_partial_statistics": Need(size + parts, lambda launch: PROMPT),
        "_add_statistics": Need(parts),
    }
    yield Case("GRIFFIN's statistic of several ranks", partial(observe, NEURONS, True), needs)
    counted = {"_count": Need(size)}
    yield Case("CATS's statistic", partial(count, False), counted)
    yield Case("CATS's statistic with scales", partial(count, True), counted)
