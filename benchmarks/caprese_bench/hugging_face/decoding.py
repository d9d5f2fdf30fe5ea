"""Greedy answers of a Hugging Face model whose FF blocks are sparse while it generates: accuracy without an engine.

Starting an engine for each setting would take longer than a small model takes to answer, and an engine runs only the
methods that it serves. Prompts of equal length form a batch, so nothing is padded and no request affects another:

    ff = {i: SparseFF(method, left[i], right[i]) for i in method.layers}
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

from caprese_kernels.config import Method
from caprese_kernels.reference import CatsStatistic, griffin_count, griffin_select, griffin_statistic
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
    """Eq. 9 and 10 by the definitions of `caprese_kernels.reference`; without L and R plain GRIFFIN or CATS.

    `left` is [D, r] and `right` [r, D], in the model's dtype. `selection` comes from the prompts: GRIFFIN's masks
    [B, F] bool, or CATS' thresholds [B] float32.
    """

    def __init__(self, method: Method, left: Tensor | None = None, right: Tensor | None = None):
        self.method, self.left, self.right = method, left, right
        self.selection = torch.empty(0)

    def prompt(self, block: Any, x: Tensor) -> Tensor:
        g, z = activations(block, x)
        if self.method.name == "griffin":
            k = griffin_count(self.method.density, z.shape[-1])
            self.selection = griffin_select(torch.stack([griffin_statistic(each) for each in z]), k)
        else:
            self.selection = torch.stack([self._threshold(each) for each in g])
        return block.down_proj(z)

    def token(self, block: Any, x: Tensor) -> Tensor:
        g, z = activations(block, x)
        y = block.down_proj(torch.where(self.keep(g), z, 0))
        return y if self.left is None or self.right is None else y + x @ self.left @ self.right

    def keep(self, g: Tensor) -> Tensor:
        """Neurons kept by generated tokens, bool [B, 1, F], from their g [B, 1, F] and the selection."""
        if self.method.name == "griffin":
            return self.selection[:, None]
        return g.abs().float() >= self.selection[:, None, None]

    def keep_requests(self, rows: Tensor) -> None:
        self.selection = self.selection[rows]

    def _threshold(self, g: Tensor) -> Tensor:
        statistic = CatsStatistic(g.numel(), g.dtype)
        statistic.add(g)
        return statistic.threshold(self.method.density)


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
