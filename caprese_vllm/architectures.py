"""Where each architecture keeps its feed-forward (FF) blocks, and the proof that what lies there is one.

A block is y = down(act(up(x))): `up` holds the rows of W_g and W_1 (of W_1 alone without a gate), `down` those of W_2.
The table says where to look; nothing is taken on trust from it. When a model is built, the block's own forward is run
on values that can only be handed on, so a clamp, a multiplier or a norm inside is noticed and the block refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from caprese_kernels.config import UNGATED_ARCHITECTURES, BaseModelInfo
from caprese_kernels.errors import CapreseError
from caprese_kernels.packed import ACTIVATION_FUNCTIONS


@dataclass(frozen=True)
class Names:
    """The full name of a layer's block, {} being the layer's index, and of the parts in it."""

    block: str = "model.layers.{}.mlp"
    up: str = "gate_up_proj"
    act: str = "act_fn"
    down: str = "down_proj"
    gated: bool = True
    inline: bool = False  # the block is a decoder layer, whose forward does more than the FF block


# vLLM's own models whose blocks have the names of Llama's
_LIKE_LLAMA = """
    CohereForCausalLM Cohere2ForCausalLM Ernie4_5ForCausalLM Exaone4ForCausalLM GemmaForCausalLM Gemma2ForCausalLM
    Gemma3ForCausalLM Gemma4ForCausalLM Glm4ForCausalLM GraniteForCausalLM GraniteSWAForCausalLM
    HyperCLOVAXForCausalLM InternLM3ForCausalLM IQuestCoderForCausalLM LLaMAForCausalLM LlamaForCausalLM
    MiMoForCausalLM MiniCPMForCausalLM MiniCPM3ForCausalLM Ministral3ForCausalLM MistralForCausalLM OrionForCausalLM
    PanguEmbeddedForCausalLM Phi3ForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM SolarForCausalLM StableLmForCausalLM
    TeleChat3ForCausalLM TeleFLMForCausalLM
"""
# Those that vLLM serves with transformers' model, in which it fuses gate and up itself
_TRANSFORMERS = """
    CwmForCausalLM HunYuanDenseV1ForCausalLM OlmoForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM SeedOssForCausalLM
    SmolLM3ForCausalLM VaultGemmaForCausalLM
