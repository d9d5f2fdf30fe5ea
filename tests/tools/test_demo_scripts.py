"""The scripts that made the demo's model and adapters, in small."""

import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from caprese_kernels.adapters import Adapters
from caprese_serve.demo import ADAPTERS, MODEL
from caprese_serve.demo.problems import chat, problems, split_of
from tools import demo_adapters

ROOT = Path(__file__).parents[2]


def train(output: Path, checkpoint: Path, steps: int) -> None:
    small = ("--no-compiled", "--test-math", "3", "--test-reading", "3", "--threads", "1")
    command = [sys.executable, "tools/demo_model.py", "--output", str(output), "--checkpoint", str(checkpoint)]
    run = subprocess.run(
        [*command, "--steps", str(steps), *small], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_two_steps_write_a_model_that_loads_and_talks(tmp_path: Path) -> None:
    train(tmp_path / "model", tmp_path / "checkpoint.pt", steps=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    (problem,) = problems("math", "test", 1)
    inputs = tokenizer.apply_chat_template(
        chat(problem.prompt), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**inputs, max_new_tokens=4).shape[1] > inputs["input_ids"].shape[1]
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["steps"] == 2
    assert record["held_out"]["math"]["problems"] == 3


def test_adapters_of_the_shipped_model(tmp_path: Path) -> None:
    """Few samples, the shipped model: what is shipped has the same layers, density and rank, and fits."""
    demo_adapters.main(model=MODEL, output=tmp_path, data=tmp_path / "rows.jsonl", samples=120, seed=3)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 120
    trained_on = {row["prompt"] for row in rows}
    assert not trained_on & {p.prompt for task in ("math", "reading") for p in problems(task, "test", 500)}
    for method in demo_adapters.SETTINGS:
        made = Adapters.load(tmp_path / f"{method}.safetensors")
        shipped = Adapters.load(ADAPTERS[method])
        for field in ("method", "density", "rank", "layers"):
            assert getattr(made.config, field) == getattr(shipped.config, field), field
        assert all(errors["remaining"] < 0.7 for errors in shipped.config.training["errors"].values())


def test_training_rows_are_of_the_training_split() -> None:
    keys = [p.key for task in ("math", "reading") for p in problems(task, "train", 300, seed=1)]
    assert {split_of(key) for key in keys} == {"train"}
