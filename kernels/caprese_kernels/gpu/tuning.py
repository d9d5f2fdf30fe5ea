"""Tile sizes of the Triton kernels, in one place. Derived for an H200, not measured yet.

What bounds a decode step is weight bytes. With k of F neurons kept, B = 1 and 2-byte weights a block must read
    GRIFFIN  (3k + 2r) 2D     CATS  (F + 2k + 2r) 2D     dense  3F 2D
bytes; activations, lists and partial sums are far below 1% of that. Qwen 2.5 14B (D 5120, F 13824, r 256, k = F/2):
218 MB, so 45 us at the datasheet's 4.8 TB/s; 1.5B (D 1536, F 8960): 43 MB, 9 us; there each launch counts.

- Bytes in flight: 4.8 TB/s for the 0.7 us or so that a load takes are 3.4 MB, 25 KB on each of 132 multiprocessors. A
  tile of UP or DOWN is 4 to 16 KB, about 3 of them are in flight in each program, and several programs share a
  multiprocessor, so that there is enough also where rows that no token needs are masked off (CATS).
- Small tiles, many programs: the hardware hands them out as others end, so the last ones leave little idle. Programs
  past a list's end exit after one load.
- One token multiplies and adds on the CUDA cores: 2.4e12 weights/s are 7% of their rate, and with conversions, masks
  and addresses the loop issues about five instructions for each. More tokens take tensor cores, padded to 16.
- Down: each part of the list leaves a float32 partial sum [B, D] in L2 (50 MB), and the program that adds them up is
  the kernel's tail. So there are only as many parts as fill the machine once, with WARPS_PER_SM.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch

MAX_TOKENS = 64  # tokens of one tile; more tokens are more tiles, each of which reads the weights again
WARPS_PER_SM = 16  # in the kernel of down, whose stages take up to 64 KB for 4 or 8 of them
DOWN_REGISTERS = 65536 // (32 * WARPS_PER_SM)  # of a thread, so that they fit: ptxas would take 250 for 64 tokens


@dataclass(frozen=True)
class Tile:
    """rows: neurons; columns: of x in the kernels of gate and up, of y in the kernel of down; in 2-byte elements."""

    rows: int
    columns: int
    warps: int
    stages: int


UP_ONE = Tile(rows=8, columns=512, warps=4, stages=4)  # 8 KB a load; 4 programs on a multiprocessor
UP_DOT = Tile(rows=32, columns=128, warps=4, stages=5)  # 8 KB a load; 8 rows, the tensor cores' width, a warp
DOWN_ONE = Tile(rows=32, columns=256, warps=8, stages=4)  # 16 KB a load, 512 bytes of each row
# Triton divides the stages of a loop between a list's indices and the rows they name: 8 keep 3 loads of rows in flight.
DOWN_DOT = Tile(rows=32, columns=128, warps=4, stages=8)  # 8 KB a load

PLAN_CELLS = 32768  # tokens times neurons that a program of `plan_rows` reads at once
PLAN_BLOCK = 8192  # the most neurons among them
LIST_BLOCK = 1024  # neurons that a program of `down` looks at together, to list those that are needed
MASK_BLOCK = 1024  # neurons of one token in a program of the masked path: 2 to 4 loads of 16 bytes a thread
OBSERVED_TOKENS = 16  # of one partial statistic: 128 programs at 2,048 tokens; partial sums add 1/8 to the bytes of z
SHARED_BYTES = 200_000  # of a multiprocessor's 228 KB
ROW_BLOCK = 16384  # values of a row in a program's registers, with sums as many: twice as many spill
COUNT_BLOCK = 2048  # magnitudes that one program counts


def tokens_tile(tokens: int) -> int:
    """Tokens of a tile: 1 for one token, else a power of two from 16."""
    return 1 if tokens == 1 else min(max(1 << (tokens - 1).bit_length(), 16), MAX_TOKENS)


def segments_tile(segments: int) -> int:
    """Room for the segments of a call: one kernel serves up to 31 prompts a step (2 n + 1 borders), not each number."""
    return max(64, 1 << (segments - 1).bit_length())


def up_tile(tokens: int) -> Tile:
    return UP_ONE if tokens == 1 else UP_DOT


def down_tile(tokens: int) -> Tile:
    return DOWN_ONE if tokens == 1 else DOWN_DOT


def splits(programs: int, rows: int, tile: Tile, device: torch.device) -> int:
    """Parts of the sum over `rows` neurons, where one part takes `programs` programs."""
    return max(1, min(WARPS_PER_SM // tile.warps * num_sms(device) // programs, -(-rows // tile.rows)))


@cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors; 2 for the interpreter, which is enough to see that splits are summed."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def dependent_launch(device: torch.device) -> bool:
    """Whether kernels are launched before their predecessor ends, to wait on the device (Hopper and later).

    4 to 6 us a layer expected, not measured: off unless CAPRESE_DEPENDENT_LAUNCH=1.
    """
    wanted = os.environ.get("CAPRESE_DEPENDENT_LAUNCH") == "1"
    return wanted and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def row_warps(block: int) -> int:
    """Warps for a row of `block` values held in registers: at most 32 values a thread, where 32 warps suffice."""
    return min(max(block // 1024, 4), 32)


def row_stages(row_bytes: int) -> int:
    """Stages of a loop over rows held in registers: two more are in flight, as far as shared memory holds them."""
    return 1 + min(2, SHARED_BYTES // row_bytes)
