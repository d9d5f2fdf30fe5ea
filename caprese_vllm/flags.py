"""The `--caprese-*` flags: they write `additional_config["caprese"]`, from which `enable` makes the settings."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

from caprese_kernels.config import CapreseConfig
from caprese_kernels.errors import CapreseError, quote

from . import compat
from .settings import KEY, user_value


def install() -> None:
    """Wrap vLLM's engine configuration and argument parser, once vllm.engine.arg_utils can be imported.

    The configuration first: should a vLLM's parser be unknown, settings in additional_config are still refused, and not
    ignored.
    """
    compat.wrap(compat.CREATE_ENGINE_CONFIG, _create_engine_config)
    compat.wrap(compat.ADD_CLI_ARGS, _add_cli_args)


def _add_cli_args(original: Callable[..., Any], parser: Any) -> Any:
    return add_flags(original(parser))


def add_flags(parser: Any) -> Any:
    """Add our flags to an argparse parser, and let its --additional-config, if it has one, merge with them."""
    group = parser.add_argument_group("Caprese", "Sparse feed-forward decoding with distilled low-rank recovery.")
    keys = "; ".join(f"{name}: {field.description}" for name, field in CapreseConfig.model_fields.items())
    keys = keys.replace("%", "%%")  # argparse formats the help with %
    group.add_argument(
        "--caprese-weights",
        metavar="PATH",
        action=_Weights,
        default=None,
        help="Adapter made by `caprese distill`: a file, a directory that holds one, or a Hub id. Enables Caprese.",
    )
    group.add_argument(
        "--caprese-config",
        metavar="JSON",
        action=_Config,
        default=None,
        help=f"Caprese configuration as a JSON object. Keys: {keys}.",
    )
    for action in parser._actions:
        if action.dest == "additional_config":
            action.__class__ = _Merging
    return parser


def _merge(namespace: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Merge our flags into additional_config["caprese"], where they win; the parser's shared default stays as it is."""
    _exit_in_one_line()
    known = dict(getattr(namespace, "additional_config", None) or {})
    given = {} if known.get(KEY) is None else known[KEY]
    if not isinstance(given, dict):
        _print_and_exit(
            CapreseError(
                f'additional_config["{KEY}"]',
                expected="a JSON object",
                found=quote(given),
                fix="correct it, or drop it",
            )
        )
    namespace.caprese_flags = {**getattr(namespace, "caprese_flags", {}), **settings}
    namespace.additional_config = {**known, KEY: {**given, **namespace.caprese_flags}}


class _Weights(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, values)
        _merge(namespace, {"weights": values})


class _Config(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        try:
            config = CapreseConfig.parse(values, "--caprese-config")
        except CapreseError as error:
            _print_and_exit(error)
        setattr(namespace, self.dest, values)
        _merge(namespace, config.model_dump(exclude_unset=True))


class _Merging(argparse._StoreAction):
    """--additional-config, merged with our flags in whatever order they are given."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, values)
        given = values.get(KEY) if isinstance(values, dict) else None
        if given is not None or hasattr(namespace, "caprese_flags"):
            _merge(namespace, {})


def _create_engine_config(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    given = user_value(self.additional_config)
    if given is None:
        return original(self, *args, **kwargs)
    from . import enable  # vLLM's distributed code and the kernels: not for a process without Caprese

    return enable.create_engine_config(original, self, given, *args, **kwargs)


def _print_and_exit(error: CapreseError) -> NoReturn:
    print(f"caprese: {error}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def _exit_in_one_line() -> None:
    """Print an uncaught CapreseError as one line instead of a traceback; the exit code is 1 either way."""
    previous = sys.excepthook
    if getattr(previous, "__caprese__", False):
        return

    def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, CapreseError):
            print(f"caprese: {error}", file=sys.stderr, flush=True)
        else:
            previous(kind, error, traceback)

    excepthook.__caprese__ = True  # type: ignore[attr-defined]
    sys.excepthook = excepthook
