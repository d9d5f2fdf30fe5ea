"""Whether a kernel's output agrees with the reference's, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from caprese_kernels.errors import CapreseError
from caprese_kernels.packed import PackedFF

# ||y - reference|| / ||reference|| of a token. An implementation may round the products with W_g and W_1, g, z and y to
# bfloat16 or keep them in float32. Rounding all of them against none gives .0039 (Qwen 2.5 1.5B's shape, random
# weights); independent roundings on both sides sqrt(2) times that, .0055.
TOLERANCE = 9e-3


def check(y: Tensor, expected: Tensor, slack: Tensor | float = 0.0) -> float:
    """The largest (||y - expected|| - slack) / ||expected|| of a token; y, expected [T, D], slack [T].

    Raises CapreseError if it exceeds TOLERANCE.
    """
    difference = ((y - expected).float().norm(dim=1) - slack).clamp(min=0)
    worst = float((difference / expected.float().norm(dim=1)).max().nan_to_num(torch.inf))
    demand(worst <= TOLERANCE, f"an output within {TOLERANCE:g} of the reference, token by token", f"{worst:.2g} away")
    return worst


def check_cats(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], g: Tensor, z: Tensor, tau: Tensor, ff: PackedFF
) -> float:
    """As `check`, but a neuron with |g| within 2^-7 of tau, one step of bfloat16, may be kept or dropped."""
    band = ((g.abs().float() / tau[:, None]) - 1).abs() <= 2**-7
    off = ((found[1] - expected[1]).abs() > band.sum(dim=1)).sum()
    demand(
        int(off) == 0, "as many neurons kept as by the reference, but for rounding", f"{int(off)} tokens with others"
    )
    # Rows of W_2 are random, so nearly orthogonal: the squared length of a sum of rows is the sum of theirs.
    lengths = ff.down_plus[: ff.num_neurons].float().norm(dim=1)
    slack = torch.where(band, z.float() * lengths, 0).norm(dim=1)
    return check(found[0], expected[0], slack)


def demand(holds: bool, expected: str, found: str) -> None:
    """Raise CapreseError unless the kernel's output is as expected."""
    if not holds:
        raise CapreseError("kernel", expected=expected, found=found, fix="report this bug; the case has no row")
