"""Each package imports with its own extra alone; what every vLLM process imports stays light."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

# Imports every module of the package argv[1] while the packages argv[2:] cannot be imported.
IMPORT_ALL = """
import importlib, pkgutil, sys
for name in sys.argv[2:]:
    sys.modules[name] = None
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, sys.argv[1] + "."):
    importlib.import_module(module.name)
"""
# Imports argv[1:] and says what of the heavy packages came along.
IMPORT_LIGHT = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(*(name for name in ("vllm", "torch", "transformers", "openai", "pydantic", "rich") if name in sys.modules))
"""


def python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        ("caprese_kernels", ["vllm", "transformers", "openai", "httpx", "jinja2"]),
        ("caprese_distill", ["vllm", "openai", "fastapi"]),
        ("caprese_serve", ["vllm", "transformers", "jinja2", "fastapi"]),
    ],
)
def test_every_module_needs_only_its_own_extra(package: str, absent: list[str]) -> None:
    python(IMPORT_ALL, package, *absent)


def test_dependencies_point_one_way() -> None:
    allowed = {
        "caprese_kernels": set(),
        "caprese_distill": {"caprese_kernels"},
        "caprese_vllm": {"caprese_kernels"},
        "caprese_serve": {"caprese_kernels", "caprese_vllm", "caprese_distill", "caprese_bench"},  # the last two: verbs
        "caprese_bench": {"caprese_kernels", "caprese_vllm", "caprese_distill", "caprese_serve"},
    }
    for package, others in allowed.items():
        for path in Path(import_module(package).__path__[0]).rglob("*.py"):
            imported = set(re.findall(r"^\s*(?:from|import) (caprese_\w+)", path.read_text(), re.MULTILINE))
            assert imported <= others | {package}, path


def test_packages_without_any_extra() -> None:
    python(
        "import sys; sys.modules.update(dict.fromkeys(sys.argv[1:]))\n"
        "import caprese_kernels.adapters, caprese_distill, caprese_serve.cli, caprese_vllm.plugin",
        *("vllm", "transformers", "openai", "httpx", "jinja2", "fastapi", "triton"),
    )


def test_installing_the_plugin_costs_other_vllm_users_nothing() -> None:
    assert python(IMPORT_LIGHT, "caprese_vllm", "caprese_vllm.plugin") == ""


def test_the_command_starts_without_torch() -> None:
    loaded = python(IMPORT_LIGHT, "caprese_serve.cli").split()
    assert not {"vllm", "torch", "transformers", "openai"} & set(loaded)
