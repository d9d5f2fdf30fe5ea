"""The README's installation from a git address, with this checkout as the address."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.markdown import ROOT, code_blocks

PACKAGES = {"caprese_kernels", "caprese_distill", "caprese_serve", "caprese_bench", "caprese_vllm"}


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="not a git checkout")
def test_pip_installs_from_the_readmes_address(tmp_path: Path) -> None:
    """The last commit's tree, without its dependencies, into a folder of its own."""
    (line,) = {
        line.partition(" #")[0].strip()
        for block in code_blocks(ROOT / "README.md")
        for line in block.text.splitlines()
        if "git+$REPOSITORY" in line
    }
    assert line.startswith("pip install ")
    options = f"--no-deps --no-build-isolation --quiet --disable-pip-version-check --target {tmp_path / 'site'}"
    script = line.replace("pip install", f'"{sys.executable}" -m pip install {options}', 1)
    env = os.environ | {"REPOSITORY": f"file://localhost{ROOT}"}  # pip 23 refuses git+file:///
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    installed = {path.name for path in (tmp_path / "site").iterdir()}
    assert installed >= PACKAGES
    demo = [sys.executable, "-c", "from caprese_serve.demo import *; print(ADAPTERS['cats'].is_file(), MODEL.is_dir())"]
    shown = subprocess.run(
        demo, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True
    )
    assert shown.stdout == "True True\n", shown.stderr
