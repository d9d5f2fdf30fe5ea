"""--config NAME=JSON: a variant of a benchmark that is served with a `--caprese-config` of the user's own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from caprese_kernels.adapters import find_adapter, read_config
from caprese_kernels.config import AdapterConfig, BaseModelInfo, CapreseConfig, Method, resolve
from caprese_kernels.errors import CapreseError


@dataclass(frozen=True)
class ConfiguredMethod:
    """What a NAME=JSON asks for: the method, its adapter, and the keys beside the adapter's own."""

    name: str
    method: Method
    settings: dict[str, Any]  # without `weights`
    adapter: Path | None
    adapter_config: AdapterConfig | None

    @property
    def adapter_digest(self) -> str | None:
        """Of the adapter's file: 16 hexadecimal digits of its SHA-256."""
        return None if self.adapter is None else sha256(self.adapter.read_bytes()).hexdigest()[:16]

    @property
    def caprese(self) -> dict[str, Any]:
        """All keys, as `additional_config["caprese"]` takes them."""
        return self.settings if self.adapter is None else {"weights": str(self.adapter)} | self.settings


def parse_config(text: str, model: BaseModelInfo) -> ConfiguredMethod:
    """Read a NAME=JSON for the model. Raises CapreseError for text that is not one, and for what cannot be served."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.-]+", name):
        raise CapreseError(
            "--config",
            expected="NAME=JSON, a name of letters, digits, '.', '-' and '_'",
            found=repr(text[:60]),
            fix='write for example --config \'tail={"weights": "adapters.safetensors", "core": 0.8}\'',
        )
    config = CapreseConfig.parse(value, f"--config {name}")
    adapter = None if config.weights is None else find_adapter(config.weights)
    adapter_config = None if adapter is None else read_config(adapter)
    method, _ = resolve(config, adapter_config, model)
    settings = config.model_dump(exclude_unset=True, exclude={"weights"})
    return ConfiguredMethod(name, method, settings, adapter, adapter_config)


def check_new(name: str, known: list[str]) -> None:
    """Raise CapreseError if another variant has that name."""
    if name in known:
        raise CapreseError("--config", expected="a new name", found=repr(name), fix="rename it")
