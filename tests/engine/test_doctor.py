"""The start-up check and `caprese doctor`, in a real engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from caprese_kernels import cpu
from caprese_kernels.errors import CapreseError
from caprese_serve import doctor
from tests.support.engine import engine, generate, greedy
from tests.support.models import make_adapter, make_model
from tests.support.quick_start import quick_start

OPTIONS = '{"dtype": "float32", "kv_cache_memory_bytes": 67108864, "disable_log_stats": true}'


@pytest.mark.parametrize("method", ["griffin", "cats"])
def test_doctor_examines_every_layer(tmp_path: Path, method: str) -> None:
    model = make_model("llama", tmp_path / "model")
    weights = make_adapter(model, tmp_path / "a.safetensors", method)
    with quick_start():
        report = doctor.examine(str(model), str(weights), OPTIONS)
    assert report["passed"]
    assert [block["layer"] for block in report["blocks"]] == report["layers"]
    assert all(0 <= block["sparse"] < 1e-4 and 0 <= block["dense"] < 1e-4 for block in report["blocks"])
    assert "all right" in str(doctor.render(report)[-1])


def test_wrong_kernels_do_not_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that forgets the low-rank layer: refused, unless the check is switched off."""
    model = make_model("llama", tmp_path / "model")
    weights = make_adapter(model, tmp_path / "a.safetensors", "griffin")
    right = cpu.griffin_ff

    def wrong(x: torch.Tensor, ff: Any, *rest: Any, **options: Any) -> torch.Tensor:
        return right(x, ff.without_low_rank(), *rest, **options)

    monkeypatch.setattr(cpu, "griffin_ff", wrong)
    refused = pytest.raises(CapreseError, match=r"kernel 'cpu' on layer 0: .* `caprese doctor`")
    with refused, engine(model, {"weights": str(weights)}):
        pass
    with engine(model, {"weights": str(weights), "start_up_check": False}) as llm:
        assert generate(llm, [[1, 2, 3]], greedy(4))


def test_an_adapter_that_is_replaced_after_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from caprese_vllm.state import State

    model = make_model("llama", tmp_path / "model")
    weights = make_adapter(model, tmp_path / "a.safetensors", "griffin")
    fill = State.fill_adapters

    def replaced(self: State) -> None:
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        fill(self)

    monkeypatch.setattr(State, "fill_adapters", replaced)
    refused = pytest.raises(CapreseError, match="expected the file that start-up checked")
    with refused, engine(model, {"weights": str(weights)}):
        pass
