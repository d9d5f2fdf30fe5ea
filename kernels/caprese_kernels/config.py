"""Configuration of the method: the one schema that trainer and server share.

`CapreseConfig` is what a user writes (`--caprese-config`, `additional_config["caprese"]`);
`AdapterConfig` is the `config` entry of an adapter file's header; `resolve` joins the two for one
model into a `Method`, which has no open choices left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .errors import CapreseError, quote
from .json_text import parse_json
from .validation import validate

MethodName = Literal["griffin", "cats"]
KernelName = Literal["auto", "triton", "cpu", "reference"]
# Bounds on what a file or a flag may ask for, far above any model: memory and time must not grow with a header's text.
MAX_LAYERS, MAX_HIDDEN_SIZE, MAX_NEURONS, MAX_RANK = 4096, 1 << 20, 1 << 24, 1 << 16
LayerIndices = Annotated[list[Annotated[int, Field(ge=0, lt=MAX_LAYERS, strict=True)]], Field(max_length=MAX_LAYERS)]
LayerChoice = Literal["first-half", "all"] | LayerIndices
Name = Annotated[str, Field(max_length=4096)]
Score = Literal["paper", "weighted"]
Density = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False, strict=True)]
Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False, strict=True)]

DEFAULT_DENSITY = 0.5
DEFAULT_RANK = 256
# Paper, section 4, note: GRIFFIN on the first half of the layers, CATS on all.
DEFAULT_LAYERS: dict[str, LayerChoice] = {"griffin": "first-half", "cats": "all"}

# Activations by the name a Hugging Face config gives them; the value is the canonical one.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
    "relu": "relu",
}


# Architectures whose FF block has no gate: two matrices, W_1 and W_2, instead of three.
UNGATED_ARCHITECTURES = frozenset(
    {
        "GPT2LMHeadModel",
        "GPTJForCausalLM",
        "GPTNeoXForCausalLM",
        "OPTForCausalLM",
        "PhiForCausalLM",
        "Starcoder2ForCausalLM",
    }
)


def activation_of(hf_config: Any) -> str:
    """The canonical name of the model's activation; an unknown one keeps the model's name."""
    keys = (
        "hidden_activation",
        "hidden_act",
        "activation_function",
    )  # the first is Gemma's, the last OPT's and GPT-2's
    act = next((str(getattr(hf_config, key)) for key in keys if getattr(hf_config, key, None)), "None")
    return ACTIVATIONS.get(act, act)


def _intermediate_size(hf_config: Any) -> int:
    """F under any of its names: OPT's is `ffn_dim`; GPT-2's is `n_inner`, where None means 4 D."""
    if hasattr(hf_config, "n_inner"):
        return hf_config.n_inner or 4 * hf_config.hidden_size
    return hf_config.ffn_dim if hasattr(hf_config, "ffn_dim") else hf_config.intermediate_size


def find_architecture(architectures: Sequence[str] | None, model: str) -> str:
    """The architecture that a model's config.json names.

    CapreseError for none: vLLM would take the base model without its head, and adapters could not say what they fit.
    """
    if not architectures:
        raise CapreseError(
            f"model {model}",
            expected='"architectures" in its config.json, as ["LlamaForCausalLM"]',
            found="none",
            fix="add the name of the model's class in transformers",
        )
    return architectures[0]


class BaseModelInfo(BaseModel):
    """The dimensions of the model that an adapter was made for."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    name_or_path: Name
    architecture: Name
    hidden_size: int = Field(gt=0, le=MAX_HIDDEN_SIZE)
    intermediate_size: int = Field(gt=0, le=MAX_NEURONS)
    num_hidden_layers: int = Field(gt=0, le=MAX_LAYERS)
    hidden_act: Name

    @classmethod
    def from_hf(cls, hf_config: Any, name_or_path: str, architectures: Sequence[str] | None = None) -> BaseModelInfo:
        """From a transformers config; `architectures` where that is a part of the model's.

        CapreseError if neither names the architecture.
        """
        return cls(
            name_or_path=name_or_path,
            architecture=find_architecture(architectures or getattr(hf_config, "architectures", None), name_or_path),
            hidden_size=hf_config.hidden_size,
            intermediate_size=_intermediate_size(hf_config),
            num_hidden_layers=hf_config.num_hidden_layers,
            hidden_act=activation_of(hf_config),
        )

    @property
    def num_ff_matrices(self) -> int:
        """Matrices of one FF block: W_g, W_1 and W_2, or W_1 and W_2 without a gate."""
        return 2 if self.architecture in UNGATED_ARCHITECTURES else 3

    def check_serves(self, served: BaseModelInfo, where: str) -> None:
        """Raise CapreseError unless an adapter made for `self` fits the model `served`."""
        for field in ("architecture", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"):
            ours, theirs = getattr(self, field), getattr(served, field)
            if field == "hidden_act":
                ours, theirs = ACTIVATIONS.get(ours, ours), ACTIVATIONS.get(theirs, theirs)
            if ours != theirs:
                raise CapreseError(
                    f"{where} was made for another model ({self.name_or_path})",
                    expected=f"{field} {ours!r}",
                    found=f"{field} {theirs!r} in {served.name_or_path}",
                    fix="serve the model the adapter was made for, or distill an adapter for this one",
                )


class AdapterConfig(BaseModel):
    """The `config` entry of an adapter file's header.

    File version 2 adds `score`, `prior`, `core` and `densities`, and allows rank 0: a prior without L and R.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    base_model: BaseModelInfo
    method: MethodName
    density: Density
    rank: int = Field(ge=0, le=MAX_RANK, strict=True)
    score: Score = "paper"
    prior: Share = 0.0
    core: Share = 0.0
    layers: LayerIndices = Field(min_length=1)
    # Of each layer, in the order of `layers`; `density` in all of them reads the same bytes. None: `density` in all.
    densities: Annotated[list[Density], Field(max_length=MAX_LAYERS)] | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    caprese_version: Name = ""
    version: str = Field(default="1", exclude=True)  # of the file that it was read from

    @property
    def uses_version_2(self) -> bool:
        """Whether it says what only version 2 can say."""
        return not self._selects_as_the_paper or self.densities is not None

    @property
    def _selects_as_the_paper(self) -> bool:
        return (self.score, self.prior, self.core) == ("paper", 0.0, 0.0)

    @property
    def prior_required(self) -> bool:
        """Whether a file with this configuration must have priors: CATS (prior 0, core 0) never selects by them, and
        the paper's method needs none."""
        return not self._selects_as_the_paper and (self.method != "cats" or self.prior > 0 or self.core > 0)


class CapreseConfig(BaseModel):
    """What a user asks for when serving. Keys that are not given come from the adapter."""

    model_config = ConfigDict(extra="forbid")
    weights: str | None = Field(None, min_length=1, description="adapter file, directory that holds one, or Hub id")
    method: MethodName | None = Field(None, description="sparse method; without weights, the plain baseline")
    density: Density | None = Field(None, description="share of neurons that a generated token keeps")
    layers: LayerChoice | None = Field(None, description="layers whose FF blocks are replaced")
    score: Score | None = Field(
        None, description="what ranks neurons: the paper's |z_ij|, or weighted by the norm of the neuron's row of W_2"
    )
    prior: Share | None = Field(
        None, description="griffin: weight lambda of the adapter's prior beside the prompt's own statistic"
    )
    core: Share | None = Field(
        None, description="griffin: share kappa of a selection that all requests share, by the adapter's prior"
    )
    reselect_interval: Annotated[int, Field(ge=0, strict=True)] | None = Field(
        None,
        description="generated tokens that run sparse between two reselections; 0: only where a request asks for some; "
        "null: never",
    )
    statistics_page: Annotated[int, Field(ge=1, strict=True)] = Field(
        512, description="prefix cache: tokens between two pages of statistics, rounded up to whole KV blocks"
    )
    statistics_mib: Annotated[int, Field(ge=0, strict=True)] | None = Field(
        None,
        description="prefix cache: MiB a device for pages of statistics; default 1% of its memory, 0 for no cache",
    )
    kernel: KernelName = Field("auto", description="implementation of the FF kernels")
    start_up_check: Annotated[bool, Field(strict=True)] = Field(
        True, description="compare one layer's kernels with plain arithmetic before serving"
    )
    show_selections: Annotated[bool, Field(strict=True)] = Field(
        False,
        description="answer GET /caprese/selections/ID: which neurons a request selected, by its id",
    )
    kernel_extension: str | None = Field(
        None,
        min_length=1,
        description="FF kernels of another vLLM plugin, by the name it registered; they wrap `kernel`",
    )

    @classmethod
    def parse(cls, value: Any, where: str) -> CapreseConfig:
        """From a mapping or JSON text; `where` names the flag or key in the error."""
        if isinstance(value, str):
            try:
                value = parse_json(value)
            except ValueError as error:  # not JSON, a number too long, lists too deep
                raise CapreseError(
                    where,
                    expected="a JSON object",
                    found=f"{quote(value)} ({getattr(error, 'msg', error)})",
                    fix="quote it for the shell",
                ) from None
        if not isinstance(value, Mapping):
            raise CapreseError(
                where,
                expected="a JSON object",
                found=type(value).__name__,
                fix='write for example {"method": "griffin", "density": 0.5}',
            )
        return validate(cls, dict(value), where)


@dataclass(frozen=True)
class Method:
    """A method with nothing left open, for one model."""

    name: MethodName
    density: float
    layers: tuple[int, ...]
    rank: int  # 0: no L and R
    score: Score = "paper"
    prior: float = 0.0  # lambda: the prior's weight in the blend
    core: float = 0.0  # kappa: the share of a selection that all requests share
    densities: tuple[float, ...] | None = None  # of each layer, in the order of `layers`; None: `density` in all

    def __str__(self) -> str:
        chosen = f"method {self.name}, density {describe_density(self.density, self.densities)}, rank {self.rank}"
        chosen += f", score {self.score}" if self.score != "paper" else ""
        return chosen + (f", prior {self.prior:g}, core {self.core:g}" if self.needs_prior else "")

    def at(self, layer: int) -> Method:
        """The method of that layer alone: its own density is `density`."""
        if self.densities is None:
            return self
        return replace(self, density=self.densities[self.layers.index(layer)], densities=None)

    def restricted(self, layers: tuple[int, ...]) -> Method:
        """The same in some of its layers."""
        densities = None if self.densities is None else tuple(self.at(i).density for i in layers)
        return replace(self, layers=layers, densities=densities)

    @property
    def mean_density(self) -> float:
        """Over the layers."""
        return self.density if self.densities is None else sum(self.densities) / len(self.densities)

    @property
    def weighted(self) -> bool:
        return self.score == "weighted"

    @property
    def needs_prior(self) -> bool:
        return self.prior > 0 or self.core > 0

    @property
    def has_core(self) -> bool:
        """Whether all requests share neurons, up to rounding: floor(kappa k) may be 0."""
        return self.core > 0 or self.prior == 1.0

    @property
    def needs_statistic(self) -> bool:
        """Whether a prompt's own activations take part in its selection."""
        return not (self.name == "griffin" and (self.core == 1.0 or self.prior == 1.0))


def method_of(adapter: AdapterConfig) -> Method:
    """The method that an adapter was made for."""
    selection = adapter.score, adapter.prior, adapter.core
    densities = None if adapter.densities is None else tuple(adapter.densities)
    return Method(adapter.method, adapter.density, tuple(adapter.layers), adapter.rank, *selection, densities)


def resolve_layers(choice: LayerChoice, num_layers: int) -> tuple[int, ...]:
    """Layer indices, ascending. "first-half" is floor(N/2) layers (paper, section 4, note)."""
    if choice == "all":
        return tuple(range(num_layers))
    if choice == "first-half":
        if num_layers < 2:
            raise CapreseError(
                "layers",
                expected="a model of 2 layers or more for 'first-half'",
                found=f"{num_layers} layer",
                fix="use 'all'",
            )
        return tuple(range(num_layers // 2))
    wrong = [i for i in choice if i >= num_layers]
    if wrong or not choice or len(set(choice)) != len(choice):
        raise CapreseError(
            "layers",
            expected=f"one or more different indices from 0 to {num_layers - 1}",
            found=quote(choice),
            fix="correct the list",
        )
    return tuple(sorted(choice))


def layer_spans(layers: Sequence[int]) -> str:
    """Ascending layer indices as text: "0-11", or "0-3, 7"."""
    spans: list[list[int]] = []
    for i in layers:
        if spans and spans[-1][-1] == i - 1:
            spans[-1].append(i)
        else:
            spans.append([i])
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)


def describe_density(density: float, densities: Sequence[float] | None) -> str:
    """ "0.5", or "0.5 (0.25 to 0.81 by layer)"."""
    if densities is None:
        return f"{density:g}"
    return f"{density:g} ({min(densities):.2g} to {max(densities):.2g} by layer)"


def resolve(config: CapreseConfig, adapter: AdapterConfig | None, served: BaseModelInfo) -> tuple[Method, list[str]]:
    """Join the user's configuration with the adapter's for the model `served`.

    Returns the method and warnings to log. Raises CapreseError for another method than the
    adapter's, another base model, layers the adapter lacks, or nothing to do at all.
    """
    warnings: list[str] = []
    densities: tuple[float, ...] | None = None
    if adapter is None:
        if config.method is None:
            raise CapreseError(
                "Caprese configuration",
                expected="'weights', or 'method' for the plain baseline",
                found="neither",
                fix="give --caprese-weights FILE",
            )
        name: MethodName = config.method
        density = config.density if config.density is not None else DEFAULT_DENSITY
        rank = 0
        score: Score = config.score or "paper"
        prior, core = config.prior or 0.0, config.core or 0.0
        if prior or core:
            raise CapreseError(
                f"{'prior' if prior else 'core'} in the configuration",
                expected="weights with a prior",
                found="no weights",
                fix="give --caprese-weights FILE made by `caprese calibrate` or `caprese distill`",
            )
        choice = DEFAULT_LAYERS[name] if config.layers is None else config.layers
        layers = resolve_layers(choice, served.num_hidden_layers)
    else:
        adapter.base_model.check_serves(served, f"adapter {config.weights}")
        if config.method is not None and config.method != adapter.method:
            raise CapreseError(
                f"method of adapter {config.weights}",
                expected=repr(adapter.method),
                found=f"{config.method!r} in the configuration",
                fix="leave 'method' out, or distill an adapter for that method",
            )
        name, rank, density = adapter.method, adapter.rank, adapter.density
        uniform = adapter.densities is None
        if config.density is not None and not (uniform and config.density == adapter.density):
            made = describe_density(adapter.density, adapter.densities)
            warnings.append(f"density {config.density:g} is served with an adapter distilled at {made}")
            density, uniform = config.density, True
        score, prior, core = (
            getattr(adapter, key) if getattr(config, key) is None else getattr(config, key)
            for key in ("score", "prior", "core")
        )
        if (prior or core) and adapter.version == "1":
            raise CapreseError(
                f"{'prior' if prior else 'core'} with adapter {config.weights}",
                expected="a file of version 2, which has a prior",
                found="a file of version 1",
                fix="make one with `caprese calibrate` or `caprese distill`",
            )
        if rank and (score, prior, core) != (adapter.score, adapter.prior, adapter.core):
            warnings.append(
                f"score {score}, prior {prior:g}, core {core:g} are served with L and R distilled at score "
                f"{adapter.score}, prior {adapter.prior:g}, core {adapter.core:g}"
            )
        layers = tuple(sorted(adapter.layers))
        if config.layers is not None:
            layers = resolve_layers(config.layers, served.num_hidden_layers)
            surplus = sorted(set(layers) - set(adapter.layers))
            if surplus:
                raise CapreseError(
                    f"layers of adapter {config.weights}",
                    expected=f"layers among {quote(sorted(adapter.layers))}",
                    found=f"{quote(surplus)} in the configuration",
                    fix="leave 'layers' out, or distill an adapter for these layers",
                )
        densities = None if uniform else method_of(adapter).restricted(layers).densities
    least = min(densities or (density,))
    if name == "griffin" and least * served.intermediate_size < 1:  # then k = floor(d F) is 0
        raise CapreseError(
            "density",
            expected=f"at least one of {served.intermediate_size} neurons kept",
            found=f"{least:g}",
            fix=f"use {1 / served.intermediate_size:.4g} or more",
        )
    if name == "cats" and (prior or core):
        raise CapreseError(
            f"{'prior' if prior else 'core'} with method 'cats'",
            expected="0: CATS's neurons are chosen token by token",
            found=f"{prior or core:g}",
            fix="leave it out, or use method 'griffin'",
        )
    return Method(name, density, layers, rank, score, prior, core, densities), warnings
