"""What end-to-end training minimizes, and how it becomes gradients.

With h and h_s the last hidden states (after the final norm) of the original and of the student for one generated token,
and p, p_s the distributions of the next token that the head makes of them:

    hidden   ||h - h_s||^2                        the paper's eq. 8
    logits   KL(p || p_s), in nats                what decides the text that is generated
    both     KL(p || p_s) + ||h - h_s||^2 / ||h||^2

each averaged over the generated tokens. A vocabulary is large: distributions are made of LOGIT_ROWS tokens at a time,
and their gradient goes back to h_s before the next ones are made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Loss
from ..head import LOGIT_ROWS, Head, divergence


def backward(loss: Loss, student: Tensor, original: Tensor, head: Head | None, rows: int) -> float:
    """Add to the parameters' gradients that of sum(loss of each token) / `rows`; return this sum / `rows`.

    `student` and `original` [N, D] are the last hidden states of N generated tokens, of `rows` in the whole step.
    `head` may be None for "hidden".
    """
    if loss == "hidden":
        error = (student.float() - original.float()).square().sum() / rows
        error.backward()
        return error.item()
    assert head is not None
    total, gradients = 0.0, []
    for part, target in zip(student.split(LOGIT_ROWS), original.split(LOGIT_ROWS), strict=True):
        leaf = part.detach().requires_grad_()
        value = divergence(leaf, target, head) / rows
        if loss == "both":
            value = value + _relative_error(leaf, target) / rows
        value.backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
        total += value.item()
    student.backward(torch.cat(gradients))
    return total


def _relative_error(student: Tensor, original: Tensor) -> Tensor:
    """Sum over N tokens of ||h - h_s||^2 / ||h||^2."""
    original = original.float()
    return ((student.float() - original).square().sum(dim=1) / original.square().sum(dim=1)).sum()
