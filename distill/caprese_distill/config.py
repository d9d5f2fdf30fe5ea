"""The settings of `caprese distill`: the one list of options for the command line, the YAML file and the Python call.

`DistillConfig` has every option once: its type, range, default, help text and group. `cli.py` makes the flags of
`caprese distill` from it, `settings_file.py` reads it from YAML, and `DistillConfig.command` is the command that the
adapter file and its model card record. This module imports neither torch nor transformers.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from caprese_kernels.config import DEFAULT_DENSITY, DEFAULT_RANK, LayerChoice, MethodName, Score
from caprese_kernels.errors import CapreseError

from .options import (
    Device,
    Dtype,
    Group,
    Integer,
    Number,
    Option,
    Positive,
    Settings,
    flag,
    parse_json,
    parse_layers,
)

INSTRUCTION = "Please reason step by step."  # in every training sample of the paper, section 3.4
SAMPLES = 20_000  # the paper's number of training samples
SCORE: Score = "weighted"
PRIOR, CORE = 0.5, 1.0  # of GRIFFIN, unless given; the paper's method is score paper, prior 0, core 0

Stage = Literal["layer-wise", "end-to-end"]
Solver = Literal["closed-form", "adam"]
Weighting = Literal["none", "gradient"]
Loss = Literal["hidden", "logits", "both"]


class DataSettings(Settings):
    """Settings of every verb that runs a model over data."""

    model: Annotated[
        str, Field(min_length=1), Option(Group.MODEL, "Model directory or Hub id.", "MODEL", positional=True)
    ]
    dtype: Annotated[Dtype, Option(Group.MODEL, "Dtype of model and adapters; auto: the checkpoint's.")] = "auto"
    data: Annotated[
        str,
        Field(min_length=1),
        Option(
            Group.DATA,
            "JSON (lines or list, also .gz or .zst), .parquet or .csv file, directory of such files, or Hub dataset as "
            "owner/name:config@split.",
            "DATA",
        ),
    ]
    prompt_column: Annotated[
        str | None,
        Option(
            Group.DATA,
            "Column of prompts: text or chat messages. Default: the first of messages, prompt, question ... found.",
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
    chat_template: Annotated[
        str | None,
        Option(Group.DATA, "Chat template, as for vllm serve: a file or the text. Default: the model's own.", "JINJA"),
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None,
        BeforeValidator(parse_json),
        Option(Group.DATA, 'Arguments of the chat template, as {"enable_thinking": false}.', "JSON"),
    ] = None
    date: Annotated[
        datetime.date | None,
        Option(Group.DATA, "What a chat template that prints the date prints. Default: today's.", "YYYY-MM-DD"),
    ] = None
    max_bad_rows: Annotated[
        Number,
        Field(ge=0.0, lt=1.0),
        Option(Group.DATA, "Share of rows that may be unusable: one row always, unless 0. They are named.", "X"),
    ] = 0.01
    samples: Annotated[Integer, Field(ge=2), Option(Group.DATA, "Most rows to use, drawn with --seed.", "N")] = SAMPLES
    max_length: Annotated[
        Integer,
        Field(ge=1),
        Option(Group.DATA, "Most tokens of a sample, at most the model's positions; longer ones are skipped.", "N"),
    ] = 2048
    seed: Annotated[Integer, Option(Group.DATA, "Seed of the drawn rows and of the order of training.", "N")] = 0
    device: Annotated[
        Device, Option(Group.MACHINES, "Where the model runs; auto: cuda if there is a GPU, else cpu.")
    ] = "auto"


class AdapterSettings(DataSettings):
    """Settings of every verb that makes an adapter file from a model and data."""

    method: Annotated[MethodName, Option(Group.METHOD, "Sparse method.")] = "griffin"
    density: Annotated[
        Positive, Field(le=1.0), Option(Group.METHOD, "Share of neurons that a generated token keeps.", "X")
    ] = DEFAULT_DENSITY
    layers: Annotated[
        LayerChoice | None,
        BeforeValidator(parse_layers),
        Option(
            Group.METHOD,
            "first-half, all, or indices as 0,1,2. Default: first-half for griffin, all for cats.",
            "LAYERS",
        ),
    ] = None
    score: Annotated[
        Score,
        Option(Group.METHOD, "What ranks neurons: their part of the output (weighted), or |z| alone (paper)."),
    ] = SCORE
    prior: Annotated[
        Annotated[Number, Field(ge=0.0, le=1.0)] | None,
        Option(Group.METHOD, "Weight of the data beside a request's own prompt. Default: 0.5 for griffin.", "X"),
    ] = None
    core: Annotated[
        Annotated[Number, Field(ge=0.0, le=1.0)] | None,
        Option(
            Group.METHOD,
            "Share of the kept neurons that all requests have in common, chosen by the data. Default: 1 for griffin.",
            "X",
        ),
    ] = None
    output: Annotated[Path, Option(Group.OUTPUT, "Adapter file to write.", "FILE")] = Path("adapters.safetensors")
    push_to_hub: Annotated[
        str | None,
        Option(
            Group.OUTPUT,
            "Upload adapter, model card and report to this model repository when done.",
            "OWNER/NAME",
            recorded=False,
        ),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Prior and core that are not given: those of the method, unless a file has them."""
        if values.get("calibration") is not None:
            return values
        griffin = values.get("method", "griffin") == "griffin"
        defaults = {"prior": PRIOR if griffin else 0.0, "core": CORE if griffin else 0.0}
        return values | {name: value for name, value in defaults.items() if values.get(name) is None}

    @model_validator(mode="after")
    def _check_selection(self) -> Self:
        for name in ("prior", "core"):
            if self.method == "cats" and getattr(self, name):
                raise CapreseError(
                    name,
                    expected="0 with --method cats, whose neurons are chosen token by token",
                    found=f"{getattr(self, name):g}",
                    fix=f"leave out {flag(name)}",
                )
        return self


class DistillConfig(AdapterSettings):
    """Settings of a distillation; `caprese_distill.distill` makes the adapter.

    A wrong value, an unknown name and options that exclude each other raise CapreseError.
    """

    calibration: Annotated[
        Path | None,
        Option(
            Group.METHOD,
            "File of `caprese calibrate` for this model: method, densities, layers, score, prior and core are its own.",
            "FILE",
        ),
    ] = None
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
        BeforeValidator(parse_json),
        Option(Group.DATA, 'For --generate: arguments of vllm.LLM, as {"tensor_parallel_size": 4}.', "JSON"),
    ] = None

    rank: Annotated[
        Integer, Field(ge=1), Option(Group.METHOD, "Rank r of the low-rank layers; at most the hidden size.", "N")
    ] = DEFAULT_RANK
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
    loss: Annotated[
        Loss,
        Option(
            Group.TRAINING,
            "End to end: the error of the last hidden state (hidden: the paper's), the divergence of the next token's "
            "distribution (logits), or both.",
            "LOSS",
        ),
    ] = "hidden"
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

    tensorboard: Annotated[
        Path | None, Option(Group.OUTPUT, "End to end: directory for TensorBoard logs.", "DIR", recorded=False)
    ] = None

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
        layer_wise = {name for name in self.options() if name.startswith("layer_wise_")}
        unused = frozenset() if self.solver == "adam" else frozenset(layer_wise)
        return ["caprese", "distill", self.model, *self.words(unused)]


def _refuse(name: str, expected: str, found: str) -> None:
    raise CapreseError(name, expected=expected, found=found, fix="leave one of the options out")
