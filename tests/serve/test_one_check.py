"""A model that cannot be served is refused by distill, inspect and the server alike, in the same words."""

import json
import shutil
from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs

from caprese_distill.config import DistillConfig
from caprese_distill.job import Job
from caprese_kernels.errors import CapreseError
from caprese_serve.demo import MODEL
from caprese_serve.inspection import inspect
from caprese_vllm import plugin

ADAPTER = MODEL.parent / "adapters" / "griffin.safetensors"


def test_a_config_that_names_no_architecture(tmp_path: Path) -> None:
    plugin.register()
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    shutil.copytree(MODEL, model)
    config = json.loads((model / "config.json").read_text())
    del config["architectures"]
    (model / "config.json").write_text(json.dumps(config))
    data.write_text('{"prompt": "a", "response": "b"}\n' * 3)
    found = []
    for work in (
        lambda: Job(DistillConfig(model=str(model), data=str(data), rank=8)).plan(),
        lambda: inspect(str(ADAPTER), str(model)),
        lambda: EngineArgs(
            model=str(model), max_model_len=64, additional_config={"caprese": {"weights": str(ADAPTER)}}
        ).create_engine_config(),
    ):
        with pytest.raises(CapreseError) as caught:
            work()
        found.append(str(caught.value))
    assert len(set(found)) == 1
    assert found[0] == (
        f'model {model}: expected "architectures" in its config.json, as ["LlamaForCausalLM"]; found none; add the '
        "name of the model's class in transformers"
    )
