"""The project's distributions, built once for all tests of this folder from a copy of the tree."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.packaging import NOT_COPIED, ROOT, Caprese, build


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, for what a build leaves behind."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("tree") / "source", ignore=NOT_COPIED))


@pytest.fixture(scope="session")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed, and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*command, str(wheel)], check=True, timeout=300)
    return folder


@pytest.fixture
def caprese(site: Path, tmp_path: Path) -> Caprese:
    """Runs the wheel's console script in an empty folder; packages of the extras can be made missing.

    The dependencies are those of this environment. Its own installation of the project, if it has one, comes later on
    the path than the wheel's.
    """
    folder = tmp_path / "empty"
    folder.mkdir()

    def run(*arguments: str, without: tuple[str, ...] = (), timeout: float = 120) -> subprocess.CompletedProcess[str]:
        absent = tmp_path / "absent"
        absent.mkdir(exist_ok=True)
        # Python imports sitecustomize when it starts; a module that is None cannot be imported.
        (absent / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({without}))")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        environment["PYTHONPATH"] = os.pathsep.join([str(absent), str(site)])
        command = [sys.executable, str(site / "bin" / "caprese"), *arguments]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run
