"""Configuration of the method: the one schema that trainer and server share.

`CapreseConfig` is what a user writes (`--caprese-config`, `additional_config["caprese"]`);
`AdapterConfig` is what an adapter file's header says; `resolve` joins the two for one model
into a `Method`, which has no open choices left.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import CapreseError

MethodName = Literal["griffin", "cats"]
KernelName = Literal["auto", "triton", "cpu", "reference"]
LayerChoice = Literal["first-half", "all"] | list[Annotated[int, Field(ge=0, strict=True)]]
Score = Literal["paper", "weighted"]
Density = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False, strict=True)]
Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False, strict=True)]

Schema = TypeVar("Schema", bound=BaseModel)

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


def activation_of(hf_config: Any) -> str:
    """The activation's canonical name, or the model's own for an unknown one."""
    keys = (
        "hidden_activation",
        "hidden_act",
        "activation_function",
    )  # the first is Gemma's, the last OPT's and GPT-2's
    act = next((str(getattr(hf_config, key)) for key in keys if getattr(hf_config, key, None)), "None")
    return ACTIVATIONS.get(act, act)


def _intermediate_size(hf_config: Any) -> int:
    """F by any of its names: `ffn_dim` is OPT's; GPT-2 says `n_inner`, or None for 4 D."""
    if hasattr(hf_config, "n_inner"):
        return hf_config.n_inner or 4 * hf_config.hidden_size
    return hf_config.ffn_dim if hasattr(hf_config, "ffn_dim") else hf_config.intermediate_size


