"""LoRA on the masked weights against matrices written out; the generic students against those of caprese_distill."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from caprese_bench.hugging_face.decoding import decode, prompt_ids
from caprese_bench.hugging_face.students import DecodedFF, EndToEnd, LayerWise, LowRank, held_out_errors
from caprese_bench.lora.training import Lora, begin, fit, lora_rank, tensors
from caprese_distill import checkpoint
from caprese_distill.blocks import find_blocks, resolve_method
from caprese_distill.data.batches import Batch
from caprese_distill.data.chat import ChatRenderer
from caprese_distill.data.rows import Row
from caprese_distill.data.samples import Sample, encode
from caprese_distill.end_to_end.train import Recipe, Trainer, distill_end_to_end
from caprese_distill.layer_wise.closed_form import distill_layer_wise
from caprese_distill.selection import selectors_of
from caprese_distill.student import Student, frozen
from caprese_kernels.config import BaseModelInfo, Method
from caprese_kernels.reference import CatsStatistic
from caprese_serve.demo import MODEL
from caprese_serve.demo.problems import TASKS, problems
from tests.support.distill import by_hand, make_samples, mlp_inputs

ModelDir = Callable[[str], Path]
CPU = torch.device("cpu")


def load(
    model_dir: ModelDir, method: str, name: str = "llama", layers: list[int] | None = None, dtype: Any = torch.float32
) -> tuple[Any, BaseModelInfo, Method]:
    model = AutoModelForCausalLM.from_pretrained(model_dir(name), dtype=dtype).eval()
    return model, *resolve_method(model.config, name, method, density=0.4, rank=8, layers=layers or [0, 2])


def demo() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(MODEL)


def stir(lora: Mapping[int, Lora], scale: float = 0.1) -> Mapping[int, Lora]:
    """B drawn instead of zero."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for each in lora.values():
            for b in each.b.values():
                b.copy_(torch.randn(b.shape, generator=draw) * scale)
    return lora


