"""The contract with vLLM: every symbol that we wrap exists as we expect it, and absence is told by name."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from caprese_kernels.errors import CapreseError
from caprese_vllm import compat


@pytest.mark.parametrize("seam", compat.SEAMS, ids=lambda seam: seam.name)
def test_vllm_has_the_symbol(seam: compat.Seam) -> None:
    compat.check(seam)
    assert seam.why
    assert seam.until


@pytest.mark.parametrize(
    "seam",
    [
        compat.Seam("vllm.engine.arg_utils", "EngineArgs.gone", (), "", ""),
        compat.Seam("vllm.engine.gone", "EngineArgs.add_cli_args", (), "", ""),
        compat.Seam("vllm.engine.arg_utils", "EngineArgs.add_cli_args", ("gone",), "", ""),
    ],
    ids=["symbol", "module", "parameter"],
)
def test_a_missing_symbol_is_named(seam: compat.Seam) -> None:
    with pytest.raises(CapreseError, match=r"gone"):
        compat.wrap(seam, lambda original: original())


def test_wrapping_twice_wraps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("caprese_fake_module")
    module.f = lambda x: x
    monkeypatch.setitem(sys.modules, module.__name__, module)
    seam = compat.Seam(module.__name__, "f", ("x",), "", "")
    for _ in range(2):
        compat.wrap(seam, lambda original, x: original(x) + 1)
    assert module.f(1) == 2


INSTALLED_ONLY = """
import logging, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
load_general_plugins()
from caprese_vllm import compat
config = EngineArgs(model=sys.argv[1], max_model_len=64).create_engine_config()
assert "caprese" not in config.additional_config
assert config.cache_config.enable_prefix_caching
assert not config.parallel_config.worker_extension_cls
import vllm.v1.worker.gpu.model_runner
touched = {s.name for s in compat.SEAMS if hasattr(getattr(s.owner(), s.attribute), "__caprese__")}
assert touched == {"EngineArgs.add_cli_args", "EngineArgs.create_engine_config"}, touched
assert "caprese_vllm.worker" not in sys.modules and "caprese_vllm.enable" not in sys.modules
"""


def test_installed_is_not_enabled(model_dir: Callable[[str], Path]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", INSTALLED_ONLY, str(model_dir("llama"))],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "aprese" not in run.stdout + run.stderr