class BaseModelInfo(BaseModel):
    """The dimensions of the model that an adapter was made for."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    name_or_path: str
    architecture: str
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    hidden_act: str

    @classmethod
    def from_hf(cls, hf_config: Any, name_or_path: str) -> BaseModelInfo:
        """From a transformers config."""
        return cls(
            name_or_path=name_or_path,
            architecture=(getattr(hf_config, "architectures", None) or [type(hf_config).__name__])[0],
            hidden_size=hf_config.hidden_size,
            intermediate_size=_intermediate_size(hf_config),
            num_hidden_layers=hf_config.num_hidden_layers,
            hidden_act=activation_of(hf_config),
        )

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

    File version 2 adds `score`, `prior` and `core`, and allows rank 0: a prior without L and R.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    base_model: BaseModelInfo
    method: MethodName
    density: Density
    rank: int = Field(ge=0, strict=True)
    score: Score = "paper"
    prior: Share = 0.0
    core: Share = 0.0
    layers: list[Annotated[int, Field(ge=0, strict=True)]] = Field(min_length=1)
    training: dict[str, Any] = Field(default_factory=dict)
    caprese_version: str = ""
    version: str = Field(default="1", exclude=True)  # of the file that it was read from

    @property
    def uses_version_2(self) -> bool:
        """Whether it says what only version 2 can say."""
        return (self.score, self.prior, self.core) != ("paper", 0.0, 0.0)


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
    reselect_interval: Annotated[int, Field(ge=1, strict=True)] | None = Field(
        None, description="rho: decode steps between reselections"
    )
    statistics_page: Annotated[int, Field(ge=1, strict=True)] = Field(
        512, description="prefix cache: tokens between two pages of statistics, rounded up to whole KV blocks"
    )
    statistics_mib: Annotated[int, Field(ge=0, strict=True)] | None = Field(
        None,
        description="prefix cache: MiB a device for pages of statistics; default 1% of its memory, 0 for no cache",
    )
    kernel: KernelName = Field("auto", description="implementation of the FF kernels")

    @classmethod
    def parse(cls, value: Any, where: str) -> CapreseConfig:
        """From a mapping or JSON text; `where` names the flag or key in the error."""
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:  # not JSON, a number too long, lists too deep
                raise CapreseError(
                    where,
                    expected="a JSON object",
                    found=f"{value[:60]!r} ({getattr(error, 'msg', error)})",
                    fix="quote it for the shell",
                ) from None
        if not isinstance(value, Mapping):
            raise CapreseError(
                where,
                expected="a JSON object",
                found=type(value).__name__,
                fix='write for example {"method": "griffin", "density": 0.5}',
            )
        return validate(cls, value, where)


def validate(schema: type[Schema], value: Any, where: str) -> Schema:
    """`schema.model_validate` with the first mistake told as a CapreseError."""
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        errors = error.errors()
        if not errors[0]["loc"]:
            raise CapreseError(where, expected="a JSON object", found=repr(value), fix="correct it") from None

        # A member of a location may name a branch of a union, which says nothing to a user.
        def key_of(e: Any) -> str:
            return ".".join(str(part) for part in e["loc"] if part in known or isinstance(part, int))

        known = _keys(schema)
        # A union tells one mistake for each branch: those of the branch that got furthest say what is wrong.
        errors = [e for e in errors if e["loc"][0] == errors[0]["loc"][0]]
        errors = [e for e in errors if len(e["loc"]) == max(len(other["loc"]) for other in errors)]
        first = errors[0]
        told = [e["msg"][0].lower() + e["msg"][1:] for e in errors if key_of(e) == key_of(first)]
        if first["type"] == "extra_forbidden":
            told = ["one of " + ", ".join(schema.model_fields)]
        raise CapreseError(
            f"{where}: key {key_of(first) or '.'.join(map(str, first['loc']))!r}",
            expected=" or ".join(told),
            found=repr(first["input"]) if first["type"] != "missing" else "nothing",
            fix="correct it",
        ) from None


def _keys(schema: type[BaseModel]) -> set[str]:
    keys = set(schema.model_fields)
    for field in schema.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= _keys(field.annotation)
    return keys


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

    def __str__(self) -> str:
        chosen = f"method {self.name}, density {self.density:g}, rank {self.rank}"
        chosen += f", score {self.score}" if self.score != "paper" else ""
        return chosen + (f", prior {self.prior:g}, core {self.core:g}" if self.needs_prior else "")

    @property
    def weighted(self) -> bool:
        return self.score == "weighted"

    @property
    def needs_prior(self) -> bool:
        return self.prior > 0 or self.core > 0

    @property
    def needs_statistic(self) -> bool:
        """Whether a prompt's own activations take part in its selection."""
        return not (self.name == "griffin" and (self.core == 1.0 or self.prior == 1.0))


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
            found=str(choice),
            fix="correct the list",
        )
    return tuple(sorted(choice))


def resolve(config: CapreseConfig, adapter: AdapterConfig | None, served: BaseModelInfo) -> tuple[Method, list[str]]:
    """Join the user's configuration with the adapter's for the model `served`.

    Returns the method and warnings to log. Raises CapreseError for another method than the
    adapter's, another base model, layers the adapter lacks, or nothing to do at all.
    """
    warnings: list[str] = []
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
        if config.density is not None and config.density != adapter.density:
            warnings.append(f"density {config.density:g} is served with an adapter distilled at {adapter.density:g}")
            density = config.density
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
                    expected=f"layers among {sorted(adapter.layers)}",
                    found=f"{surplus} in the configuration",
                    fix="leave 'layers' out, or distill an adapter for these layers",
                )
    if name == "griffin" and int(density * served.intermediate_size) < 1:
        raise CapreseError(
            "density",
            expected=f"at least one of {served.intermediate_size} neurons kept",
            found=f"{density:g}",
            fix=f"use {1 / served.intermediate_size:.4g} or more",
        )
    if name == "cats" and (prior or core):
        raise CapreseError(
            f"{'prior' if prior else 'core'} with method 'cats'",
            expected="0: CATS's neurons are chosen token by token",
            found=f"{prior or core:g}",
            fix="leave it out, or use method 'griffin'",
        )
    return Method(name, density, layers, rank, score, prior, core), warnings
