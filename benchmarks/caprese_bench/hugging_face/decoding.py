"""Greedy answers of a Hugging Face model whose FF blocks are sparse while it generates: accuracy without an engine.

Starting an engine for each setting would take longer than a small model takes to answer, and an engine runs only the
methods that it serves. Prompts of equal length form a batch, so nothing is padded and no request affects another:

    ff = adapter_blocks(Adapters.load("adapters.safetensors"))
    answers = decode(model, tokenizer, problems, ff)
    score(tokenizer, problems, answers["math"])
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from caprese_kernels.adapters import Adapters
from caprese_kernels.config import Method, method_of
from caprese_kernels.selection import LayerSelector
from caprese_serve.demo.problems import Problem, chat, grade
from caprese_serve.demo.results import Score

MAX_TOKENS = 160  # of an answer, as in `caprese demo`
BATCH = 256


class FeedForward(Protocol):
    """Replaces one layer's FF block while answers are generated. Its state belongs to the current batch."""

    def prompt(self, block: Any, x: Tensor) -> Tensor:
        """FF(x) of whole prompts, x [B, S, D], by the original block; begins a batch and selects what `token` keeps."""

    def token(self, block: Any, x: Tensor) -> Tensor:
        """The sparse block for one generated token of each request, x [B, 1, D]."""

    def keep_requests(self, rows: Tensor) -> None:
        """Keep only these requests of the batch, [<= B] int64; the others have ended."""


def activations(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """g = act(x W_g) and z = g * (x W_1) (eq. 1) of a transformers block with gate_proj, up_proj and act_fn."""
    g = block.act_fn(block.gate_proj(x))
    return g, g * block.up_proj(x)


class SparseFF:
    """Eq. 9 and 10 with the selections of `caprese_kernels.selection`; without L and R the plain method.

    `left` is [D, r] and `right` [r, D], in the model's dtype; `prior` [F] float32, where the method needs one.
    `selection` comes from the prompts: GRIFFIN's masks [B, F] bool, or CATS' thresholds [B] float32.
    """

    def __init__(
        self, method: Method, left: Tensor | None = None, right: Tensor | None = None, prior: Tensor | None = None
    ):
        self.method, self.left, self.right, self.prior = method, left, right, prior
        self.selection = torch.empty(0)
        self._selector: LayerSelector | None = None  # once the block is known, whose W_2 a weighted score needs

    def prompt(self, block: Any, x: Tensor) -> Tensor:
        g, z = activations(block, x)
        selector = self._selector_for(block)
        self.selection = torch.stack([selector.from_prompt(*each) for each in zip(g, z, strict=True)])
        return block.down_proj(z)

    def token(self, block: Any, x: Tensor) -> Tensor:
        g, z = activations(block, x)
        y = block.down_proj(torch.where(self.keep(g), z, 0))
        return y if self.left is None or self.right is None else y + x @ self.left @ self.right

    def keep(self, g: Tensor) -> Tensor:
        """Neurons kept by generated tokens, bool [B, 1, F], from their g [B, 1, F] and the selection."""
        assert self._selector is not None
        return self._selector.keeps(self.selection, g[:, 0])[:, None]

    def keep_requests(self, rows: Tensor) -> None:
        self.selection = self.selection[rows]

    def _selector_for(self, block: Any) -> LayerSelector:
        if self._selector is None:
            rows = block.down_proj.weight.detach().t()
            scale = rows.float().norm(dim=1) if self.method.weighted else None
            prior = self.prior if self.prior is None else self.prior.to(rows.device)
            self._selector = LayerSelector(self.method, len(rows), scale, prior)
        return self._selector


def adapter_blocks(
    adapters: Adapters, method: Method | None = None, dtype: torch.dtype | None = None
) -> dict[int, FeedForward]:
    """Each sparse layer's block with its L, R and prior, by layer.

    `method` replaces the file's own, as a `--caprese-config` may; `dtype` is the model's, that of L and R by default.
    """
    method = method or method_of(adapters.config)

    def part(tensors: Mapping[int, Tensor], layer: int) -> Tensor | None:
        return tensors[layer].to(dtype or tensors[layer].dtype) if layer in tensors else None

    return {
        i: SparseFF(method.at(i), part(adapters.left, i), part(adapters.right, i), adapters.prior.get(i))
        for i in method.layers
    }


def prompt_ids(tokenizer: Any, problem: Problem) -> list[int]:
    """The prompt's token ids, as `/v1/chat/completions` renders it."""
    return tokenizer.apply_chat_template(chat(problem.prompt), add_generation_prompt=True, return_dict=False)


@torch.inference_mode()
def decode(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    ff: Mapping[int, FeedForward] | None = None,
    max_tokens: int = MAX_TOKENS,
    advance: Callable[[int], object] = lambda count: None,
) -> list[list[int]]:
    """The tokens of the answer to each problem, without the eos token that ends it.

    `ff` replaces FF blocks by layer index; None is the original model. `advance` is called with the number of problems
    that were answered.
    """
    model.eval()
    blocks = {i: model.get_decoder().layers[i].mlp for i in ff or {}}
    by_length: dict[int, list[tuple[int, list[int]]]] = {}
    for index, problem in enumerate(problems):
        ids = prompt_ids(tokenizer, problem)
        by_length.setdefault(len(ids), []).append((index, ids))
    answers: list[list[int]] = [[] for _ in problems]
    for group in by_length.values():
        for start in range(0, len(group), BATCH):
            part = group[start : start + BATCH]
            made = _decode_batch(model, blocks, ff or {}, [ids for _, ids in part], max_tokens, tokenizer.eos_token_id)
            for (index, _), answer in zip(part, made, strict=True):
                answers[index] = answer
            advance(len(part))
    return answers


def score(tokenizer: Any, problems: Sequence[Problem], answers: Sequence[Sequence[int]]) -> Score:
    """Accuracy of the answers and its standard error, graded as by `caprese demo`."""
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return Score.of([grade(text, problem.answer) for text, problem in zip(texts, problems, strict=True)])


def _decode_batch(
    model: Any, blocks: Mapping[int, Any], ff: Mapping[int, FeedForward], prompts: list[list[int]], count: int, eos: int
) -> list[list[int]]:
    device = next(model.parameters()).device
    with _replaced(blocks, {i: each.prompt for i, each in ff.items()}):
        output = model(torch.tensor(prompts, device=device), use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    answers: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    with _replaced(blocks, {i: each.token for i, each in ff.items()}):
        for step in range(count):
            tokens = output.logits[:, -1].argmax(dim=1)
            running = tokens != eos
            for request, token in zip(live, tokens.tolist(), strict=True):
                if token != eos:
                    answers[request].append(token)
            if not running.all():
                rows = running.nonzero()[:, 0]
                live = [live[row] for row in rows.tolist()]
                tokens = tokens[rows]
                cache.batch_select_indices(rows)
                for each in ff.values():
                    each.keep_requests(rows)
            if not live or step + 1 == count:
                break
            output = model(tokens[:, None], past_key_values=cache, use_cache=True)
    return answers


@contextlib.contextmanager
def _replaced(blocks: Mapping[int, nn.Module], forwards: Mapping[int, Callable[..., Tensor]]) -> Iterator[None]:
    """Inside, the blocks compute these functions of (block, x); afterwards their class's forward is back."""
    for i, forward in forwards.items():
        blocks[i].forward = partial(forward, blocks[i])
    try:
        yield
    finally:
        for i in forwards:
            del blocks[i].forward
