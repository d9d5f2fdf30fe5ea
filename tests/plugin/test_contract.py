"""compat.py's contract by the source of a vLLM release, without importing it: the installed one's, and others'.

CAPRESE_VLLM_SOURCE=0.33.0 names releases to check, separated by commas; pip fetches their wheels (340 MB each, once)
into CAPRESE_VLLM_CACHE, by default ~/.cache/caprese/vllm. The comparison with the installed release needs 0.32.
"""

import ast
import importlib.util
import inspect
import os
from pathlib import Path

import pytest

from caprese_vllm import compat
from tests.support.vllm_source import MISSING, VllmSource, fetch

ASKED = [version for version in os.environ.get("CAPRESE_VLLM_SOURCE", "").split(",") if version]
NOT_ASKED = "needs another release's source: set CAPRESE_VLLM_SOURCE=0.33.0, which fetches its wheel"

# Symbols whose code differs from the proven release's, by release, with the reason why that does not concern us. A seam
# or an overridden method that changes otherwise fails here, to be read first.
READ = {
    "0.33": {
        "vllm.engine.arg_utils.EngineArgs.add_cli_args": "more flags",
        "vllm.engine.arg_utils.EngineArgs.create_engine_config": "more fields; what we check is made as before",
        "vllm.model_executor.model_loader.base_loader.initialize_model": "substitutes experts of MoE models, refused",
        "vllm.lora.worker_manager.WorkerLoRAManager._load_adapter": "checks of classification heads",
        "vllm.v1.worker.gpu.model_runner.GPUModelRunner.execute_model": "encoder inputs, and drafts that no one needs",
        "vllm.v1.worker.gpu.model_runner.GPUModelRunner.capture_model": "adaptive verification, of draft models alone",
        "vllm.v1.core.sched.scheduler.Scheduler._get_local_prefix_cache_hit": "another limit, which ours passes on",
        "vllm.v1.core.sched.scheduler.Scheduler._handle_blocked_waiting_request": "another error of a bad grammar",
        "vllm.v1.core.sched.scheduler.Scheduler.schedule": "drafts, connectors and prompts' pace; ours calls it whole",
        "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator.cache_blocks": "another name for EAGLE's groups, refused",
        "vllm.compilation.breakable_cudagraph.eager_break_during_capture": "decides at the call, not when applied",
    }
}
# What we override or wrap beside SEAMS: a change of its code could change what ours must do.
OVERRIDDEN = (
    *(
        compat.Symbol("vllm.v1.core.sched.scheduler", f"Scheduler.{name}", ())
        for name in (
            *("add_request", "schedule", "reset_prefix_cache", "_get_local_prefix_cache_hit"),
            *("_handle_blocked_waiting_request", "_update_after_schedule"),
        )
    ),
    compat.Symbol("vllm.v1.core.kv_cache_coordinator", "KVCacheCoordinator.cache_blocks", ()),
    compat.Symbol("vllm.v1.core.kv_cache_coordinator", "KVCacheCoordinator.find_longest_cache_hit", ()),
    compat.Symbol("vllm.v1.core.kv_cache_manager", "KVCacheManager.create_kv_cache_blocks", ()),
    compat.Symbol("vllm.v1.worker.gpu.model_states.interface", "ModelState", ()),
    compat.Symbol("vllm.compilation.breakable_cudagraph", "eager_break_during_capture", ()),
    compat.Symbol("vllm.utils.torch_utils", "direct_register_custom_op", ()),
)


@pytest.fixture(scope="module")
def installed() -> VllmSource:
    spec = importlib.util.find_spec("vllm")
    assert spec
    assert spec.origin
    return VllmSource(Path(spec.origin).parents[1])


@pytest.fixture(scope="module", params=ASKED or [pytest.param("", marks=pytest.mark.skip(reason=NOT_ASKED))])
def release(request: pytest.FixtureRequest) -> tuple[str, VllmSource]:
    folder = Path(os.environ.get("CAPRESE_VLLM_CACHE") or Path.home() / ".cache/caprese/vllm")
    folder.mkdir(parents=True, exist_ok=True)
    return request.param, VllmSource(fetch(request.param, folder))


@pytest.mark.parametrize("symbol", [*compat.SEAMS, *compat.USES], ids=lambda symbol: symbol.path)
def test_reading_finds_what_importing_finds(installed: VllmSource, symbol: compat.Symbol) -> None:
    assert installed.problem(symbol) is None


@pytest.mark.parametrize(("module", "name", "needs"), [*MISSING.values(), ("vllm", "GONE", ())])
def test_reading_finds_what_is_missing(installed: VllmSource, module: str, name: str, needs: tuple[str, ...]) -> None:
    problem = installed.problem(compat.Symbol(module, name, needs))
    assert problem
    assert "gone" in problem.lower()


def test_a_release_has_every_symbol(release: tuple[str, VllmSource]) -> None:
    _, source = release
    problems = [source.problem(symbol) for symbol in (*compat.SEAMS, *compat.USES, *OVERRIDDEN)]
    assert not list(filter(None, problems))


def test_a_release_changes_nothing_unread(release: tuple[str, VllmSource], installed: VllmSource) -> None:
    version, source = release
    symbols = {symbol.path: symbol for symbol in (*compat.SEAMS, *OVERRIDDEN)}
    changed = {path for path, symbol in symbols.items() if source.text(symbol) != installed.text(symbol)}
    assert changed == set(READ[".".join(version.split(".")[:2])])


def test_a_release_calls_our_overrides_with_what_they_take(release: tuple[str, VllmSource]) -> None:
    """Every parameter of vLLM's method has a place in ours."""
    from caprese_vllm import scheduler

    _, source = release
    for symbol in OVERRIDDEN[:6]:
        module, _, method = symbol.name.partition(".")
        found = source.definition(symbol.module, module)
        assert found
        theirs = source.member(found[0], found[1], method)  # type: ignore[arg-type]
        assert theirs
        assert isinstance(theirs[0], ast.FunctionDef)
        given = [argument.arg for argument in theirs[0].args.args]
        for ours in (scheduler.CapreseScheduler, scheduler.CapreseAsyncScheduler):
            inspect.signature(getattr(ours, method)).bind(*given)


def test_releases_that_were_read_are_those_that_run() -> None:
    assert set(READ) == set(compat.READ_VLLM)
