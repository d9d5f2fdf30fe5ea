"""`caprese doctor` refuses in one line what no engine would take, before it starts one."""

from __future__ import annotations

from pathlib import Path

import pytest

from caprese_kernels.errors import CapreseError
from caprese_serve import doctor


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ('{"model": "x"}', "expected no model: .*; found model"),
        ('{"additional_config": {}}', "expected no additional_config: .*; found additional_config"),
        ("[]", "expected a JSON object; found list"),
        ('{"dtyp": "float32", "max_model_len": 64}', "found 'dtyp'; write dtype"),
    ],
)
def test_wrong_engine_options(tmp_path: Path, engine: str, message: str) -> None:
    with pytest.raises(CapreseError, match=f"^--engine: .*{message}"):
        doctor.examine(str(tmp_path), engine=engine)


def test_a_plugin_that_is_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(CapreseError, match=r"^VLLM_PLUGINS: expected a list with caprese, or none; found 'other'"):
        doctor.examine(str(tmp_path))


def test_an_engine_that_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CapreseError, match=r"^doctor: expected an engine that starts and checks its blocks; found "):
        doctor.examine(str(tmp_path))
