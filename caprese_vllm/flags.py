"""From flags to `additional_config["caprese"]`, the one place where every process finds the configuration."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from caprese_kernels.config import CapreseConfig
from caprese_kernels.errors import CapreseError

from . import compat

KEY = "caprese"


def install() -> None:
    """Wrap vLLM's argument parser and engine configuration; needs vllm.engine.arg_utils, which calls us."""
    compat.wrap(compat.ADD_CLI_ARGS, _add_cli_args)
    compat.wrap(compat.CREATE_ENGINE_CONFIG, _create_engine_config)


def _add_cli_args(original: Callable[..., Any], parser: Any) -> Any:
    parser = original(parser)
    group = parser.add_argument_group("Caprese", "Sparse feed-forward decoding with distilled low-rank recovery.")
    keys = "; ".join(f"{name}: {field.description}" for name, field in CapreseConfig.model_fields.items())
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
    _exit_in_one_line()
    return parser


def _merge(namespace: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Add to additional_config["caprese"] without changing the parser's shared default."""
    known = dict(getattr(namespace, "additional_config", None) or {})
    known[KEY] = {**known.get(KEY, {}), **settings}
    namespace.additional_config = known


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
    """--additional-config, which must not erase our flags, whatever their order."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        ours = (getattr(namespace, "additional_config", None) or {}).get(KEY, {})
        setattr(namespace, self.dest, values)
        if ours:
            _merge(namespace, ours)


def _create_engine_config(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    settings = (self.additional_config or {}).get(KEY)
    if settings is None:
        return original(self, *args, **kwargs)
    from . import enable

    return enable.create_engine_config(original, self, settings, *args, **kwargs)


def _print_and_exit(error: CapreseError) -> None:
    print(f"caprese: {error}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def _exit_in_one_line() -> None:
    """On the command line a user's mistake is one line, not a traceback; exit code 1 either way."""
    previous = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, CapreseError):
            print(f"caprese: {error}", file=sys.stderr, flush=True)
        else:
            previous(kind, error, traceback)

    sys.excepthook = excepthook
