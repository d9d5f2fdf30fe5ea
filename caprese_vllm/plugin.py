"""Entry point `vllm.general_plugins`: called in every vLLM process, enabled or not.

Only the standard library at import: vLLM swallows errors raised while it imports an entry point.
"""

_registered = False


def register() -> None:
    """Add our flags and our part of the engine's configuration. Without them nothing else is touched."""
    global _registered
    if _registered:
        return
    _registered = True
    from . import flags

    flags.install()
