"""The settings of a distillation: the one list of options for the command line, the YAML file and the Python call.

`DistillConfig` has every option once: its type, range, default, help text and group. `cli.py` makes the flags of
`caprese distill` from it, `settings_file.py` reads it from YAML, and `DistillConfig.command` is the command that the
adapter file and its model card record. This module imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from caprese_kernels.config import DEFAULT_DENSITY, DEFAULT_RANK, LayerChoice, MethodName
from caprese_kernels.errors import CapreseError

INSTRUCTION = "Please reason step by step."  # in every training sample of the paper, section 3.4
SAMPLES = 20_000  # the paper's number of training samples

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Stage = Literal["layer-wise", "end-to-end"]
Solver = Literal["closed-form", "adam"]
Weighting = Literal["none", "gradient"]
Device = Literal["auto", "cpu", "cuda"]


class Group(StrEnum):
    """The groups of options in the help."""

    MODEL = "Model"
    DATA = "Data"
    METHOD = "Method"
    TRAINING = "Training"
    MACHINES = "Machines"
    OUTPUT = "Output"


@dataclass(frozen=True)
class Option:
    """What a field needs for the command line besides its type and range."""

    group: Group
    help: str
    metavar: str | None = None
    recorded: bool = True  # whether the recorded command has it; False if it does not change the adapter


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number")
    return value


def _parse_layers(value: Any) -> Any:
    """ "0,1,2" as a list; ValueError for anything else than that, a list of indices, "first-half", "all" and None."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}(,\d{1,9})*", value):
        return [int(index) for index in value.split(",")]
    indices = isinstance(value, list) and all(type(index) is int and index >= 0 for index in value)
    if value in (None, "first-half", "all") or indices:
        return value
    raise ValueError("first-half, all, or indices as 0,1,2")


def _parse_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError("a JSON object")
    return found


# Written as text or numbers: YAML reads 2e-4 as text, and true as 1.
Integer = Annotated[int, BeforeValidator(_not_bool)]
Number = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0.0)]