"""
_NAMES: dict[str, Names] = {
    **dict.fromkeys((_LIKE_LLAMA + _TRANSFORMERS).split(), Names()),
    "ExaoneForCausalLM": Names("transformer.h.{}.mlp", down="c_proj"),
    "InternLM2ForCausalLM": Names("model.layers.{}.feed_forward", down="w2"),
    "Plamo3ForCausalLM": Names("model.layers.layers.{}.mlp", act="act"),
    # Without a gate: config.UNGATED_ARCHITECTURES
    "GPT2LMHeadModel": Names("transformer.h.{}.mlp", "c_fc", "act", "c_proj"),
    "GPTJForCausalLM": Names("transformer.h.{}.mlp", "fc_in", "act", "fc_out"),
    "GPTNeoXForCausalLM": Names(up="dense_h_to_4h", act="act", down="dense_4h_to_h"),
    "OPTForCausalLM": Names("model.decoder.layers.{}", "fc1", "activation_fn", "fc2", inline=True),
    "PhiForCausalLM": Names(up="fc1", act="activation_fn", down="fc2"),
    "Starcoder2ForCausalLM": Names(up="c_fc", act="act", down="c_proj"),
}
ARCHITECTURES = {name: replace(names, gated=name not in UNGATED_ARCHITECTURES) for name, names in _NAMES.items()}


@dataclass(frozen=True, eq=False)
class Block:
    """vLLM's layers of one FF block: z = act(up(x)), y = down(z)."""

    name: str
    layer: int
    module: nn.Module
    names: Names
    up: Any  # ColumnParallelLinear
    act: nn.Module
    down: Any  # RowParallelLinear
    activation: str  # a key of ACTIVATION_FUNCTIONS

    def run(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The original block: its output, z [T, F], and what goes into the activation, [T, 2F] with a gate."""
        u = _apply(self.up, x)
        z = _apply(self.act, u)
        return _apply(self.down, z), z, u

    def holds(self, name: str) -> bool:
        """Whether the module of that full name is part of the block."""
        if self.names.inline:
            return name in (f"{self.name}.{self.names.up}", f"{self.name}.{self.names.down}")
        return name.startswith(f"{self.name}.")

    def take_over(self, forward: Callable[[Tensor], Tensor]) -> None:
        """Have the model compute `forward` in the block's place. Modules and parameters keep their names."""
        if not self.names.inline:
            self.module.forward = forward
            return
        # vLLM keeps one activation of a kind for all layers: this layer gets another, the shared one stays as it is.
        setattr(self.module, self.names.act, nn.Identity())
        self.up.forward = lambda x: _returned(self.up, x)
        self.down.forward = lambda x: _returned(self.down, forward(x))


def find_block(model: nn.Module, layer: int, served: BaseModelInfo) -> Block:
    """The FF block of one layer of the model `served`; CapreseError if it is none, or does more than one."""
    names = ARCHITECTURES[served.architecture]
    name = names.block.format(layer)
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise _refused(layer, names, "no such module") from None
    up, act, down = (getattr(module, part, None) for part in (names.up, names.act, names.down))
    kind = MergedColumnParallelLinear if names.gated else ColumnParallelLinear
    if not (isinstance(up, kind) and isinstance(act, nn.Module) and isinstance(down, RowParallelLinear)):
        raise _refused(layer, names, type(module).__name__)
    if not (type(up.quant_method) is type(down.quant_method) is UnquantizedLinearMethod):
        raise _refused(layer, names, f"weights handled by {type(up.quant_method).__name__}")
    sizes = [up.input_size, *getattr(up, "output_sizes", [up.output_size]), down.input_size, down.output_size]
    depth, neurons = served.hidden_size, served.intermediate_size
    if sizes != [depth, *[neurons] * (2 if names.gated else 1), neurons, depth]:
        raise _refused(layer, names, f"{type(module).__name__} of sizes {sizes}")
    if up.skip_bias_add or down.skip_bias_add or not _is_chain(module, names):
        raise _refused(layer, names, f"{type(module).__name__}, whose forward does something else")
    activation = activation_of_module(act, names.gated)
    if activation is None:
        raise _refused(layer, names, f"activation {type(act).__name__}")
    return Block(name, layer, module, names, up, act, down, activation)


def activation_of_module(act: nn.Module, gated: bool) -> str | None:
    """The key of ACTIVATION_FUNCTIONS that the module computes, found by comparing values; None for another function.

    Configs are no help: Gemma's says "gelu" where vLLM, rightly, computes "gelu_pytorch_tanh".
    """
    gate = 50 * torch.linspace(-1.0, 1.0, 2001, dtype=torch.float32, device="cpu")[None] ** 3  # many near zero
    up = 50 - gate.abs() if gated else torch.ones_like(gate)
    native = getattr(act, "forward_native", act)  # vLLM's definition of a custom op
    found = native(torch.cat([gate, up], dim=1) if gated else gate)
    for name, function in ACTIVATION_FUNCTIONS.items():
        if torch.allclose(found, function(gate) * up, rtol=1e-5, atol=1e-4):  # both kinds of GELU differ by 0.02
            return name
    return None


class _Value:
    """Stands for a tensor outside the block, where a layer adds its residual."""

    def __add__(self, other: _Value) -> _Value:
        return _Value() if isinstance(other, _Value) else NotImplemented

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Some of transformers' blocks end with one; models in vLLM are in eval mode, where it does nothing.
        return args[0] if function is torch.nn.functional.dropout else NotImplemented


class _Stub(nn.Module):
    """Takes one certain value (None: any _Value) and gives another; counts its calls."""

    def __init__(self, takes: object, gives: object):
        super().__init__()
        self.takes, self.gives, self.calls = takes, gives, 0

    def forward(self, *args: object, **kwargs: object) -> object:
        self.calls += 1
        given = [*args, *kwargs.values()]
        if not (all(isinstance(v, _Value) for v in given) if self.takes is None else given == [self.takes]):
            raise TypeError("not the value expected here")
        return self.gives


def _is_chain(module: nn.Module, names: Names) -> bool:
    """Whether the module's forward is down(act(up(x))), each called once, and nothing else.

    It runs with stubs for the three. What they hand on has no operations, so anything else that is done to it fails.
    An inline block may do what it likes around the three: all its other parts are stubs too.
    """
    x, y, u, z = _Value(), _Value(), object(), object()
    children = dict(module.named_children())
    up, down = children[names.up], children[names.down]
    chain = {
        names.up: _Stub(None if names.inline else x, _returned(up, u)),
        names.act: _Stub(u, z),
        names.down: _Stub(z, _returned(down, y)),
    }
    around = {name: _Stub(None, _Value()) for name in children} if names.inline else {}
    module._modules.update(around | chain)
    try:
        result = module.forward(x)
    except Exception:  # whatever a value without operations makes of the forward
        return False
    finally:
        module._modules.update(children)
    once = all(stub.calls == 1 for stub in chain.values())
    return once and (isinstance(result, _Value) if names.inline else result is y)


def _apply(layer: nn.Module, x: Any) -> Any:
    """The layer's own forward, also where `take_over` shows the model another."""
    y = type(layer).forward(layer, x)
    return y[0] if isinstance(y, tuple) else y


def _returned(linear: Any, y: Any) -> Any:
    """As the layer returns it to vLLM's models (with a bias to add later, which is none) or to transformers'."""
    return (y, None) if linear.return_bias else y


def _refused(layer: int, names: Names, found: str) -> CapreseError:
    return CapreseError(
        f"FF block of layer {layer}",
        expected=f"{names.block.format(layer)} with unquantized {names.up}, {names.act} and {names.down}",
        found=found,
        fix="serve a supported architecture without quantization",
    )
