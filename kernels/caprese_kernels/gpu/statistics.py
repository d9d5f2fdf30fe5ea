# mypy: allow-untyped-defs
"""GRIFFIN's statistic of prompts, and selections from it; CATS's is in `histogram`.

z is read once: a token's F values stay in registers for scale, norm and shares. Where they do not fit there, or norms
are given, a program takes a part of the columns; norms come first, in a pass of their own. Segments are cut into blocks
of tokens where they begin, so a prompt's bits do not depend on what else is in the call. Partial sums take F float32
values for each block of OBSERVED_TOKENS tokens: an eighth of z's bytes in half precision.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning

COLUMNS = 64  # neurons of one program that adds up partial statistics: 256 bytes of each
PARTS = 32


def griffin_norms(z: Tensor, scale: Tensor | None = None) -> Tensor:
    """As reference.griffin_norms; z's rows may be strided."""
    tokens, neurons = z.shape
    norms = torch.empty(tokens, dtype=torch.float32, device=z.device)
    if tokens:
        block = triton.next_power_of_2(neurons)
        _norms[(tokens,)](
            *(z, scale, norms, z.stride(0), neurons),
            SCALED=scale is not None,
            BLOCK=block,
            num_warps=tuning.row_warps(block),
        )
    return norms


@triton.jit
def _norms(z, scale, norms, stride, F, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    power, square = _square(z + t * stride, scale, F, SCALED, BLOCK)
    tl.store(norms + t, tl.sqrt(square) / power)


@triton.jit
def _square(row, scale, F, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """A power of two p, and ||p z_t||^2, which float32 holds where ||z_t||^2 overflows or vanishes."""
    j = tl.arange(0, BLOCK)
    value = tl.load(row + j, mask=j < F, other=0.0).to(tl.float32)
    if SCALED:
        value *= tl.load(scale + j, mask=j < F, other=0.0)
    power = _power_of_2(tl.max(tl.abs(value)))
    value *= power
    return power, tl.sum(value * value)


@triton.jit
def _power_of_2(largest):
    """2^-e, with 2^e the power of two of the largest magnitude.

    Multiplied by it, which is exact, squares neither overflow nor vanish. It is from 2^-126 to 2^126: fast division on
    a GPU can divide by no other numbers.
    """
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 1)
    return (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _factors(z, scale, factors, stride, F, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """factors[t] = p and ||p z_t||^2, as `_square` has them."""
    t = tl.program_id(0).to(tl.int64)
    power, square = _square(z + t * stride, scale, F, SCALED, BLOCK)
    tl.store(factors + 2 * t, power)
    tl.store(factors + 2 * t + 1, square)


def griffin_observe(
    z: Tensor,
    offsets: Tensor,
    slots: Tensor,
    statistic: Tensor,
    norms: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """As reference.griffin_observe; z's rows may be strided."""
    tokens, neurons = z.shape
    segments = len(slots)
    if not tokens or not segments:
        return
    # A segment's last block may be short: at most one block more for each.
    blocks = triton.cdiv(tokens, tuning.OBSERVED_TOKENS) + segments
    partial = torch.empty(blocks, neurons, dtype=torch.float32, device=z.device)
    options = {"SEGMENTS": tuning.segments_tile(segments), "TOKENS": tuning.OBSERVED_TOKENS}
    row = triton.next_power_of_2(neurons)
    factors, block = None, min(row, tuning.ROW_BLOCK)
    if norms is None and block < row:
        factors = torch.empty(tokens, 2, dtype=torch.float32, device=z.device)
        _factors[(tokens,)](
            *(z, scale, factors, z.stride(0), neurons),
            SCALED=scale is not None,
            BLOCK=row,
            num_warps=tuning.row_warps(row),
        )
    _partial_statistics[(blocks, triton.cdiv(neurons, block))](
        *(z, offsets, slots, norms, factors, scale, partial, z.stride(0), segments, neurons),
        NORMED=norms is not None,
        FACTORED=factors is not None,
        SCALED=scale is not None,
        BLOCK=block,
        STAGES=tuning.row_stages(block * z.element_size()),
        num_warps=tuning.row_warps(block),
        **options,
    )
    _add_statistics[(segments, triton.cdiv(neurons, COLUMNS))](
        *(offsets, slots, partial, statistic, statistic.stride(0), segments, neurons),
        PARTS=PARTS,
        COLUMNS=COLUMNS,
        num_warps=4,
        **options,
    )


@triton.jit
def _blocks(offsets, segments, SEGMENTS: tl.constexpr, TOKENS: tl.constexpr):
    """Of each segment [SEGMENTS]: its first and its end row, and the end of its blocks among all blocks."""
    segment = tl.arange(0, SEGMENTS)
    begin = tl.load(offsets + segment, mask=segment < segments, other=0)
    end = tl.load(offsets + segment + 1, mask=segment < segments, other=0)
    return segment, begin, end, tl.cumsum(tl.cdiv(end - begin, TOKENS), 0)


@triton.jit(do_not_specialize=["segments"])
def _partial_statistics(
    z,
    offsets,
    slots,
    norms,
    factors,
    scale,
    partial,
    stride,
    segments,
    F,
    SEGMENTS: tl.constexpr,
    TOKENS: tl.constexpr,
    NORMED: tl.constexpr,
    FACTORED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """partial[b] = sum of z_i^2 / ||z_i||^2 over the tokens i of block b; SCALED: of z_ij scale_j in z_ij's place.

    Program (b, columns); the columns are all neurons unless NORMED, by `norms`, or FACTORED, by what `_factors` left.
    """
    block = tl.program_id(0)
    segment, begins, ends, block_ends = _blocks(offsets, segments, SEGMENTS, TOKENS)
    mine = tl.sum((block_ends <= block).to(tl.int32))
    if mine >= segments:
        return
    if tl.load(slots + mine) < 0:
        return
    here = segment == mine
    end = tl.sum(tl.where(here, ends, 0))
    blocks_here = tl.sum(tl.where(here, tl.cdiv(ends - begins, TOKENS), 0))
    first_block = tl.sum(tl.where(here, block_ends, 0)) - blocks_here
    begin = tl.sum(tl.where(here, begins, 0)) + (block - first_block) * TOKENS
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    factor = 1.0
    if SCALED:
        factor = tl.load(scale + j, mask=j < F, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    for t in tl.range(begin, tl.minimum(begin + TOKENS, end), num_stages=STAGES):
        value = tl.load(z + t * stride + j, mask=j < F, other=0.0).to(tl.float32)
        if SCALED:
            value *= factor
        if NORMED:
            norm = tl.load(norms + t)
            power = _power_of_2(norm)
            share = value * power * (1.0 / (norm * power))
            share *= share
        elif FACTORED:
            value *= tl.load(factors + 2 * t)
            norm = tl.load(factors + 2 * t + 1)
            share = value * value * (1.0 / norm)
        else:
            value *= _power_of_2(tl.max(tl.abs(value)))
            square = value * value
            norm = tl.sum(square)
            share = square * (1.0 / norm)
        # A token of zeros adds nothing; nor does one that is not finite, whose norm is infinite or NaN.
        total += tl.where((norm > 0) & (norm < float("inf")), share, 0.0)
    tl.store(partial + block.to(tl.int64) * F + j, total, mask=j < F)


@triton.jit(do_not_specialize=["segments"])
def _add_statistics(
    offsets,
    slots,
    partial,
    statistic,
    stride,
    segments,
    F,
    SEGMENTS: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """statistic[slot] += the sum of a segment's blocks, in order."""
    mine = tl.program_id(0)
    slot = tl.load(slots + mine)
    segment, begins, ends, block_ends = _blocks(offsets, segments, SEGMENTS, TOKENS)
    end = tl.sum(tl.where(segment == mine, block_ends, 0))
    begin = end - tl.sum(tl.where(segment == mine, tl.cdiv(ends - begins, TOKENS), 0))
    if (slot < 0) | (begin == end):
        return
    j = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    total = tl.zeros([PARTS, COLUMNS], tl.float32)
    for first in range(begin, end, PARTS):
        part = (first + tl.arange(0, PARTS))[:, None]
        total += tl.load(partial + part * F + j, mask=(part < end) & (j < F), other=0.0)
    cell = statistic + slot * stride + tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS) < F
    tl.store(cell, tl.load(cell, mask=mask) + tl.sum(total, axis=0), mask=mask)


def griffin_select(statistic: Tensor, k: int) -> Tensor:
    """As reference.griffin_select: F up to 65,536."""
    rows = statistic.contiguous().view(-1, statistic.shape[-1])
    keep = torch.empty_like(rows, dtype=torch.bool)
    if len(rows):
        block = triton.next_power_of_2(rows.shape[1])
        _select[(len(rows),)](
            rows, keep.view(torch.uint8), k, rows.shape[1], BLOCK=block, num_warps=tuning.row_warps(block)
        )
    return keep.view(statistic.shape)


@triton.jit
def _select(statistic, keep, k, F, BLOCK: tl.constexpr):
    """Find the bits of the k-th largest value from the highest down, each by one count. Ties go to the lower index.

    Values are not negative: they order as their bits do.
    """
    row = tl.program_id(0).to(tl.int64) * F
    j = tl.arange(0, BLOCK)
    bits = tl.load(statistic + row + j, mask=j < F, other=0.0).to(tl.int32, bitcast=True)
    bits = tl.where(j < F, bits, -1)
    found = 0  # the largest value so far that k others reach
    for bit in range(31):
        higher = found | (1 << (30 - bit))
        found = tl.where(tl.sum((bits >= higher).to(tl.int32)) >= k, higher, found)
    tie = (bits == found).to(tl.int32)
    wanted = k - tl.sum((bits > found).to(tl.int32))  # of the values that equal the k-th
    chosen = (bits > found) | ((tie > 0) & (tl.cumsum(tie, 0) - tie < wanted))
    tl.store(keep + row + j, chosen.to(tl.uint8), mask=j < F)
