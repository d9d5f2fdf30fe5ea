"""Enabling Caprese: check what the user asked for, and write the settings that every process reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import vllm
from vllm.config import CUDAGraphMode
from vllm.logger import init_logger
from vllm.platforms import current_platform

from caprese_kernels.adapters import Adapters, find_adapter
from caprese_kernels.backend import Backend
from caprese_kernels.config import BaseModelInfo, CapreseConfig, Method, resolve
from caprese_kernels.errors import CapreseError, printable
from caprese_kernels.reference import EXACT_VALUES

from . import compat, ff_kernels, refusals
from .settings import KEY, RESELECT, EngineSettings
from .statistics import keeps_values, page_nbytes

logger = init_logger("vllm.caprese")

WORKER_EXTENSION = "caprese_vllm.worker.WorkerExtension"
# By what requests do, for synchronous and for asynchronous scheduling.
SCHEDULERS = {
    "reselect": ("caprese_vllm.rounds.ReselectingScheduler", "caprese_vllm.rounds.ReselectingAsyncScheduler"),
    "select": ("caprese_vllm.scheduler.CapreseScheduler", "caprese_vllm.scheduler.CapreseAsyncScheduler"),
    "share": ("caprese_vllm.scheduler.CoreScheduler", "caprese_vllm.scheduler.CoreAsyncScheduler"),
}
MAX_PAGES = 4096  # of 512 tokens each, two million tokens: more than a KV cache holds
FF_OP = "caprese::ff"


def create_engine_config(original: Callable[..., Any], args: Any, given: Any, *rest: Any, **kwargs: Any) -> Any:
    """vLLM's configuration with Caprese in it; raises CapreseError for whatever does not fit.

    All checks that need no built model happen here, in the first process, so that a mistake costs
    seconds and one line, and leaves no half-started server.
    """
    warning = compat.check_version(vllm.__version__)
    if warning:
        logger.warning("Caprese: %s", warning)
    config = CapreseConfig.parse(given, f'additional_config["{KEY}"]')
    kernels = refusals.check_config(config)
    adapters = None
    if config.weights is not None:
        path = find_adapter(config.weights)
        adapters = Adapters.load(path)
        config = config.model_copy(update={"weights": str(path)})
    refusals.check_arguments(args)
    vllm_config = original(args, *rest, **kwargs)

    refusals.check_engine(vllm_config)
    hf_config = vllm_config.model_config.hf_text_config
    model = vllm_config.model_config
    served = BaseModelInfo.from_hf(hf_config, model.model, model.architectures)
    method, warnings = resolve(config, adapters.config if adapters else None, served)
    if config.reselect_interval is not None:
        refusals.check_reselection(method, vllm_config)
    refusals.check_tensor_parallel(method, served.intermediate_size, vllm_config.parallel_config.tensor_parallel_size)
    for warning in warnings:
        logger.warning("Caprese: %s", printable(warning))

    _choose_graphs(vllm_config, kernels, config.kernel_extension)
    exact = keeps_values(method, vllm_config.model_config.dtype)
    vllm_config.parallel_config.worker_extension_cls = WORKER_EXTENSION
    num_pages = _prefix_caching(vllm_config, config, method, served)
    _choose_scheduler(vllm_config, config, method)
    EngineSettings(
        method=method,
        weights=config.weights,
        digest=adapters.digest if adapters else None,
        start_up_check=config.start_up_check,
        kernel=config.kernel,
        kernel_extension=config.kernel_extension,
        page_tokens=config.statistics_page,
        num_pages=num_pages,
        show_selections=config.show_selections,
        reselect_interval=config.reselect_interval,
        exact_tokens=EXACT_VALUES // served.intermediate_size if exact else 0,
    ).write(vllm_config)
    compat.wrap(compat.ADD_ENDPOINTS, _with_route)
    compat.wrap(compat.VALIDATE_PARAMS, _validate_params)
    return vllm_config


def _prefix_caching(vllm_config: Any, config: CapreseConfig, method: Method, served: BaseModelInfo) -> int:
    """The number of pages for statistics of cached prefixes; switches prefix caching off where no page fits."""
    cache, model = vllm_config.cache_config, vllm_config.model_config
    if not cache.enable_prefix_caching or not method.needs_statistic:
        return 0
    neurons = served.intermediate_size // vllm_config.parallel_config.tensor_parallel_size
    nbytes = page_nbytes(method, neurons, model.max_model_len, model.dtype)
    given = config.statistics_mib
    budget = current_platform.get_device_total_memory() // 100 if given is None else given * 2**20
    if budget < nbytes:
        if given:
            raise CapreseError(
                "statistics_mib",
                expected=f"room for one page, {-(-nbytes // 2**20)} MiB, or 0",
                found=str(given),
                fix="raise it, or give 0 to serve without prefix caching",
            )
        logger.info(
            "Caprese: prefix caching disabled: no memory for its statistics (need %d MiB, have %d MiB)",
            -(-nbytes // 2**20),
            budget // 2**20,
        )
        cache.enable_prefix_caching = False
        return 0
    return min(budget // nbytes, MAX_PAGES)


def _choose_scheduler(vllm_config: Any, config: CapreseConfig, method: Method) -> None:
    """A scheduler that publishes exact KV entries alone, and runs rounds; vLLM's own where nothing is published."""
    scheduler = vllm_config.scheduler_config
    if config.reselect_interval is not None:
        kind = "reselect"
    elif vllm_config.cache_config.enable_prefix_caching:
        kind = "select" if method.needs_statistic else "share"
    else:
        return
    scheduler.scheduler_cls = SCHEDULERS[kind][bool(scheduler.async_scheduling)]


def _with_route(original: Callable[..., Any], supported_tasks: Any = None) -> Any:
    from .route import CapreseRoute

    return [*original(supported_tasks), CapreseRoute()]


def _validate_params(original: Callable[..., Any], self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse wrong switches that came another way than through the server, whose requests `SwitchMiddleware` checks."""
    result = original(self, params, *args, **kwargs)
    extra = getattr(params, "extra_args", None) or {}
    if KEY in extra or RESELECT in extra:
        settings = EngineSettings.read(self.vllm_config)
        if settings is not None:
            from .switch import check_switches  # the server's code: not for a process without requests of its own

            check_switches(extra, settings)
    return result


def _choose_graphs(vllm_config: Any, kernels: Backend, extension: str | None) -> None:
    """Keep the CUDA graphs that the FF op can be part of, and switch the others off.

    It can be part of a full graph of decoding, where it runs the same kernels in every step, on tensors that stay in
    place. It cannot be part of a piecewise graph, which serves any batch: there it decides in Python which rows belong
    to which request, so piecewise graphs end before it.
    """
    compilation = vllm_config.compilation_config
    if compilation.splitting_ops:
        compilation.splitting_ops.append(FF_OP)
    mode = compilation.cudagraph_mode
    if mode is None or not mode.has_full_cudagraphs():
        return
    reason = None
    if kernels.NAME != "triton":
        reason = f"kernel {kernels.NAME!r} is not made for full graphs"
    elif extension is not None and not ff_kernels.find(extension).cuda_graphs:
        reason = f"the FF kernels {extension!r} are not made for full graphs"
    elif not vllm_config.use_v2_model_runner:
        reason = "full graphs need the V2 model runner"
    if reason is not None:
        piecewise = compilation.splitting_ops or mode.has_piecewise_cudagraphs()  # the latter: breakable graphs
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE if piecewise else CUDAGraphMode.NONE
        logger.info("Caprese: cudagraph_mode %s becomes %s: %s", mode, compilation.cudagraph_mode, reason)
