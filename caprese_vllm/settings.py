"""The engine's settings: the front end writes them once, every worker and the scheduler read them.

They travel in `vllm_config.additional_config["caprese"]`, in place of what the user wrote there. vLLM pickles that
dictionary for each process and hashes it as JSON for its compile cache, so they are stored there as JSON values; no
module but this one sees that form.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from caprese_kernels import __version__
from caprese_kernels.config import KernelName, Method

KEY = "caprese"  # in additional_config, and in a request's vllm_xargs
RESELECT = "caprese_reselect"  # in a request's vllm_xargs


@dataclass(frozen=True)
class EngineSettings:
    """What the user asked for, checked against the adapter, the model and the engine: nothing is left open."""

    method: Method
    weights: str | None  # absolute path of the adapter file; None: the plain baseline
    digest: str | None  # SHA-256 of that file: workers refuse another one
    start_up_check: bool  # whether one layer's kernels are compared with plain arithmetic before serving
    kernel: KernelName
    kernel_extension: str | None  # a name in `ff_kernels`
    page_tokens: int  # prefix cache: tokens between two pages of statistics, before rounding up to whole KV blocks
    num_pages: int  # prefix cache: pages of statistics on each device; 0: no prefix caching
    show_selections: bool  # whether GET /caprese/selections/ID is answered
    reselect_interval: int | None  # rho of requests that do not say; 0: they do not reselect; None: no request may
    exact_tokens: int  # longest prompt whose magnitudes are kept as they are (CATS in float32); 0: none
    version: str = __version__  # part of the compile cache's key

    def write(self, vllm_config: Any) -> None:
        """Store the settings in the configuration, where `read` finds them in every process."""
        vllm_config.additional_config = {**vllm_config.additional_config, KEY: asdict(self)}

    @classmethod
    def read(cls, vllm_config: Any) -> EngineSettings | None:
        """The settings of this engine; None where Caprese is not enabled."""
        values = user_value(vllm_config.additional_config)
        if values is None:
            return None
        method = values["method"]
        lists = {key: tuple(method[key]) for key in ("layers", "densities") if method[key] is not None}
        return cls(**{**values, "method": Method(**{**method, **lists})})


def user_value(additional_config: Any) -> Any:
    """The entry of our key, as the user or `EngineSettings.write` left it; None without one.

    vLLM also accepts an object that is not a dictionary as additional_config, which cannot hold our key.
    """
    return additional_config.get(KEY) if isinstance(additional_config, dict) else None


def switched_off(sampling_params: Any) -> bool:
    """Whether the client sent `vllm_xargs: {"caprese": "off"}`; the front end refuses any other value."""
    return KEY in (getattr(sampling_params, "extra_args", None) or {})


def reselect_interval(sampling_params: Any, default: int) -> int:
    """The request's rho: what the client sent as `caprese_reselect`, which the front end checked; 0: no reselection."""
    if switched_off(sampling_params):
        return 0
    return (getattr(sampling_params, "extra_args", None) or {}).get(RESELECT, default)
