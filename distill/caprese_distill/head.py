"""From the last hidden state to logits, as the model's own forward pass computes them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_ROWS = 256  # tokens whose distributions, [LOGIT_ROWS, vocabulary] in float32, are held at once


class Head:
    """The output embeddings with what a model has between them and the softmax: a factor (Cohere, Granite), a cap
    (Gemma 2)."""

    def __init__(self, model: Any):
        self.embeddings = model.get_output_embeddings()
        config = model.config.get_text_config()
        self.scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
        self.cap = getattr(config, "final_logit_softcapping", None)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] float32 of the decoder's last hidden states [N, D]."""
        logits: Tensor = self.embeddings(hidden).float() * self.scale
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap


def divergence(student: Tensor, original: Tensor, head: Head) -> Tensor:
    """Sum over N tokens of KL(p || p_s), float32, from last hidden states [N, D]."""
    with torch.no_grad():
        likely = F.log_softmax(head(original), dim=-1)
    return F.kl_div(F.log_softmax(head(student), dim=-1), likely, reduction="sum", log_target=True)
