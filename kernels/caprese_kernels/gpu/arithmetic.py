# mypy: allow-untyped-defs
"""Functions that the kernels share: activations, and a product with rows of a matrix."""

import triton
import triton.language as tl


@triton.jit
def activate(u, NAME: tl.constexpr):
    """act(u) in float32; NAME is a key of packed.ACTIVATION_FUNCTIONS."""
    tl.static_assert(NAME == "silu" or NAME == "gelu" or NAME == "gelu_pytorch_tanh" or NAME == "relu")
    if NAME == "silu":
        u = u / (1.0 + tl.exp(-u))
    elif NAME == "gelu":
        u = 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    elif NAME == "gelu_pytorch_tanh":
        # (1 + tanh v) / 2 = 1 / (1 + exp(-2v)), with v = sqrt(2 / pi) (u + 0.044715 u^3).
        u = u / (1.0 + tl.exp(-1.5957691216057308 * u * (1.0 + 0.044715 * u * u)))
    else:
        u = tl.where(u < 0.0, 0.0, u)
    return u


@triton.jit
def rounded_activation(u, bias, j, mask, NAME: tl.constexpr, BIASED: tl.constexpr, DTYPE: tl.constexpr):
    """g = act(u + bias[j]), [TOKENS, ROWS]: the sum is rounded to the model's dtype, and so is g."""
    return activate(rounded(u, bias, j, mask, BIASED, DTYPE).to(tl.float32), NAME).to(DTYPE)


@triton.jit
def rounded(u, bias, j, mask, BIASED: tl.constexpr, DTYPE: tl.constexpr):
    """u + bias[j] rounded to the model's dtype."""
    if BIASED:
        u += tl.load(bias + j, mask=mask, other=0.0).to(tl.float32)[None, :]
    return u.to(DTYPE)


@triton.jit
def product(g, up):
    """g * up rounded to their dtype."""
    return (g.to(tl.float32) * up.to(tl.float32)).to(g.dtype)


@triton.jit
def project(
    x,
    weights,
    tokens,
    rows,
    live,
    T,
    D,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x[tokens] times weights[rows], transposed: [TOKENS, ROWS] float32. A row that is not live is not read: zeros.

    x [T, D] and weights [*, D], rows contiguous. A row's values go to whole warps, so that skipped rows save their
    bytes. STAGES loads are in flight at once. TOKENS is 1 for T = 1 alone: then multiply and add, else tensor cores.
    """
    total = tl.zeros([ROWS, COLUMNS] if TOKENS == 1 else [TOKENS, ROWS], tl.float32)
    weights += rows.to(tl.int64)[:, None] * D
    for start in tl.range(0, D, COLUMNS, num_stages=STAGES):
        d = start + tl.arange(0, COLUMNS)
        some_w = tl.load(weights + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
        if TOKENS == 1:
            some_x = tl.load(x + d, mask=d < D, other=0.0)
            total += some_x.to(tl.float32)[None, :] * some_w.to(tl.float32)
        else:
            mask = (tokens < T)[:, None] & (d < D)[None, :]
            some_x = tl.load(x + tokens[:, None] * D + d[None, :], mask=mask, other=0.0)
            total = tl.dot(some_x, tl.trans(some_w), total, input_precision="ieee")
    if TOKENS == 1:
        total = tl.sum(total, axis=1)[None, :]
    return total
