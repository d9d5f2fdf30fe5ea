"""CUDA C++ compiled and launched from Python, for what Triton cannot say: NVRTC and the driver by `cuda.bindings`.

torch's wheels for CUDA bring both with them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Runs a kernel on the current stream: (blocks in x and y, threads, bytes of shared memory, arguments). Tensors are
# passed as pointers, None as a null pointer, int64 and int32 as Long and int.
Launch = Callable[..., None]


class Unavailable(RuntimeError):
    """Why this machine cannot compile or load CUDA C++."""


class Long(int):
    """An argument of 64 bits; a plain int is one of 32."""


def compile_source(source: str, macros: dict[str, int], architecture: str) -> bytes:
    """The machine code (cubin) of CUDA C++ for `architecture` ("sm_90"); needs no GPU. Raises Unavailable."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise Unavailable(f"{error}: pip install cuda-bindings") from None
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    options += [f"-D{name}={value}".encode() for name, value in macros.items()]
    program = None
    try:
        program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"caprese.cu", 0, [], []))
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(status):
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise Unavailable(f"NVRTC: {log.decode(errors='replace').strip()}")
        code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
    except RuntimeError as error:  # also: no NVRTC library
        raise error if isinstance(error, Unavailable) else Unavailable(f"NVRTC: {error}") from None
    finally:
        if program is not None:
            nvrtc.nvrtcDestroyProgram(program)
    return code


def load(code: bytes, name: str, shared_bytes: int, device: torch.device) -> Launch:
    """The kernel `name` of `code` on `device`, allowed up to `shared_bytes` of shared memory. Raises Unavailable."""
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # makes the device's context
        module = _checked(driver.cuModuleLoadData(code))
        function = _checked(driver.cuModuleGetFunction(module, name.encode()))
        _checked(driver.cuFuncSetAttribute(function, attribute, shared_bytes))

    def launch(grid: tuple[int, int], threads: int, shared_bytes: int, *arguments: Tensor | int | None) -> None:
        with torch.cuda.device(device):
            stream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
            _checked(
                driver.cuLaunchKernel(
                    *(function, *grid, 1, threads, 1, 1, shared_bytes, stream, parameters(arguments), 0),
                )
            )

    return launch


def parameters(arguments: tuple[Tensor | int | None, ...]) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Values and C types of a kernel's arguments, as cuda.bindings takes them."""
    values: list[int] = []
    types: list[Any] = []
    for argument in arguments:
        if argument is None or isinstance(argument, Tensor):
            values.append(0 if argument is None else argument.data_ptr())
            types.append(ctypes.c_void_p)
        else:
            values.append(int(argument))
            types.append(ctypes.c_int64 if isinstance(argument, Long) else ctypes.c_int32)
    return tuple(values), tuple(types)


def _checked(result: tuple[Any, ...]) -> Any:
    """What a function of cuda.bindings returned, without its status. Raises Unavailable if that is an error."""
    status, *values = result
    if int(status):
        raise Unavailable(status.name)
    return values[0] if values else None
