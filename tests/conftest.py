"""What every folder of tests may use: tiny models, written once a run."""

from collections.abc import Callable
from pathlib import Path

import pytest


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
def looked_at_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM looks at an architecture that is new to it in a process of its own, ten seconds each; this one will do."""
    from vllm.model_executor.models import registry

    look = registry._ModelInfo.from_model_cls
    monkeypatch.setattr(registry._LazyRegisteredModel, "inspect_model_cls", lambda self: look(self.load_model_cls()))
