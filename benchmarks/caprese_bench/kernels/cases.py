"""The cases of the kernel benchmark: shapes, methods and selections of each section, and the bytes that each needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from caprese_kernels.errors import CapreseError
from caprese_kernels.reference import griffin_count


@dataclass(frozen=True)
class Shape:
    """One FF block of a model: D hidden size, F neurons."""

    name: str
    hidden_size: int
    neurons: int
    activation: str = "silu"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3.1-8b", 4096, 14336),
        Shape("qwen-2.5-1.5b", 1536, 8960),
        Shape("qwen-2.5-7b", 3584, 18944),
        Shape("qwen-2.5-14b", 5120, 13824),
        Shape("gemma-2-9b", 3584, 14336, "gelu_pytorch_tanh"),
    )
}
SECTIONS = ("shapes", "batch", "density", "overlap", "core", "statistics")
CORE_PATHS = ("kernel", "products")
DENSITY, RANK = 0.5, 256  # the method's defaults
OVERLAP_BATCH = 4


@dataclass(frozen=True)
class Case:
    """One method with one setting. `selection`: "independent" (one a token), "shared" (one for all) or "overlap"; for a
    core "kernel" (the backend's own, whatever the number of tokens) or "products" (the slice as three matrix products).
    """

    method: str  # griffin | cats | core
    batch: int = 1
    density: float = DENSITY
    rank: int = RANK
    selection: str | None = None
    overlap: float | None = None


@dataclass(frozen=True)
class Group:
    """Cases that are measured in turn, together with the dense block at the same number of tokens."""

    section: str
    shape: Shape
    tokens: int
    cases: tuple[Case, ...]


def groups(sections: list[str], shapes: list[Shape], quick: bool, prompt: int) -> Iterator[Group]:
    """All groups, section by section. `prompt` is the number of prompt tokens of the section "statistics"."""
    for section in sections:
        for shape in shapes:
            for tokens, cases in _cases(section, quick, prompt):
                yield Group(section, shape, tokens, tuple(cases))


def _cases(section: str, quick: bool, prompt: int) -> Iterator[tuple[int, list[Case]]]:
    both = ("griffin", "cats")
    if section == "shapes":
        yield 1, [Case(method, rank=rank) for method in both for rank in (RANK, 0)]
    elif section == "density":
        tenths = (2, 5, 10) if quick else range(1, 11)
        yield 1, [Case(method, density=tenth / 10) for method in both for tenth in tenths]
    elif section == "batch":
        for batch in (1, 4, 16) if quick else (2**i for i in range(9)):
            # Each token's threshold gives it its own selection, so CATS has no shared one.
            pairs = (("griffin", "independent"), ("griffin", "shared"), ("cats", "independent"))
            yield batch, [Case(method, batch, selection=selection) for method, selection in pairs]
    elif section == "core":
        for batch in (1, 4, 64) if quick else (2**i for i in range(9)):
            yield batch, [Case("core", batch, rank=rank, selection=path) for rank in (RANK, 0) for path in CORE_PATHS]
    elif section == "overlap":
        # Only at density 1/4 can four selections be disjoint; at 1/2 they share at least two thirds if each is to have
        # neurons of its own.
        shares = {0.25: (0, 0.5, 1), 0.5: (0.8,)} if quick else {0.25: (0, 0.25, 0.5, 0.75, 1), 0.5: (0.7, 0.8, 0.9, 1)}
        yield (
            OVERLAP_BATCH,
            [
                Case("griffin", OVERLAP_BATCH, density, selection="overlap", overlap=float(share))
                for density, each in shares.items()
                for share in each
            ],
        )
    else:
        yield prompt, [Case(method) for method in both]


def griffin_bytes(hidden_size: int, union: int, rank: int, itemsize: int) -> int:
    """Bytes of weights that one call needs: three rows of each neuron that some token keeps, and the low-rank rows,
    (3 union + 2 r) D itemsize."""
    return (3 * union + 2 * rank) * hidden_size * itemsize


def cats_bytes(hidden_size: int, neurons: int, union: int, rank: int, itemsize: int) -> int:
    """The gate of every neuron, up and down of each that some token keeps, and the low-rank rows,
    (F + 2 union + 2 r) D itemsize."""
    return (neurons + 2 * union + 2 * rank) * hidden_size * itemsize


def dense_bytes(hidden_size: int, neurons: int, itemsize: int) -> int:
    """All weights, 3 F D itemsize."""
    return 3 * neurons * hidden_size * itemsize


def selections(case: Case, neurons: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`keep` [S, F] bool and `slots` [B] int64 of a GRIFFIN case."""
    k = griffin_count(case.density, neurons)
    if case.selection == "overlap":
        assert case.overlap is not None
        keep = overlapping(case.batch, neurons, k, case.overlap, generator)
    else:
        keep = independent(1 if case.selection == "shared" else case.batch, neurons, k, generator)
    slots = torch.zeros(case.batch, dtype=torch.int64) if len(keep) == 1 else torch.arange(case.batch)
    return keep, slots


def independent(count: int, neurons: int, k: int, generator: torch.Generator) -> Tensor:
    """[count, F] bool: k neurons in each row, drawn independently."""
    order = torch.rand(count, neurons, generator=generator).argsort(dim=1)
    return torch.zeros(count, neurons, dtype=torch.bool).scatter_(1, order[:, :k], True)


def overlapping(count: int, neurons: int, k: int, overlap: float, generator: torch.Generator) -> Tensor:
    """[count, F] bool: k neurons in each row, of which round(overlap k) are common to all rows, the others to no two.

    Raises CapreseError if there are too few neurons for that.
    """
    common = round(overlap * k)
    private = k - common
    if common + count * private > neurons:
        least = (count * k - neurons) / ((count - 1) * k)
        raise CapreseError(
            "overlap of selections",
            expected=f"at least {least:.2f} for {count} times {k} of {neurons} neurons",
            found=f"{overlap:g}",
            fix="use a higher overlap or a lower density",
        )
    order = torch.randperm(neurons, generator=generator)
    keep = torch.zeros(count, neurons, dtype=torch.bool)
    keep[:, order[:common]] = True
    for row, own in zip(keep, order[common : common + count * private].split(private or 1), strict=False):
        row[own] = True
    return keep


def pairwise_overlap(keep: Tensor) -> float:
    """Mean of |A and B| / k over the pairs of rows of `keep` [S, F]; 1 for a single row, or k = 0."""
    count, k = len(keep), int(keep[0].sum())
    if count == 1 or k == 0:
        return 1.0
    uses = keep.sum(dim=0, dtype=torch.int64)
    return int((uses * (uses - 1)).sum()) / (count * (count - 1) * k)


def thresholds(g: Tensor, density: float) -> Tensor:
    """tau [T] float32 with |{j: |g_tj| >= tau_t}| = floor(d F) in each row of g [T, F].

    If magnitudes are equal (bfloat16 has 128 in an octave) that count may not exist; then it is the next higher one.
    """
    magnitudes = g.abs().float()
    k = griffin_count(density, g.shape[1])
    if k == 0:
        return torch.full((len(g),), torch.inf, device=g.device)
    return magnitudes.sort(dim=1, descending=True).values[:, k - 1].contiguous()
