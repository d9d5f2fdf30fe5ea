"""The extension point for FF kernels of other packages.

A package registers a factory under a name, in an entry point of the group `vllm.general_plugins`, which vLLM calls in
every process before it reads the configuration:

    from caprese_vllm import ff_kernels

    def register() -> None:
        ff_kernels.register("mine", make_kernels)

`--caprese-config '{"kernel_extension": "mine"}'` selects it. While the model is built, each worker calls

    make_kernels(backend, method, blocks) -> Backend

once: `backend` is the implementation that the key `kernel` names, `method` the resolved method, `blocks` maps each
sparse layer of this process to its packed weights, whose storage is in place but not filled yet. What the factory
allocates counts as memory of the model. The backend that it returns computes the generated tokens and the statistics
of every sparse FF block from then on; its NAME is what the start-up line and GET /caprese report. Most wrap the given
one and replace only `griffin_ff` or `cats_ff`, with all of their parameters: y belongs into `out` if it is given, and
the counts into `kept`. `caprese_bench.lora.served` is an example. Where a selection has a core, `core_ff` computes it,
L and R from a view of the block, and `griffin_ff` the tails, from another view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from caprese_kernels.backend import Backend
from caprese_kernels.config import Method
from caprese_kernels.errors import CapreseError
from caprese_kernels.packed import PackedFF

Factory = Callable[[Backend, Method, Mapping[int, PackedFF]], Backend]


@dataclass(frozen=True)
class Extension:
    """A registered factory, and whether what it makes may be captured in full CUDA graphs."""

    factory: Factory
    cuda_graphs: bool


_extensions: dict[str, Extension] = {}


def register(name: str, factory: Factory, *, cuda_graphs: bool = False) -> None:
    """Offer the factory's kernels as `kernel_extension` `name`.

    `cuda_graphs`: on top of the Triton kernels they never synchronize and launch the same kernels on tensors that stay
    in place, whatever the data; without it the engine captures no full CUDA graphs. vLLM may call a plugin twice, so
    the same registration again changes nothing; another one under the same name raises CapreseError.
    """
    extension = Extension(factory, cuda_graphs)
    if _extensions.setdefault(name, extension) != extension:
        raise CapreseError(
            f"FF kernels {name!r}",
            expected="a name that is registered once",
            found="another factory of that name",
            fix="register them under another name, or drop one of the two plugins",
        )


def find(name: str) -> Extension:
    """The extension of that name; raises CapreseError if no plugin registered it."""
    if name not in _extensions:
        raise CapreseError(
            "key 'kernel_extension'",
            expected="a name that a vLLM plugin registered with caprese_vllm.ff_kernels",
            found=f"{name!r}; registered: {', '.join(sorted(_extensions)) or 'none'}",
            fix="install the plugin, and name it in VLLM_PLUGINS if that is set",
        )
    return _extensions[name]


def make(name: str | None, backend: Backend, method: Method, blocks: Mapping[int, PackedFF]) -> Backend:
    """The kernels that the engine runs: `backend` itself, or what the extension of that name makes of it.

    Raises CapreseError for kernels of an extension that cannot compute the method's core.
    """
    if name is None:
        return backend
    made = find(name).factory(backend, method, blocks)
    if method.has_core and not hasattr(made, "core_ff"):
        raise CapreseError(
            f"FF kernels {name!r}",
            expected="a function core_ff, for the core of a selection",
            found="none",
            fix="add it (caprese_kernels.reference.core_ff defines it), or serve without a core",
        )
    return made