class DistillConfig(BaseModel):
    """Settings of a distillation; `caprese_distill.distill` makes the adapter.

    A wrong value, an unknown name and options that exclude each other raise CapreseError.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True)

    model: Annotated[str, Field(min_length=1), Option(Group.MODEL, "Model directory or Hub id.", "MODEL")]
    dtype: Annotated[Dtype, Option(Group.MODEL, "Dtype of model and adapters; auto: the checkpoint's.")] = "auto"

    data: Annotated[
        str,
        Field(min_length=1),
        Option(
            Group.DATA,
            "JSONL, .parquet or .csv file, directory of such files, or Hub dataset as owner/name:config@split.",
            "DATA",
        ),
    ]
    prompt_column: Annotated[
        str | None,
        Option(
            Group.DATA,
            "Column of prompts: text or chat messages. Default: the first of prompt, question, problem ... found.",
            "NAME",
        ),
    ] = None
    response_column: Annotated[
        str | None,
        Option(
            Group.DATA,
            "Column of responses. Default: the assistant's message that ends the prompt, else the first of response, "
            "solution, answer ... found.",
            "NAME",
        ),
    ] = None
    instruction: Annotated[
        str, Option(Group.DATA, "Prepended to every prompt that lacks it, as in the paper; '' for none.", "TEXT")
    ] = INSTRUCTION
    samples: Annotated[Integer, Field(ge=2), Option(Group.DATA, "Most rows to use, drawn with --seed.", "N")] = SAMPLES
    max_length: Annotated[
        Integer,
        Field(ge=1),
        Option(Group.DATA, "Most tokens of a sample, at most the model's positions; longer ones are skipped.", "N"),
    ] = 2048
    seed: Annotated[Integer, Option(Group.DATA, "Seed of the drawn rows and of the order of training.", "N")] = 0
    generate: Annotated[
        bool, Option(Group.DATA, "Let the model answer the prompts itself, with vLLM; no responses are read.")
    ] = False
    temperature: Annotated[
        Annotated[Number, Field(ge=0.0)] | None,
        Option(Group.DATA, "For --generate. Default: the model's generation_config, else 0.", "X"),
    ] = None
    max_new_tokens: Annotated[
        Annotated[Integer, Field(ge=2)] | None,
        Option(Group.DATA, "For --generate: most tokens of a response. Default: limited by --max-length alone.", "N"),
    ] = None
    engine: Annotated[
        dict[str, Any] | None,
        BeforeValidator(_parse_json),
        Option(Group.DATA, 'For --generate: arguments of vllm.LLM, as {"tensor_parallel_size": 4}.', "JSON"),
    ] = None

    method: Annotated[MethodName, Option(Group.METHOD, "Sparse method.")] = "griffin"
    density: Annotated[
        Positive, Field(le=1.0), Option(Group.METHOD, "Share of neurons that a generated token keeps.", "X")
    ] = DEFAULT_DENSITY
    rank: Annotated[
        Integer, Field(ge=1), Option(Group.METHOD, "Rank r of the low-rank layers; at most the hidden size.", "N")
    ] = DEFAULT_RANK
    layers: Annotated[
        LayerChoice | None,
        BeforeValidator(_parse_layers),
        Option(
            Group.METHOD,
            "first-half, all, or indices as 0,1,2. Default: first-half for griffin, all for cats.",
            "LAYERS",
        ),
    ] = None
    stage: Annotated[
        Stage,
        Option(Group.METHOD, "The last stage: end-to-end follows layer-wise, and takes several times as long."),
    ] = "end-to-end"
    solver: Annotated[
        Solver, Option(Group.METHOD, "Layer-wise: the optimum in one pass; or the paper's many epochs, for comparison.")
    ] = "closed-form"
    weighting: Annotated[
        Weighting,
        Option(
            Group.METHOD,
            "Closed form: gradient solves again with tokens weighted by the gradient of the model's output; one more "
            "pass.",
        ),
    ] = "none"

    learning_rate: Annotated[
        Positive | None,
        Option(Group.TRAINING, "End to end. Default: 2e-4 for hidden size 2048 or less, 4e-6 for 8192 or more.", "X"),
    ] = None
    batch: Annotated[Integer, Field(ge=1), Option(Group.TRAINING, "End to end: samples of a step.", "N")] = 16
    epochs: Annotated[Integer, Field(ge=1), Option(Group.TRAINING, "End to end: passes over the samples.", "N")] = 3
    gradient_checkpointing: Annotated[
        bool, Option(Group.TRAINING, "End to end: recompute activations instead of keeping them (the default).")
    ] = True
    layer_wise_learning_rate: Annotated[Positive, Option(Group.TRAINING, "For --solver adam.", "X")] = 1e-3
    layer_wise_batch: Annotated[
        Integer, Field(ge=1), Option(Group.TRAINING, "For --solver adam: samples of a step.", "N")
    ] = 128
    layer_wise_epochs: Annotated[
        Integer, Field(ge=1), Option(Group.TRAINING, "For --solver adam: passes over the samples.", "N")
    ] = 20

    device: Annotated[
        Device, Option(Group.MACHINES, "Where the model runs; auto: cuda if there is a GPU, else cpu.")
    ] = "auto"
    device_map: Annotated[
        Literal["auto"] | None,
        Option(
            Group.MACHINES,
            "auto: spread a model too big for one GPU over all GPUs, then CPU memory and disk, with accelerate.",
        ),
    ] = None
    num_workers: Annotated[
        Integer,
        Field(ge=1),
        Option(Group.MACHINES, "Processes that share the data, with Ray; on cuda each has a GPU. 1: without Ray.", "N"),
    ] = 1

    output: Annotated[Path, Option(Group.OUTPUT, "Adapter file to write.", "FILE")] = Path("adapters.safetensors")
    tensorboard: Annotated[
        Path | None, Option(Group.OUTPUT, "End to end: directory for TensorBoard logs.", "DIR", recorded=False)
    ] = None

    if not TYPE_CHECKING:  # type checkers take the parameters from the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise _first_error(error) from None

    @model_validator(mode="after")
    def _check_combinations(self) -> DistillConfig:
        """CapreseError for options that exclude each other."""
        if not self.generate:
            for name in ("temperature", "max_new_tokens", "engine"):
                if getattr(self, name) is not None:
                    fix = f"add --generate, or leave out {flag(name)}"
                    raise CapreseError(name, expected="--generate with it", found="none", fix=fix)
        several = self.num_workers > 1 or self.device_map is not None
        if self.weighting == "gradient" and self.solver == "adam":
            _refuse("weighting", "--solver closed-form", "--solver adam")
        if self.solver == "adam" and several:
            _refuse("solver", "closed-form with --num-workers and --device-map", "adam")
        if self.weighting == "gradient" and several:
            _refuse("weighting", "none with --num-workers and --device-map", "gradient")
        if self.device_map is not None and self.num_workers > 1:
            _refuse("device_map", "one process, which uses all the GPUs", f"--num-workers {self.num_workers}")
        return self

    def command(self) -> list[str]:
        """The words of a `caprese distill` command that makes the same adapter: every option, defaults included."""
        words = ["caprese", "distill", self.model]
        switches = []
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            unused = name.startswith("layer_wise_") and self.solver != "adam"
            if name == "model" or value is None or unused or not option.recorded:
                continue
            if isinstance(value, bool):
                if value != DistillConfig.model_fields[name].default:
                    switches.append(flag(name) if value else negative_flag(name))
            else:
                words += [flag(name), _as_text(value)]
        return words + switches


def _refuse(name: str, expected: str, found: str) -> None:
    raise CapreseError(name, expected=expected, found=found, fix="leave one of the options out")


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _options() -> dict[str, Option]:
    return {
        name: next(each for each in field.metadata if isinstance(each, Option))
        for name, field in DistillConfig.model_fields.items()
    }


OPTIONS = _options()


def flag(name: str) -> str:
    """The flag of a field: "max_length" -> "--max-length"."""
    return f"--{name.replace('_', '-')}"


def negative_flag(name: str) -> str:
    """The flag that turns a switch off: "generate" -> "--no-generate"."""
    return flag(f"no_{name}")


def choices(name: str) -> tuple[str, ...]:
    """The values of a field that has a fixed set of them; else none."""
    annotation = DistillConfig.model_fields[name].annotation
    parts = [part for part in (annotation, *get_args(annotation)) if getattr(part, "__origin__", None) is Literal]
    return tuple(get_args(parts[0])) if parts else ()


def _first_error(error: ValidationError) -> CapreseError:
    """The first error as a CapreseError; `what` is the field's name."""
    errors = error.errors()
    first = errors[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, CapreseError):
        return cause
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return CapreseError(name, expected=f"one of {', '.join(OPTIONS)}", found="another name", fix="correct it")
    if first["type"] == "missing":
        return CapreseError(name, expected=f"a value: {OPTIONS[name].help.rstrip('.')}", found="none", fix="give one")
    # A union has an error for each of its members.
    expected = dict.fromkeys(_expected(each) for each in errors if each["loc"][0] == first["loc"][0])
    return CapreseError(name, expected=" or ".join(expected), found=f"{first['input']!r:.60}", fix="correct it")


def _expected(error: ErrorDetails) -> str:
    if error["type"] == "path_type":
        return "a path"
    message = re.sub(r", (unable to|got) .*", "", error["msg"])
    for start in ("Input should be ", "Value error, "):
        message = message.removeprefix(start)
    return message[0].lower() + message[1:]
