"""LoRA as the engine serves it: its kernels against the reference, its tokens against plain Hugging Face's."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from caprese_bench.engine.prefix import CPU
from caprese_bench.engine.process import Engine, EngineSettings
from caprese_bench.hugging_face.decoding import decode, prompt_ids
from caprese_bench.hugging_face.students import DecodedFF
from caprese_bench.lora.served import engine, kernels
from caprese_bench.lora.training import begin, tensors
from caprese_distill.blocks import resolve_method
from caprese_kernels import cpu, reference
from caprese_kernels.errors import CapreseError
from caprese_kernels.packed import PackedFF
from caprese_serve.demo import MODEL
from caprese_serve.demo.problems import problems
from tests.support.served_lora import CASES, Problem, assert_near, problem

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_halves_in_cpp(case: Problem) -> None:
    p = problem(case, torch.device("cpu"))
    expected_z, given = kernels.Reference.up(p.x, p.low, p.ff, p.keep, p.slots)
    expected_y = kernels.Reference.down(given, p.ff, p.keep, p.slots)
    z, given = kernels.Cpu.up(p.x, p.low, p.ff, p.keep, p.slots)
    assert_near(z, expected_z, case.dtype)
    assert_near(kernels.Cpu.down(given, p.ff, p.keep, p.slots), expected_y, case.dtype)


def test_the_halves_in_triton() -> None:
    """In a process of its own, where Triton is imported with its interpreter on."""
    given = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/benchmarks/served_lora_cases.py"]
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:]
    assert f"{2 * len(CASES)} passed" in done.stdout


@pytest.mark.parametrize("backend", [reference, cpu])
def test_without_b_it_is_griffin(backend: Any) -> None:
    p = problem(Problem(40, 75, 4, torch.float32, "padded"), torch.device("cpu"))
    (lora,) = engine.draw({0: p.ff}, 16).values()
    found = lora.forward(backend, p.x, p.keep, p.slots)
    plain = reference.griffin_ff(p.x, p.ff, p.keep, p.slots)
    assert (found - plain).norm() > 0.01 * plain.norm()
    lora.b_in.zero_()
    lora.b_down.zero_()
    assert_near(lora.forward(backend, p.x, p.keep, p.slots), plain, torch.float32)


def test_blocks_that_have_no_lora() -> None:
    up = torch.randn(6, 4)
    for ff, message in (
        (PackedFF.pack(None, up, up.t(), "relu"), "no gate"),
        (PackedFF.pack(up, up, up.t(), "silu", up[:2].t(), up[:2]), "a low-rank layer"),
        (PackedFF.pack(up, up, up.t(), "silu", gate_bias=up[:, 0], up_bias=up[:, 0]), "biases"),
    ):
        with pytest.raises(CapreseError, match=message):
            kernels.check(ff)


def test_the_engine_answers_as_transformers_does(tmp_path: Path) -> None:
    """Trained weights would do the same: these are drawn large enough to change answers."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    info, method = resolve_method(model.config, "demo", "griffin", 0.5, rank=48, layers=[0, 1])
    lora = begin(info, method, 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    for each in lora.values():
        for b in each.b.values():
            b.data = torch.randn(b.shape, generator=generator) * 0.1
    save_file(tensors(lora), tmp_path / "lora.safetensors")
    asked = [*problems("math", "test", 10), *problems("reading", "test", 6)]
    prompts = [prompt_ids(tokenizer, problem) for problem in asked]
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 16}
    options |= {"skip_tokenizer_init": True, "seed": 0}
    given = CPU | engine.variables(tmp_path, 48, tmp_path / "lora.safetensors")
    caprese = {"method": "griffin", "density": 0.5, "layers": [0, 1], "kernel_extension": engine.EXTENSION}
    with Engine(tmp_path / "log", EngineSettings(str(MODEL), caprese, options, given)) as served:
        found = served.run("answer", prompts=prompts, max_tokens=40, stop=tokenizer.eos_token_id)["ids"]
        assert served.run("report")["caprese"]["kernel"] == "lora over cpu"
    ff = {i: DecodedFF(method, each) for i, each in lora.items()}
    assert decode(model, tokenizer, asked, ff, 40) == found
    assert decode(model, tokenizer, asked, max_tokens=40) != found
