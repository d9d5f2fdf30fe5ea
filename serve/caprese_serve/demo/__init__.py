"""A tiny reasoning model, its adapters, and the comparison of sparse methods on it through vLLM."""

from pathlib import Path

MODEL = Path(__file__).with_name("model")
ADAPTERS = {method: Path(__file__).parent / "adapters" / f"{method}.safetensors" for method in ("griffin", "cats")}
