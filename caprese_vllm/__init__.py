"""The vLLM plugin: FF blocks that run sparse, with a distilled low-rank layer, for generated tokens."""

from caprese_kernels import __version__

__all__ = ["__version__"]
