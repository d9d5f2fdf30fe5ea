"""What is trained is what is served: the student's last hidden states are the engine's on the same tokens."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from vllm import LLM

from caprese_distill.blocks import find_blocks, resolve_method
from caprese_distill.data.batches import Batch
from caprese_distill.data.samples import Sample
from caprese_distill.loading import load_model
from caprese_distill.selection import selectors_of
from caprese_distill.student import Student
from caprese_kernels.adapters import Adapters
from tests.support.engine import engine, generate, greedy
from tests.support.models import make_adapter, make_model

PROMPTS = [[5, 9, 200, 31, 77, 12, 250, 8], list(range(20, 63)), [299, 4, 4, 4, 150]]
NEW_TOKENS = 12


def hidden_states(llm: LLM, prompt: list[int]) -> tuple[list[int], Tensor]:
    """The greedy response, and what the head saw for each of its tokens, [NEW_TOKENS, D]."""
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    seen: list[Tensor] = []
    compute = model.compute_logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "compute_logits", lambda h, *args: (seen.append(h.clone()), compute(h, *args))[1])
        response = generate(llm, [prompt], greedy(NEW_TOKENS))[0]
    assert [len(h) for h in seen] == [1] * NEW_TOKENS
    return response, torch.cat(seen)


@pytest.mark.parametrize(("name", "method"), [("llama", "griffin"), ("qwen2", "cats"), ("gemma2", "cats")])
def test_hidden_states_equal_the_engines(tmp_path: Path, name: str, method: str) -> None:
    path = make_model(name, tmp_path / "model")
    file = make_adapter(path, tmp_path / "a.safetensors", method=method, density=0.4, layers=[0, 1, 3])
    adapters = Adapters.load(file)
    with engine(path, {"weights": str(file)}) as llm:
        served = [hidden_states(llm, prompt) for prompt in PROMPTS]
    samples = [
        Sample(torch.tensor([*prompt, *response[:-1]], dtype=torch.int32), len(prompt), line)
        for line, (prompt, (response, _)) in enumerate(zip(PROMPTS, served, strict=True))
    ]
    model = load_model(str(path), "float32").eval()
    info, resolved = resolve_method(model.config, "m", method, 0.4, adapters.config.rank, adapters.config.layers)
    blocks = find_blocks(model, info, resolved.layers)
    batch = Batch(samples, False)
    with (
        torch.no_grad(),
        Student(model, blocks, selectors_of(blocks, resolved), adapters.left, adapters.right) as student,
    ):
        original, trained = student.original(batch), student(batch)
    # The head sees the last prompt token, too; that one runs dense.
    expected = torch.cat([hidden[1:] for _, hidden in served])
    assert (original - expected).norm() > 0.02 * expected.norm()  # sparse and corrected is something else than dense
    torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-4)
