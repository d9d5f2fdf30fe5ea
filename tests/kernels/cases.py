"""Which blocks and batches the conformance suite runs: covers of odd shapes, ranks, types, tables and layouts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import combinations, product

import torch

from caprese_kernels import reference
from caprese_kernels.packed import ACTIVATION_FUNCTIONS

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
INTEGERS = "integers"  # an activation to `Case`: relu on small integers


@dataclass(frozen=True)
class Case:
    """One block and one batch for it.

    table: each token its `own` slot; all one, `shared`; `pairs` of tokens share one; own slots with `equal` selections;
           own slots, `mixed`: selections of k, all and none of the neurons
    padding: where slots are -1: `none`, `first`, `middle`, `last`, `all`
    layout: of the rows of x, z and gate: `plain`, some `columns` of a wider tensor, every `other` row of a longer one
    """

    depth: int
    neurons: int
    rank: int
    tokens: int
    density: float
    dtype: torch.dtype
    activation: str  # of ACTIVATION_FUNCTIONS, or INTEGERS
    gated: bool = True
    biased: bool = False
    table: str = "own"
    padding: str = "none"
    layout: str = "plain"
    seed: int = 0

    @property
    def id(self) -> str:
        flags = [name for name, on in (("gated", self.gated), ("biased", self.biased)) if on]
        return "-".join(
            [
                f"{self.seed}-D{self.depth}-F{self.neurons}-r{self.rank}-T{self.tokens}-d{self.density}",
                *(DTYPE_NAMES[self.dtype], self.activation, *flags, self.table, self.padding, self.layout),
            ]
        )

    @property
    def integers(self) -> bool:
        return self.activation == INTEGERS

    @property
    def activation_name(self) -> str:
        return "relu" if self.integers else self.activation

    @property
    def selected(self) -> int:
        return reference.griffin_count(self.density, self.neurons)


def covering(choices: dict[str, tuple], seed: int) -> list[Case]:
    """Cases in which any two fields meet in every pair of their values; always the same ones for the same seed."""
    rng = random.Random(seed)
    sizes = [len(values) for values in choices.values()]
    pairs = [
        ((i, a), (j, b))
        for i, j in combinations(range(len(sizes)), 2)
        for a, b in product(range(sizes[i]), range(sizes[j]))
    ]
    rng.shuffle(pairs)
    missing = dict.fromkeys(pairs)
    cases: list[Case] = []
    while missing:
        wanted = dict(next(iter(missing)))
        drawn = [[wanted.get(i, rng.randrange(size)) for i, size in enumerate(sizes)] for _ in range(30)]
        covers = [[pair for pair in combinations(enumerate(picks), 2) if pair in missing] for picks in drawn]
        best = max(range(len(drawn)), key=lambda i: len(covers[i]))
        for pair in covers[best]:
            del missing[pair]
        fields = {name: values[i] for (name, values), i in zip(choices.items(), drawn[best], strict=True)}
        cases.append(Case(**fields, seed=1000 * seed + len(cases)))
    return cases


CHOICES: dict[str, tuple] = {
    "depth": (1, 7, 64, 100, 129, 192, 257),
    "neurons": (1, 7, 64, 100, 129, 257, 560),
    "rank": (0, 1, 16, 256),
    "tokens": (0, 1, 2, 3, 5, 8, 16, 17, 33, 64),
    "density": (0.0, 0.1, 0.25, 0.5, 0.75, 1.0),
    "dtype": tuple(DTYPE_NAMES),
    "activation": (*ACTIVATION_FUNCTIONS, INTEGERS),
    "gated": (True, False),
    "biased": (True, False),
    "table": ("own", "shared", "pairs", "equal", "mixed"),
    "padding": ("none", "first", "middle", "last", "all"),
    "layout": ("plain", "columns", "other"),
}
FEW_CHOICES = CHOICES | {
    "depth": (1, 7, 16, 33),
    "neurons": (1, 7, 32, 45),
    "rank": (0, 1, 16),
    "tokens": (0, 1, 2, 3, 5, 17),
    "density": (0.0, 0.25, 0.5, 1.0),
    "table": ("own", "pairs", "equal", "mixed"),
    "padding": ("none", "first", "middle", "all"),
}
SMALL = covering(FEW_CHOICES, seed=1)
FULL = [
    *covering(CHOICES, seed=2),
    *covering(CHOICES, seed=3),
    *covering(CHOICES, seed=4),
    # A real hidden size; and prompts longer than the chunks in which statistics are taken.
    *(
        Case(1536, 560, 16, t, 0.5, dtype, name, seed=5000 + t)
        for t, dtype, name in [
            (1, torch.bfloat16, "silu"),
            (2, torch.bfloat16, INTEGERS),
            (4, torch.float16, "gelu_pytorch_tanh"),
            (6, torch.float32, "silu"),
        ]
    ),
    *(
        Case(7, 33, 1, 1100, 0.5, dtype, name, layout="columns", table="pairs", seed=6000 + i)
        for i, (dtype, name) in enumerate(product(DTYPE_NAMES, ("silu", INTEGERS)))
    ),
]
