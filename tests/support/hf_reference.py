"""One request alone on a plain Hugging Face model, with the method written out from its definition.

Independent of the packages under test: nothing of them is imported here. Arithmetic is float32 throughout.
The prompt runs in one pass through the original feed-forward (FF) blocks while their activations are recorded;
then every generated token runs through the sparse block plus x L R, one token a pass, on the KV cache.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


@dataclass
class Generation:
    """What one request generated, and how near its choices were to falling otherwise."""

    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)  # lead of the best logit over the second, for each token
    logprobs: list[float] = field(default_factory=list)  # of each token, before `process`
    prompt_logprobs: list[float] = field(default_factory=list)  # of each prompt token but the first
    closest: float = math.inf  # the least relative distance of a neuron from being selected otherwise


# The parts of an FF block, by any of their names; `gate` is missing where there is none or where `up` holds both.
PARTS = {
    "gate": ("gate_proj",),
    "up": ("up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h", "fc_in"),
    "act": ("act_fn", "activation_fn", "act"),
    "down": ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out"),
}


class FeedForward:
    """The original FF block of a decoder layer; OPT's has no module of its own, its parts are the layer's."""

    def __init__(self, layer: nn.Module):
        self.inline = not hasattr(layer, "mlp")
        self.module: Any = layer if self.inline else layer.mlp
        children = dict(self.module.named_children())
        self.parts = {part: children[name] for part, names in PARTS.items() for name in names if name in children}
        self.fused = "gate_up_proj" in children

    def call(self, part: str, x: Tensor) -> Tensor:
        return type(self.parts[part]).forward(self.parts[part], x)  # its class's forward: `replaced` hides it

    def activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """g and z."""
        if self.fused:
            gate, up = self.call("up", x).chunk(2, dim=-1)
        elif "gate" in self.parts:
            gate, up = self.call("gate", x), self.call("up", x)
        else:
            g = self.call("act", self.call("up", x))
            return g, g
        g = self.call("act", gate)
        return g, g * up

    def down_norms(self) -> Tensor:
        """||w2_j|| of each neuron j, [F]."""
        weight = self.parts["down"].weight
        return weight.norm(dim=0 if isinstance(self.parts["down"], nn.Linear) else 1)  # GPT-2's Conv1D is transposed

    def down(self, z: Tensor) -> Tensor:
        return self.call("down", z)

    def replace(self, forward: Callable[[Tensor], Tensor]) -> None:
        if self.inline:
            self.parts["up"].forward = self.parts["act"].forward = lambda x: x
            self.parts["down"].forward = forward
        else:
            self.module.forward = forward

    def restore(self) -> None:
        """The classes' own methods show again."""
        for module in self.parts.values() if self.inline else [self.module]:
            del module.forward


@dataclass(frozen=True)
class Shared:
    """How a selection weighs neurons, and what of it all requests share; as it is, the paper's method."""

    score: str = "paper"  # or weighted: |z_ij| ||w2_j||, and for CATS |g_j| ||w2_j||
    weight: float = 0.0  # lambda, of the prior
    core: float = 0.0  # kappa
    priors: Mapping[int, Tensor] = field(default_factory=dict)  # [F] of each layer


@dataclass
class SparseBlock:
    """One request's state at one FF block."""

    ff: "FeedForward"
    method: str
    density: float
    left: Tensor | None
    right: Tensor | None
    tp: int = 1
    shared: Shared = field(default_factory=Shared)
    prior: Tensor | None = None
    generating: bool = False
    keep: Tensor | None = None  # GRIFFIN: [F] bool
    tau: Tensor | None = None  # CATS
    tokens_seen: int = 0
    closest: float = math.inf

    def forward(self, x: Tensor) -> Tensor:
        g, z = self.ff.activations(x)
        if not self.generating:
            self.choose(g.flatten(0, -2), z.flatten(0, -2))
            return self.ff.down(z)
        keep = self.keep
        if self.tau is not None:
            magnitudes = self.scaled(g).abs()
            keep = magnitudes >= self.tau
            if self.tau > 0:  # a ReLU's zeros are exact
                self.closest = min(self.closest, float(((magnitudes - self.tau).abs() / self.tau).min()))
        y = self.ff.down(torch.where(keep, z, torch.zeros_like(z)))
        if self.left is not None and self.right is not None:
            y = y + (x @ self.left) @ self.right
        return y

    def scaled(self, values: Tensor) -> Tensor:
        """g or z as the score counts them."""
        return values * self.ff.down_norms() if self.shared.score == "weighted" else values

    def choose(self, g: Tensor, z: Tensor) -> None:
        """From g, z [S, F] of the whole prompt."""
        if self.method == "griffin":
            z = self.scaled(z)
            norms = z.norm(dim=1, keepdim=True)
            relative = torch.where(norms > 0, z / norms, torch.zeros_like(z))
            statistic = relative.square().sum(dim=0).tolist()
            assert len(statistic) % self.tp == 0
            size = len(statistic) // self.tp
            self.keep = torch.zeros(len(statistic), dtype=torch.bool)
            for start in range(0, len(statistic), size):
                self.choose_among(range(start, start + size), statistic)
        else:
            # Linear interpolation between order statistics, as torch.quantile's default.
            self.tau = torch.quantile(self.scaled(g).abs().flatten(), 1.0 - self.density)
        self.tokens_seen += len(g)

    def choose_among(self, neurons: range, statistic: list[float]) -> None:
        """Core, then tail, of one device's neurons."""
        assert self.keep is not None
        k = int(self.density * len(neurons))
        size, lead = 0, self.shared.weight
        if self.prior is not None:
            prior = self.prior.tolist()
            by_prior = sorted(neurons, key=lambda j: (-prior[j], j))
            size = int(self.shared.core * k)
            self.keep[by_prior[:size]] = True
            if lead:
                own, whole = sum(statistic[j] for j in neurons), sum(prior[j] for j in neurons)
                statistic = list(statistic)
                for j in neurons:
                    statistic[j] = (1 - lead) * statistic[j] / own + lead * prior[j] / whole
        rest = [j for j in neurons if not self.keep[j]]
        best_first = sorted(rest, key=lambda j: (-statistic[j], j))
        count = k - size
        self.keep[best_first[:count]] = True
        if 0 < count < len(rest):
            last, first = statistic[best_first[count - 1]], statistic[best_first[count]]
            # A ReLU's zeros are exact.
            self.closest = min(self.closest, (last - first) / last if last > 0 else math.inf)


