"""What every folder of tests may use: tiny models, written once a run, and the `caprese` command."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def restored_verbosity() -> Iterator[None]:
    """-q and -v of a verb that a test runs in this process are not the next one's."""
    yield
    from caprese_kernels import terminal

    terminal.set_verbosity(terminal.Verbosity.NORMAL)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model_dir("llama")`: the directory of that tiny model of tests/support/models.py."""
    from tests.support.models import make_model

    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_model(name, tmp_path_factory.mktemp("models") / name)
        return made[name]

    return get


@pytest.fixture
def inspected_in_process() -> Iterator[None]:
    """vLLM inspects architectures in this process."""
    from tests.support.quick_start import inspected_in_process

    with inspected_in_process():
        yield


@pytest.fixture
def caprese(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """`caprese("inspect", file)` runs in this process, as the console script does; returns the exit code."""
    from caprese_serve.cli import main

    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def call(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["caprese", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0)

    yield call
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
