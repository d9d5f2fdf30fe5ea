"""Equality of an engine's greedy tokens with the reference's: the cases, what is expected of them, and the check.

Everything runs in float32. Engine and reference round differently, so two logits within ROUNDING of each other could
change places; the prompts are chosen so that the reference never sees such a tie, and then no difference is excused.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, is_dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from safetensors.torch import load_file
from torch import Tensor

from tests.support.hf_reference import Generation, HFReference, Shared
from tests.support.models import low_rank, make_adapter

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma2")
METHODS = ("griffin", "cats")
# Those of tests/engine/test_architectures.py.
# Both methods for the families that most people serve, and for OPT; one of the methods for the others.
BOTH = ("cohere2", "exaone4", "gemma3", "glm4", "gptneox", "granite", "olmo2", "opt", "phi3")
GRIFFIN = ("ernie4_5", "gemma", "gpt2", "gptj", "hunyuan", "ministral3", "olmo", "opt-350m", "seed_oss", "stablelm")
CATS = ("cohere", "cwm", "hyperclovax", "minicpm3", "olmo3", "phi", "smollm3", "starcoder2")
MORE_CASES = [
    (name, method) for names, method in ((BOTH + GRIFFIN, "griffin"), (BOTH + CATS, "cats")) for name in names
]
# Float32 logits of about 10 differ by some 1e-5 between two orders of summation; ten times that is a tie.
ROUNDING = 1e-4
BUDGET = 64  # tokens a step when prompts must be cut into chunks
BLOCK = 32  # tokens a block of the KV cache
NEW_TOKENS = 24
# One token; a block and a budget, exactly and one more (the last chunk is then a single prompt token); several chunks.
LENGTHS = (1, 2, 7, BLOCK + 1, BUDGET, BUDGET + 1, 100)


@lru_cache(maxsize=16)
def _reference(model_dir: Path) -> HFReference:
    return HFReference(model_dir)


_answers: WeakKeyDictionary[HFReference, dict[Hashable, Generation]] = WeakKeyDictionary()


def _hashable(value: Any) -> Hashable:
    """The same for the same settings: tensors by their bytes, collections and dataclasses by what they hold."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, Mapping):
        return tuple(sorted((key, _hashable(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    return _hashable(vars(value)) if is_dataclass(value) else value


@dataclass
class Case:
    """A model with a method, served and referenced alike."""

    model_dir: Path
    method: str | None
    adapter: Path | None = None
    density: float | Mapping[int, float] = 0.5  # by layer: the adapter's
    layers: list[int] | None = None
    selection: Mapping[str, Any] | None = None  # score, prior, core: the adapter's
    reselect: int | None = None  # rho

    @property
    def caprese(self) -> dict[str, Any] | None:
        """The plugin's configuration: method and density come from the adapter if there is one."""
        if self.method is None:
            return None
        given: dict[str, Any] = {"method": self.method, "density": self.density, "layers": self.layers}
        if self.adapter is not None:
            given = {"weights": str(self.adapter)}
        given["reselect_interval"] = self.reselect
        return {key: value for key, value in given.items() if value is not None}

    @cached_property
    def model(self) -> HFReference:
        """Shared by all cases of the model: a test that changes it sets one of its own."""
        return _reference(self.model_dir)

    def one(self, prompt: Sequence[int], new_tokens: int = NEW_TOKENS, **options: Any) -> Generation:
        """The reference's answer to one prompt; `options` of HFReference.generate go before the case's.

        An answer is computed once for the same model and settings, unless a function is among them.
        """
        settings: dict[str, Any] = {"method": self.method} | options
        if settings["method"] is not None:
            tensors = load_file(self.adapter) if self.adapter is not None else {}
            left, right = low_rank(tensors, "L"), low_rank(tensors, "R")
            settings = {"density": self.density, "layers": self.layers, "left": left, "right": right} | settings
            settings = {"reselect": self.reselect} | settings
            if self.selection is not None:
                chosen = self.selection
                shared = Shared(chosen["score"], chosen["prior"], chosen["core"], low_rank(tensors, "prior"))
                settings = {"shared": shared} | settings
        if settings.get("process") is not None:
            return self.model.generate(prompt, new_tokens, **settings)
        answers = _answers.setdefault(self.model, {})
        key = (tuple(prompt), new_tokens, _hashable(settings))
        if key not in answers:
            answers[key] = self.model.generate(prompt, new_tokens, **settings)
        return deepcopy(answers[key])

    def expected(
        self, prompts: Sequence[Sequence[int]], new_tokens: int = NEW_TOKENS, **options: Any
    ) -> list[Generation]:
        results = [self.one(prompt, new_tokens, **options) for prompt in prompts]
        least = min(min(result.margins) for result in results)
        assert least > ROUNDING, f"two logits tie in the reference ({least:.1e}): choose other prompts"
        return results


def new_case(
    model_dir: Callable[[str], Path],
    folder: Path,
    architecture: str,
    method: str | None,
    adapter: bool = False,
    core: float | None = None,
    **options: Any,
) -> Case:
    """With `core` the selection is by the weighted score and the adapter's prior, and that share of it is shared."""
    directory, path = model_dir(architecture), folder / f"{architecture}-{method}.safetensors"
    selection = None if core is None else {"score": "weighted", "prior": 0.5, "core": core}
    if not adapter:
        return Case(directory, method, **options)
    return Case(
        directory,
        method,
        make_adapter(directory, path, str(method), selection=selection),
        selection=selection,
        **options,
    )


def check(found: Sequence[Sequence[int]], expected: Sequence[Generation], what: str) -> None:
    """Every request's tokens equal the reference's."""
    wrong = []
    for i, (tokens, reference) in enumerate(zip(found, expected, strict=True)):
        if list(tokens) != reference.tokens:
            pairs = zip(tokens, reference.tokens, strict=False)
            at = next((t for t, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(reference.tokens)))
            margin = reference.margins[min(at, len(reference.margins) - 1)]
            wrong.append(
                f"request {i}: first difference at generated token {at}: {list(tokens)[at : at + 4]} instead of "
                f"{reference.tokens[at : at + 4]}; the reference's lead there is {margin:.1e} (a rounding tie would be "
                f"< {ROUNDING:.0e}), and its closest neuron is {reference.closest:.1e} from the selection's border"
            )
    assert not wrong, f"{what}: {len(wrong)} of {len(expected)} requests differ\n" + "\n".join(wrong)


def differing(some: Sequence[Generation], others: Sequence[Generation]) -> int:
    return sum(a.tokens != b.tokens for a, b in zip(some, others, strict=True))
