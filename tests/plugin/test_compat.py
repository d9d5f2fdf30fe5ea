"""The contract with vLLM: every symbol that we touch exists as we expect it, and an error names what is missing."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from caprese_kernels.errors import CapreseError
from caprese_vllm import compat
from tests.support.vllm_source import MISSING

SOURCES = sorted(Path(compat.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("symbol", [*compat.SEAMS, *compat.USES], ids=lambda symbol: symbol.path)
def test_vllm_has_the_symbol(symbol: compat.Symbol) -> None:
    compat.check(symbol)
    if isinstance(symbol, compat.Seam):
        assert symbol.why
        assert symbol.until


@pytest.mark.parametrize(("module", "name", "needs"), MISSING.values(), ids=MISSING)
def test_what_is_missing_is_named(module: str, name: str, needs: tuple[str, ...]) -> None:
    with pytest.raises(CapreseError, match=rf"vLLM's {module}\.{name}: .*gone"):
        compat.check(compat.Symbol(module, name, needs))
    with pytest.raises(CapreseError, match=r"gone"):
        compat.wrap(compat.Seam(module, name, needs, "", ""), lambda original: original())


def test_no_import_escapes_the_table() -> None:
    """And no line of the table outlives its use."""
    imported = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm":
                imported |= {f"{node.module}.{alias.name}" for alias in node.names}
            if isinstance(node, ast.Import):  # the bare package: only its version
                assert not [a.name for a in node.names if a.name.startswith("vllm.")], source
    known = {symbol.path for symbol in compat.USES}
    assert imported <= known, f"add a line to compat.py's table: {imported - known}"
    text = "\n".join(source.read_text() for source in SOURCES if source.name != "compat.py")
    stale = [f"{s.path}: {need}" for s in compat.USES for need in s.needs if not re.search(rf"\b{need}\b", text)]
    assert not stale


def test_another_version_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compat.check_version("0.32.0+cpu") is None
    monkeypatch.delenv("CAPRESE_ANY_VLLM", raising=False)
    for version in ("0.34.0", "0.3.2", "0.320.1", "0.3.3", "1.32.0", "dev"):
        with pytest.raises(CapreseError, match=rf"vLLM: expected version 0\.32.*found {version}"):
            compat.check_version(version)
    assert "vLLM 0.33.0 has every symbol" in str(compat.check_version("0.33.0"))
    monkeypatch.setenv("CAPRESE_ANY_VLLM", "1")
    assert "vLLM 0.34.0 has every symbol" in str(compat.check_version("0.34.0"))
    gone = compat.Symbol("vllm.v1.request", "Request", ("gone",))
    monkeypatch.setattr(compat, "USES", (*compat.USES, gone))
    for version in ("0.33.1", "0.34.0"):
        with pytest.raises(CapreseError, match=r"vllm\.v1\.request\.Request.*gone"):
            compat.check_version(version)


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
from tests.support.vllm_source import MISSING
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