def equation_11(mlp: Any, lora: Lora, x: Tensor, keep: Tensor) -> Tensor:
    """FF~(x) of one token, x [D], keep [F], with every matrix of eq. 11 written out, [inputs, outputs]."""
    a, b = ({name: t.detach().double() for name, t in part.items()} for part in (lora.a, lora.b))
    keep = keep.double()
    gate, up = ((m.weight.t() * keep + a[n] @ b[n]) for n, m in (("gate", mlp.gate_proj), ("up", mlp.up_proj)))
    down = mlp.down_proj.weight.t() * keep[:, None] + a["down"] @ b["down"]
    bias = [0.0 if m.bias is None else m.bias for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    return (mlp.act_fn(x @ gate + bias[0] * keep) * (x @ up + bias[1] * keep)) @ down + bias[2]


@pytest.mark.parametrize("method", ["griffin", "cats"])
@pytest.mark.parametrize("name", ["llama", "llama-bias", "gemma2"])
@torch.no_grad()
def test_equation_11(model_dir: ModelDir, name: str, method: str) -> None:
    model, info, resolved = load(model_dir, method, name, dtype=torch.float64)
    lora, batch = stir(begin(info, resolved, 0, CPU)), Batch(make_samples(4), False)
    with LayerWise(model, info, resolved, lora) as student:
        targets, answers = (t.unflatten(1, (2, -1)) for t in (student.original(batch), student(batch)))
    expected: dict[int, list[Tensor]] = {0: [], 2: []}
    dense: dict[int, list[Tensor]] = {0: [], 2: []}
    for sample in batch.samples:
        inputs = mlp_inputs(model, sample)
        for i in (0, 2):
            mlp = model.model.layers[i].mlp
            x, _, y, keep = by_hand(mlp, inputs[i], sample.prompt_length, method, 0.4)
            if method == "cats":  # serving resolves the quantile to bfloat16 where the model is not float32
                g = mlp.act_fn(mlp.gate_proj(inputs[i]))
                statistic = CatsStatistic(sample.prompt_length * g.shape[1], g.dtype)
                statistic.add(g[: sample.prompt_length])
                tau = statistic.threshold(0.4)
                assert float(tau) == pytest.approx(float(g[: sample.prompt_length].abs().quantile(0.6)), rel=2**-8)
                keep = g[sample.prompt_length :].abs() >= tau
            assert 0 < keep.double().mean() < 0.7
            expected[i] += [equation_11(mlp, lora[i], *row) for row in zip(x, keep, strict=True)]
            dense[i] += list(y)
    for n, i in enumerate((0, 2)):
        torch.testing.assert_close(targets[:, n], torch.stack(dense[i]))
        torch.testing.assert_close(answers[:, n], torch.stack(expected[i]))
        assert (answers[:, n] - targets[:, n]).norm() > 0.1 * targets[:, n].norm()


@pytest.mark.parametrize(("depth", "neurons", "rank", "expected"), [(128, 512, 48, 6), (1536, 8960, 256, 25)])
def test_as_many_parameters(depth: int, neurons: int, rank: int, expected: int) -> None:
    sizes = {"hidden_size": depth, "intermediate_size": neurons, "num_hidden_layers": 4, "hidden_act": "silu"}
    info = BaseModelInfo(name_or_path="m", architecture="LlamaForCausalLM", **sizes)
    ours = 2 * depth * rank
    assert lora_rank(info, rank) == expected
    assert lora_rank(info, 1) == 1
    lora = begin(info, Method("cats", 0.5, (0, 3), rank), 0, CPU)
    assert set(lora) == {0, 3}
    count = sum(p.numel() for p in lora[0].parameters())
    assert count == 3 * expected * (depth + neurons)
    assert abs(count - ours) <= 3 * (depth + neurons) / 2


@pytest.mark.parametrize("method", ["griffin", "cats"])
@torch.no_grad()
def test_untrained_it_is_the_plain_method(model_dir: ModelDir, method: str) -> None:
    model, info, resolved = load(model_dir, method)
    batch, lora = Batch(make_samples(5), False), begin(info, resolved, 0, CPU)
    left, right = ({i: torch.zeros(shape) for i in resolved.layers} for shape in ((64, 1), (1, 64)))
    blocks = find_blocks(model, info, [0, 2])
    with Student(model, blocks, selectors_of(blocks, resolved), left, right) as plain:
        target, expected = plain.original(batch), plain(batch)
    with EndToEnd(model, info, resolved, lora) as student:
        torch.testing.assert_close(student.original(batch), target)
        torch.testing.assert_close(student(batch), expected)
    assert (expected - target).norm() > 0.01 * target.norm()
    assert "forward" not in model.model.layers[0].mlp.__dict__


@pytest.mark.parametrize("method", ["griffin", "cats"])
@pytest.mark.parametrize("stage", [LayerWise, EndToEnd])
def test_training_lowers_the_held_out_error(stage: Any, method: str) -> None:
    """And touches nothing but A and B. On the demo's model: random weights have little that can be learnt."""
    model, tokenizer = demo()
    info, resolved = resolve_method(model.config, "demo", method, density=0.3, rank=48, layers=[0, 1])
    rows = [Row(n, p.prompt, p.response) for task in TASKS for n, p in enumerate(problems(task, "train", 40))]
    samples, lora = encode(ChatRenderer(tokenizer), rows, 512)[0], begin(info, resolved, 0, CPU)
    before, start = ({k: t.clone() for k, t in d.items()} for d in (model.state_dict(), tensors(lora)))
    trainer = fit(stage, model, samples, info, resolved, lora, Recipe(5e-3, batch=8, epochs=3))
    assert len(trainer.errors) == 4
    assert trainer.errors[-1] < 0.95 * trainer.errors[0]
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(not torch.equal(t, start[k]) for k, t in tensors(lora).items())
    assert len(model.model.layers) == 4


def test_layers_are_trained_each_on_its_own(model_dir: ModelDir) -> None:
    model, info, both = load(model_dir, "griffin")
    samples, recipe = make_samples(20), Recipe(1e-2, batch=5, epochs=1)
    together = begin(info, both, 0, CPU)
    alone = {2: begin(info, both, 0, CPU)[2]}
    fit(LayerWise, model, samples, info, both, together, recipe)
    fit(LayerWise, model, samples, info, Method("griffin", 0.4, (2,), 8), alone, recipe)
    for name, t in alone[2].state_dict().items():
        torch.testing.assert_close(t, together[2].state_dict()[name])


@pytest.mark.parametrize("stage", [LayerWise, EndToEnd])
def test_a_killed_training_goes_on_to_the_same_bits(
    model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Any
) -> None:
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0.0)
    model, info, method = load(model_dir, "cats", layers=[0, 1])
    samples, recipe = make_samples(20), Recipe(1e-2, batch=4, epochs=2)
    whole, cut = (begin(info, method, 0, CPU) for _ in range(2))
    fit(stage, model, samples, info, method, whole, recipe)
    step = Trainer._step

    def killed(self: Trainer, part: list[Sample]) -> float:
        if self.step == 6:
            raise KeyboardInterrupt
        return step(self, part)

    monkeypatch.setattr(Trainer, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(stage, model, samples, info, method, cut, recipe, tmp_path / "resume")
    monkeypatch.setattr(Trainer, "_step", step)
    again = begin(info, method, 0, CPU)
    steps: list[int] = []
    monkeypatch.setattr(Trainer, "_report_step", lambda self, *_: steps.append(self.step))
    fit(stage, model, samples, info, method, again, recipe, tmp_path / "resume")
    assert 1 < steps[0] <= 7 <= steps[-1] == 10
    assert all(torch.equal(t, tensors(whole)[name]) for name, t in tensors(again).items())


@pytest.mark.parametrize("method", ["griffin", "cats"])
def test_held_out_errors_are_the_distillers(model_dir: ModelDir, method: str) -> None:
    model, info, resolved = load(model_dir, method)
    samples = make_samples(30)
    first = distill_layer_wise(model, samples, info, resolved)
    last = distill_end_to_end(model, samples, first, Recipe(1e-3, epochs=1))
    ff = {i: LowRank(first.left[i], first.right[i]) for i in resolved.layers}
    layer_wise, whole = held_out_errors(model, samples, info, resolved, ff)
    errors_after = [each["error_after"] for each in first.config.training["errors"].values()]
    assert layer_wise == pytest.approx(sum(errors_after) / 2, rel=1e-4)
    errors = last.config.training["end_to_end"]["held_out_errors"]
    assert whole == pytest.approx(errors[0], rel=1e-4)
    ff = {i: LowRank(last.left[i], last.right[i]) for i in resolved.layers}
    assert held_out_errors(model, samples, info, resolved, ff)[1] == pytest.approx(min(errors), rel=1e-4)


@pytest.mark.parametrize("name", ["griffin", "cats"])
@torch.no_grad()
def test_greedy_answers_are_the_trained_students(name: str) -> None:
    """Every token decoded is the likeliest after the hidden state that `EndToEnd` gives the token before it."""
    model, tokenizer = demo()
    info, method = resolve_method(model.config, "demo", name, density=0.05, rank=48, layers=[0, 1, 2, 3])
    asked = [*problems("math", "test", 6), *problems("reading", "test", 4)]
    lora: Mapping[int, nn.Module] = stir(begin(info, method, 0, CPU), 0.5)
    answers = decode(model, tokenizer, asked, {i: DecodedFF(method, each) for i, each in lora.items()}, max_tokens=24)
    assert answers != decode(model, tokenizer, asked, max_tokens=24)
    samples = []
    for problem, answer in zip(asked, answers, strict=True):
        prompt = prompt_ids(tokenizer, problem)
        samples.append(Sample(torch.tensor([*prompt, *answer]).int(), len(prompt), len(samples)))
    batch = Batch(samples, False)
    with frozen(model, gradient_checkpointing=False), EndToEnd(model, info, method, lora) as student:
        student.original(batch)
        chosen = model.lm_head(student(batch)).argmax(dim=1).split([s.num_rows for s in samples])
    for answer, tokens in zip(answers, chosen, strict=True):
        assert tokens.tolist()[:-1] == answer[1:]  # the first comes from the prompt's own last state
        assert len(answer) == 24 or int(tokens[-1]) == tokenizer.eos_token_id
