"""Entry point `vllm.general_plugins`: called in every vLLM process, enabled or not.

Only the standard library at import: vLLM swallows errors raised while it imports an entry point.
"""

import logging

_registered = False


def register() -> None:
    """Add our flags and our part of the engine's configuration. Without them nothing else is touched."""
    global _registered
    if _registered:
        return
    _registered = True
    from caprese_kernels.errors import CapreseError

    from . import flags

    try:
        flags.install()
    except CapreseError as error:  # a vLLM that we do not know must not fail because we are installed
        logging.getLogger("vllm.caprese").warning("Caprese is not available: %s", error)
