"""Launches of Triton kernels compiled instead of run, and what the machine code needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from subprocess import run
from tempfile import NamedTemporaryFile
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launch:
    """A kernel's launch as it would reach the GPU: arguments' types and constants, and the grid."""

    kernel: Any
    grid: tuple[int, ...]
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def variant(self) -> tuple[str, ...]:
        """What Triton compiles a kernel anew for, besides its device."""
        return self.name, *map(str, (self.signature, self.constants, self.attributes, self.options))

    @property
    def programs(self) -> int:
        count = 1
        for size in self.grid:
            count *= size
        return count

    def constant(self, name: str) -> Any:
        """The value of a tl.constexpr argument."""
        return self.constants[(self.kernel.arg_names.index(name),)]

    def compile(self, capability: int) -> Compiled:
        """Machine code for sm_<capability>."""
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)
        return Compiled(compiled, self.options.get("num_warps", 4))


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code. `warps`: of a program."""

    triton: Any
    warps: int

    @property
    def asm(self) -> Any:
        return self.triton.asm

    @cached_property
    def resources(self) -> dict[str, int]:
        """Registers of a thread, bytes of local memory of a thread (where registers spill), bytes of shared memory."""
        with NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(self.asm["cubin"])
            program = triton.knobs.nvidia.cuobjdump.path
            report = run([program, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        found = {name: int(re.findall(rf"\b{name}:(\d+)", report)[-1]) for name in ("REG", "STACK", "LOCAL")}
        spilled = max(found["STACK"], found["LOCAL"])
        return {"registers": found["REG"], "spilled": spilled, "shared": int(self.triton.metadata.shared)}

    @cached_property
    def instructions(self) -> tuple[int, int]:
        """Of the whole program, and of its longest innermost loop (0 if it has none)."""
        places: dict[str, int] = {}
        branches: list[tuple[int, str]] = []
        count = 0
        for line in self.asm["sass"].splitlines():
            if label := re.match(r"(LBB\d+):", line):
                places[label[1]] = count
            elif "\t" in line:
                if target := re.search(r"\bBRA\b.*\b(LBB\d+);", line):
                    branches.append((count, target[1]))
                count += 1
        # A branch back to its own label is the trap behind the end.
        loops = [(places[label], at) for at, label in branches if places.get(label, at) < at]
        innermost = [
            (begin, end)
            for begin, end in loops
            if not any((begin, end) != other and begin <= other[0] and other[1] <= end for other in loops)
        ]
        return count, max((end - begin + 1 for begin, end in innermost), default=0)


@contextmanager
def intercepted(on_launch: Callable[[Launch], object]) -> Iterator[None]:
    """Within the block, `on_launch` is called for each launch of a Triton kernel, and nothing is run."""

    def subscript(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(0 < n < 65_536 for n in grid[1:]), grid

        def launch(*args: Any, **kwargs: Any) -> None:
            on_launch(launch_of(kernel, grid, args, kwargs))

        return launch

    with patch.object(JITFunction, "__getitem__", subscript):
        yield


def launch_of(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """What Triton makes of a launch's arguments: None and 1 are constants, and multiples of 16 are known as such.

    Arguments that the kernel does not specialize are neither.
    """
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    assert len(args) + len(kwargs) == len(values), "no argument given twice"
    assert set(values) == set(kernel.arg_names), set(values) ^ set(kernel.arg_names)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        number = value.data_ptr() if isinstance(value, Tensor) else value
        signature[parameter.name] = TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
        if special and number % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return Launch(kernel, tuple(grid), signature, constants, attributes, options)
