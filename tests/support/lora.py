"""Random LoRA adapters in PEFT's file format, and the model that has one merged into its weights."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
RANK, ALPHA = 8, 16


def make_lora(
    model_dir: Path,
    directory: Path,
    modules: Sequence[str] = ATTENTION,
    layers: Sequence[int] = (0, 1, 2, 3),
    seed: int = 0,
) -> Path:
    """Write an adapter of those modules of those layers, about as large as the weights; return `directory`."""
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(model_dir / "model.safetensors")
    tensors = {}
    for name in (f"model.layers.{i}.{module}" for i in layers for module in modules):
        rows, columns = weights[f"{name}.weight"].shape
        up = torch.randn(rows, RANK, generator=generator) * RANK**-0.5
        tensors[f"base_model.model.{name}.lora_A.weight"] = (
            torch.randn(RANK, columns, generator=generator) * columns**-0.5
        )
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in modules})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def merged(model_dir: Path, lora: Path, directory: Path) -> Path:
    """Write the model with W + alpha / r B A for every W of the adapter; return `directory`."""
    shutil.copytree(model_dir, directory)
    weights, tensors = load_file(model_dir / "model.safetensors"), load_file(lora / "adapter_model.safetensors")
    for name, a in tensors.items():
        if "lora_A" in name:
            b = tensors[name.replace("lora_A", "lora_B")]
            weight = weights[name.removeprefix("base_model.model.").replace("lora_A.", "")]
            weight += ALPHA / RANK * b @ a
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