class HFReference:
    """A model, loaded once, that answers one request at a time by greedy search."""

    def __init__(self, model_dir: Path):
        # Eager attention is the one implementation that has all of Gemma 2's soft caps.
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        decoder = self.model.get_decoder()
        self.blocks = [FeedForward(layer) for layer in (decoder.layers if hasattr(decoder, "layers") else decoder.h)]

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        eos: int | None = None,
        method: str | None = None,
        density: float | Mapping[int, float] = 0.5,
        layers: Sequence[int] | None = None,
        left: Mapping[int, Tensor] | None = None,
        right: Mapping[int, Tensor] | None = None,
        forced: Sequence[int] | None = None,
        tp: int = 1,
        process: Callable[[list[int], Tensor], Tensor] | None = None,
        shared: Shared | None = None,
        reselect: int | None = None,
    ) -> Generation:
        """`method` None is the original model. `layers` None is the method's default. `density` may be by layer.

        `tp` devices hold an equal part of the neurons each, in order, and GRIFFIN selects on each among its own.
        After `reselect` sparse tokens, again and again, the whole text so far runs anew as a prompt, without a cache.

        The best token is chosen from `process(tokens generated so far, logits [V])`.

        With `forced` these tokens are generated, whatever the logits say, and `logprobs` are those of the logits.
        """
        states: dict[int, SparseBlock] = {}
        if method is not None:
            if layers is None:
                layers = range(len(self.blocks) // 2 if method == "griffin" else len(self.blocks))
            shared = shared or Shared()
            states = {
                i: SparseBlock(
                    *(self.blocks[i], method, density[i] if isinstance(density, Mapping) else density),
                    *((left or {}).get(i), (right or {}).get(i), tp),
                    *(shared, shared.priors.get(i)),
                )
                for i in layers
            }
        for i, state in states.items():
            self.blocks[i].replace(state.forward)
        try:
            result = self._generate(list(prompt_ids), max_new_tokens, eos, states, forced, process, reselect)
        finally:
            for i in states:
                self.blocks[i].restore()
        result.closest = min((state.closest for state in states.values()), default=math.inf)
        return result

    def _generate(
        self,
        prompt: list[int],
        count: int,
        eos: int | None,
        states: Mapping[int, SparseBlock],
        forced: Sequence[int] | None,
        process: Callable[[list[int], Tensor], Tensor] | None,
        reselect: int | None,
    ) -> Generation:
        result = Generation()
        output = self._prefill(prompt, states)
        at = torch.arange(len(prompt) - 1)
        result.prompt_logprobs = output.logits[0].log_softmax(dim=1)[at, prompt[1:]].tolist()
        steps = 0  # since the prompt's pass
        while True:
            logits = output.logits[0, -1]
            best = (logits if process is None else process(result.tokens, logits.clone())).topk(2)
            token = int(best.indices[0]) if forced is None else forced[len(result.tokens)]
            result.tokens.append(token)
            result.margins.append(float(best.values[0] - best.values[1]))
            result.logprobs.append(float(logits.log_softmax(dim=0)[token]))
            if len(result.tokens) == count or token == eos:
                return result
            steps += 1
            if reselect and steps % (reselect + 1) == 0:
                output = self._prefill([*prompt, *result.tokens], states)
            else:
                output = self.model(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)

    def _prefill(self, text: list[int], states: Mapping[int, SparseBlock]) -> Any:
        """The original model on a text, from which the blocks select."""
        for state in states.values():
            state.generating, state.tokens_seen = False, 0
        output = self.model(torch.tensor([text]), use_cache=True)
        for state in states.values():
            assert state.tokens_seen == len(text), "the statistic must come from the text, all of it, once"
            state.generating = True
        return output
