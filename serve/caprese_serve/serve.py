"""Check an adapter against a model, then become `vllm serve` with the same flags.

The flags are read as vLLM reads them: `--config FILE.yaml`, dotted flags, JSON, underscores for dashes. vLLM makes the
same checks when it starts; here they take seconds, before anything is loaded. The module is a group of one command, as
it takes no -v and -q: these are vLLM's.
"""

from __future__ import annotations

import json
import os
import shlex
from argparse import Namespace
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from caprese_kernels import terminal
from caprese_kernels.adapters import Adapters, find_adapter
from caprese_kernels.config import CapreseConfig, Method, layer_spans, resolve
from caprese_kernels.errors import CapreseError

from .environment import PLUGIN
from .inspection import model_info
from .server import vllm_program

# Flags by which vLLM finds another config.json than the model's own: then only vLLM itself can check.
ELSEWHERE = ("--revision", "--hf-overrides", "--hf-config-path", "--trust-remote-code")

app = typer.Typer(add_completion=False)


@app.command("serve", context_settings={"ignore_unknown_options": True}, epilog="All other flags: vllm serve --help.")
def serve(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL_AND_FLAGS",
            help="Model directory or Hub id, and flags of `vllm serve`: --caprese-weights or --caprese-config, or "
            "--config with a file that holds them, among them.",
        ),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and print the command that would run.")] = False,
) -> None:
    """Check an adapter against a model, then become `vllm serve` with the same flags."""
    check(words)
    command = [vllm_program(), "serve", *words]
    if dry_run:
        print(shlex.join(command))
    else:
        os.execv(command[0], command)


def check(words: Sequence[str]) -> None:
    """Raise CapreseError for what `vllm serve` with these words would refuse, or would serve without Caprese.

    Prints what will be served, and warnings, to stderr.
    """
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise CapreseError(
            "VLLM_PLUGINS", expected=f"{PLUGIN} in the list", found=repr(allowed), fix="add it, or unset the variable"
        )
    model, settings, elsewhere = read(words)
    if settings is None:
        raise CapreseError(
            "caprese serve",
            expected="--caprese-weights or --caprese-config",
            found="neither",
            fix="give one, or use `vllm serve` for the model as it is",
        )
    config = CapreseConfig.parse(settings, "the Caprese configuration")
    adapters = Adapters.load(find_adapter(config.weights)) if config.weights else None
    if elsewhere:
        terminal.notes().print(f"Caprese: with {elsewhere}, only vLLM can check the model; it does so when it starts.")
        return
    method, warnings = resolve(config, adapters.config if adapters else None, model_info(model))
    for warning in warnings:
        terminal.notes().print(f"Caprese: warning: {warning}", soft_wrap=True)
    terminal.notes().print(f"Caprese: {_described(method, config)}", soft_wrap=True, highlight=False)


def read(words: Sequence[str]) -> tuple[str, dict[str, Any] | None, str | None]:
    """(model, Caprese's settings or None, the first flag of ELSEWHERE that is given), as vLLM reads these words.

    Raises CapreseError without a model, or for a file of --config that cannot be read; SystemExit, with one line on
    stderr, for values that are no JSON.
    """
    found = _parse(words)
    first = words[0] if words and not words[0].startswith("-") else None
    model = first or found.model
    if model is None:
        raise CapreseError(
            "caprese serve", expected="a model first, or in the file of --config", found="none", fix="give MODEL first"
        )
    elsewhere = next((flag for flag in ELSEWHERE if getattr(found, flag[2:].replace("-", "_"))), None)
    return model, found.additional_config.get("caprese"), elsewhere


def _parse(words: Sequence[str]) -> Namespace:
    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:
        vllm_program()  # raises, saying how to install vLLM
        raise
    from caprese_vllm.flags import add_flags

    class Reader(FlexibleArgumentParser):
        """vLLM's parser, which knows our flags alone and passes over all others."""

        def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
            return super().parse_known_args(args, namespace)[0], []

    parser = Reader(prog="caprese serve", add_help=False, allow_abbrev=False)
    parser.add_argument("--model")
    parser.add_argument("--additional-config", type=json.loads, default={})
    for flag in ELSEWHERE:
        parser.add_argument(flag, action="store_true" if flag == "--trust-remote-code" else "store")
    add_flags(parser)
    try:
        return parser.parse_args(["serve", *words])
    except (ValueError, AssertionError, OSError, AttributeError, IndexError) as error:  # a bad --config, a bare flag
        raise CapreseError(
            "caprese serve",
            expected="flags that vLLM can read",
            found=f"{type(error).__name__}: {error}",
            fix="correct the flags, or the file of --config",
        ) from None


def _described(method: Method, config: CapreseConfig) -> str:
    what = f"adapter {config.weights} fits" if config.weights else "no adapter, the plain baseline"
    return f"{what}: {method}, layers {layer_spans(method.layers)}"
