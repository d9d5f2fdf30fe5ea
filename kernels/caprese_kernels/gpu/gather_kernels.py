# mypy: allow-untyped-defs
"""The kernels behind `gather`. z [T, F + r] holds the neurons in the order of a plan, or all of them, then x L.

Numbers that change from step to step are not specialized: Triton would compile anew for 1 and for multiples of 16.
"""

import triton
import triton.language as tl

from .arithmetic import product, project, rounded, rounded_activation


@triton.jit(do_not_specialize=["T"])
def plan_rows(keep, slots, rows, count, T, S, F, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Program (layer, block) lists the block's neurons behind those of the blocks before, which it counts itself."""
    layer, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    keep += layer * S * F
    rows += layer * F
    before = 0
    for earlier in range(block):
        before += tl.sum(_union(keep, slots, earlier * BLOCK + tl.arange(0, BLOCK), T, F, TOKENS, BLOCK))
    neurons = block * BLOCK + tl.arange(0, BLOCK)
    needed = _union(keep, slots, neurons, T, F, TOKENS, BLOCK)
    tl.store(rows + before + tl.cumsum(needed, 0) - needed, neurons, mask=needed > 0)
    if block == tl.num_programs(1) - 1:
        largest = tl.full([], -1, tl.int64)
        for first in range(0, T, TOKENS):
            tokens = first + tl.arange(0, TOKENS)
            largest = tl.maximum(largest, tl.max(tl.load(slots + tokens, mask=tokens < T, other=-1)))
        tl.store(count + layer, tl.where(largest >= 0, before + tl.sum(needed), -1))


@triton.jit
def _union(keep, slots, neurons, T, F, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """1 for each of `neurons` [BLOCK] that some token keeps, else 0."""
    needed = tl.zeros([BLOCK], tl.int32)
    for first in range(0, T, TOKENS):
        tokens = first + tl.arange(0, TOKENS)
        slot = tl.load(slots + tokens, mask=tokens < T, other=-1)[:, None]
        kept = tl.load(keep + slot * F + neurons[None, :], mask=(slot >= 0) & (neurons < F)[None, :], other=0)
        needed = tl.maximum(needed, tl.max(kept.to(tl.int32), axis=0))
    return needed


@triton.jit
def _wait():
    """Wait for the kernel before, and let the one after this be launched: it waits in turn, before it reads."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _clear(arrived, down_programs, ARRIVED: tl.constexpr):
    """The first program sets the counters of `down` to zero."""
    if tl.program_id(0) + tl.program_id(1) == 0:
        program = tl.arange(0, ARRIVED)
        tl.store(arrived + program, tl.zeros([ARRIVED], tl.int32), mask=program < down_programs)


@triton.jit(do_not_specialize=["T", "down_programs"])
def griffin_up(
    x,
    weights,
    bias,
    keep,
    slots,
    rows,
    count,
    z,
    arrived,
    down_programs,
    T,
    D,
    F,
    R,
    ARRIVED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """z[t, i] for the i-th row of the plan, then for the rows of L^T; zero where token t does not keep it."""
    if DEPENDENT:
        _wait()
    _clear(arrived, down_programs, ARRIVED)
    first = tl.program_id(0) * ROWS
    listed = tl.load(count)
    end = tl.where(listed >= 0, listed + R, 0)
    if first >= end:
        return
    DTYPE: tl.constexpr = x.dtype.element_ty
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slots + tokens, mask=tokens < T, other=-1)[:, None]
    i = first + tl.arange(0, ROWS)
    neuron = i < listed
    j = tl.where(neuron, tl.load(rows + i, mask=neuron, other=0), F + i - listed)
    up_row = j + F if GATED else j
    up = project(x, weights, tokens, up_row, i < end, T, D, TOKENS, ROWS, COLUMNS, STAGES)
    if GATED:
        gate = tl.zeros([TOKENS, ROWS], tl.float32)
        if first < listed:
            gate = project(x, weights, tokens, j, neuron, T, D, TOKENS, ROWS, COLUMNS, STAGES)
        g = rounded_activation(gate, bias, j, neuron, ACT, BIASED, DTYPE)
        value = product(g, rounded(up, bias, up_row, neuron, BIASED, DTYPE))
    else:
        value = rounded_activation(up, bias, j, neuron, ACT, BIASED, DTYPE)
    value = tl.where(neuron[None, :], value, up.to(DTYPE))
    kept = tl.load(keep + slot * F + j[None, :], mask=(slot >= 0) & neuron[None, :], other=0) != 0
    kept |= (slot >= 0) & (i >= listed)[None, :]
    tl.store(
        z + tokens[:, None] * (F + R) + i[None, :],
        tl.where(kept, value, 0.0),
        mask=(tokens < T)[:, None] & (i < end)[None, :],
    )


@triton.jit(do_not_specialize=["T", "down_programs"])
def cats_up(
    x,
    weights,
    bias,
    tau,
    slots,
    z,
    kept_count,
    scale,
    arrived,
    down_programs,
    T,
    D,
    F,
    R,
    ARRIVED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    SCALED: tl.constexpr,
    TOTAL: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """z[t, j] of neurons with |g| >= tau[slot] (SCALED: |g_j| scale_j), else zero, and of the rows of L^T.

    How many neurons a token keeps is added to kept_count[t]; TOTAL: of all tokens to kept_count[0]. A tile's gate comes
    first, whole; of W_1 it then reads the rows that some token keeps.
    """
    if DEPENDENT:
        _wait()
    _clear(arrived, down_programs, ARRIVED)
    DTYPE: tl.constexpr = x.dtype.element_ty
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slots + tokens, mask=tokens < T, other=-1)
    needs_any = tl.max(slot) >= 0
    neuron_tiles = tl.cdiv(F, ROWS)
    tile = tl.program_id(0)
    if tile < neuron_tiles:
        j = tile * ROWS + tl.arange(0, ROWS)
        neuron = j < F
        live = j < tl.where(needs_any, F, 0)
        gate = project(x, weights, tokens, j, live, T, D, TOKENS, ROWS, COLUMNS, STAGES)
        g = rounded_activation(gate, bias, j, neuron, ACT, BIASED, DTYPE)
        threshold = tl.load(tau + slot, mask=slot >= 0, other=float("inf"))[:, None]
        magnitude = tl.abs(g.to(tl.float32))
        if SCALED:
            magnitude *= tl.load(scale + j, mask=neuron, other=0.0)[None, :]
        kept = (magnitude >= threshold) & (slot >= 0)[:, None] & neuron[None, :]
        needed = tl.max(kept.to(tl.int32), axis=0) > 0
        value = g
        if GATED:
            up = tl.zeros([TOKENS, ROWS], tl.float32)
            if tl.max(needed.to(tl.int32)) > 0:
                up = project(x, weights, tokens, j + F, needed, T, D, TOKENS, ROWS, COLUMNS, STAGES)
            value = product(g, rounded(up, bias, j + F, neuron, BIASED, DTYPE))
        value = tl.where(kept, value, 0.0)
        # Integers: their sum has one value in any order.
        counts = tl.sum(kept.to(tl.int64), axis=1)
        if TOTAL:
            tl.atomic_add(kept_count, tl.sum(counts), sem="relaxed")
        else:
            tl.atomic_add(kept_count + tokens, counts, mask=tokens < T, sem="relaxed")
        tl.store(z + tokens[:, None] * (F + R) + j[None, :], value, mask=(tokens < T)[:, None] & neuron[None, :])
    else:
        i = F + (tile - neuron_tiles) * ROWS + tl.arange(0, ROWS)
        live = i < tl.where(needs_any, F + R, 0)
        row = i + F if GATED else i
        low_rank = project(x, weights, tokens, row, live, T, D, TOKENS, ROWS, COLUMNS, STAGES)
        tl.store(
            z + tokens[:, None] * (F + R) + i[None, :],
            tl.where((slot >= 0)[:, None], low_rank, 0.0).to(DTYPE),
            mask=(tokens < T)[:, None] & (i < F + R)[None, :],
        )


@triton.jit
def _compact(z, listed_z, listed_rows, begin, end, tokens, width, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """List the rows from `begin` to `end` that some of the first `tokens` rows of z needs; returns where the list ends.

    Their numbers go to listed_rows[begin:], ascending, and their z to the same places of listed_z: rows of `width`.
    """
    for first in range(begin, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < end
        value = tl.load(z + i, mask=inside, other=0.0)
        needed = (value.to(tl.float32) != 0.0).to(tl.int32)
        for t in range(1, tokens):
            other = tl.load(z + t * width + i, mask=inside, other=0.0)
            needed = tl.maximum(needed, (other.to(tl.float32) != 0.0).to(tl.int32))
        place = begin + tl.cumsum(needed, 0) - needed
        tl.store(listed_rows + place, i, mask=needed > 0)
        tl.store(listed_z + place, value, mask=needed > 0)
        for t in range(1, tokens):
            other = tl.load(z + t * width + i, mask=inside, other=0.0)
            tl.store(listed_z + t * width + place, other, mask=needed > 0)
        begin += tl.sum(needed)
    tl.debug_barrier()  # what one thread has stored here, another loads
    return begin


@triton.jit(do_not_specialize=["T"])
def down(
    z,
    weights,
    bias,
    rows,
    count,
    listed_z,
    slots,
    partial,
    arrived,
    y,
    T,
    D,
    F,
    R,
    LISTED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BIASED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = z [W_2; R] over the rows of a plan, or over all rows with some z other than zero; zero for padding.

    Program (columns, split, tokens) sums its part of the rows; the one that arrives last adds up the parts in order.
    Without a plan it first lists the rows of its part that are needed, in its own part of `rows` and `listed_z`.
    """
    if DEPENDENT:
        _wait()
    DTYPE: tl.constexpr = z.dtype.element_ty
    split, num_splits = tl.program_id(1), tl.num_programs(1)
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first_token = tl.program_id(2) * TOKENS
    tokens = first_token + tl.arange(0, TOKENS)
    if LISTED:
        listed = tl.load(count)
        total = tl.where(listed >= 0, listed + R, 0)
    else:
        total = F + R
    share = tl.cdiv(tl.cdiv(total, num_splits), 8) * 8  # so that loads of z and of the plan are 16 bytes wide
    end = tl.minimum((split + 1) * share, total)
    if not LISTED:
        here = tl.minimum(T - first_token, TOKENS)
        own = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        rows += own * (F + R)
        listed_z += own * tl.minimum(T, TOKENS) * (F + R)
        z += first_token * (F + R)
        end = _compact(z, listed_z, rows, split * share, end, here, F + R, TOKENS, BLOCK)
        z = listed_z - first_token * (F + R)
    sums = tl.zeros([ROWS, COLUMNS] if TOKENS == 1 else [TOKENS, COLUMNS], tl.float32)
    for first in tl.range(split * share, end, ROWS, num_stages=STAGES):
        i = first + tl.arange(0, ROWS)
        live = i < end
        # z and rows are loaded also past the end, whose place is not known beforehand: so the loads can be wide.
        if TOKENS == 1:
            some_z = tl.where(live, tl.load(z + i, mask=i < F + R, other=0.0), 0.0)
        else:
            mask = (tokens < T)[:, None] & (i < F + R)[None, :]
            some_z = tl.load(z + tokens[:, None] * (F + R) + i[None, :], mask=mask, other=0.0)
            some_z = tl.where(live[None, :], some_z, 0.0)
        if LISTED:
            row = tl.where(i < listed, tl.load(rows + i, mask=i < F, other=0), F + i - listed)
        else:
            row = tl.load(rows + i, mask=i < F + R, other=0)
        some_w = tl.load(
            weights + row.to(tl.int64)[:, None] * D + d[None, :],
            mask=live[:, None] & (d < D)[None, :],
            other=0.0,
        )
        if TOKENS == 1:
            sums += some_z.to(tl.float32)[:, None] * some_w.to(tl.float32)
        else:
            sums = tl.dot(some_z, some_w, sums, input_precision="ieee")
    if TOKENS == 1:
        sums = tl.sum(sums, axis=0)[None, :]
    cell = tokens[:, None] * D + d[None, :]
    mask = (tokens < T)[:, None] & (d < D)[None, :]
    tl.store(partial + split * T * D + cell, sums, mask=mask)
    # All threads have stored before one of them says so; release and acquire make that hold for the whole device.
    tl.debug_barrier()
    before = tl.atomic_add(arrived + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0), 1, sem="acq_rel")
    if before == num_splits - 1:
        # From L2 (.cg): a line of L1 could be older than another program's store.
        if TOKENS == 1:
            sums = tl.zeros([ROWS, COLUMNS], tl.float32)
            for first in range(0, num_splits, ROWS):
                part = (first + tl.arange(0, ROWS))[:, None]
                mask_part = (part < num_splits) & (d < D)[None, :]
                sums += tl.load(partial + part * D + d[None, :], mask=mask_part, other=0.0, cache_modifier=".cg")
            sums = tl.sum(sums, axis=0)[None, :]
        else:
            sums = tl.zeros([TOKENS, COLUMNS], tl.float32)
            for part in tl.range(0, num_splits, loop_unroll_factor=64 // TOKENS):
                sums += tl.load(partial + part * T * D + cell, mask=mask, other=0.0, cache_modifier=".cg")
        if BIASED:
            sums += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        valid = tl.load(slots + tokens, mask=tokens < T, other=-1) >= 0
        tl.store(y + cell, tl.where(valid[:, None], sums, 0.0).to(DTYPE), mask=mask)
