"""Flags, configuration and refusals, up to the point where vLLM would start a process."""

import argparse
import json
import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from caprese_kernels.config import CapreseConfig, Method
from caprese_kernels.errors import CapreseError
from caprese_vllm.enable import _choose_graphs
from caprese_vllm.flags import _add_cli_args
from caprese_vllm.refusals import check_engine
from caprese_vllm.settings import EngineSettings
from tests.support.models import make_adapter, make_model

ModelDir = Callable[[str], Path]
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


def parse(*arguments: str) -> Namespace:
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(list(arguments))


def configure(model: Path, caprese: Any, **options: Any) -> Any:
    options = {"dtype": "float32", "max_model_len": 64, "additional_config": {"caprese": caprese}} | options
    return EngineArgs(model=str(model), **options).create_engine_config()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--caprese-weights", "A", "--caprese-config", '{"density": 0.5}', "--additional-config", '{"other": 1}'],
        ["--additional-config", '{"other": 1}', "--caprese-config", '{"density": 0.5}', "--caprese-weights", "A"],
        ["--additional-config", '{"other": 1, "caprese": {"weights": "A"}}', "--caprese-config.density", "0.5"],
        ["--caprese-config", '{"density": 0.5, "weights": "A"}', "--additional-config.other", "1"],
    ],
    ids=["flags-first", "flags-last", "dotted", "weights-in-config"],
)
def test_flags_end_in_additional_config_in_any_order(arguments: list[str]) -> None:
    assert parse(*arguments).additional_config == {"other": 1, "caprese": {"weights": "A", "density": 0.5}}


def test_the_help_of_every_flag_can_be_formatted() -> None:
    """argparse formats help texts with %: a bare one made `vllm serve --help=all` a TypeError."""
    parser = _add_cli_args(lambda parser: parser, argparse.ArgumentParser())
    shown = "".join(parser.format_help().split())  # lines are broken at hyphens too
    assert "--caprese-weightsPATH" in shown
    assert "default1%ofitsmemory" in shown
    for name, field in CapreseConfig.model_fields.items():
        assert "".join(f"{name}: {field.description}".split()) in shown


def test_no_flag_no_trace(model_dir: ModelDir) -> None:
    parse("--caprese-weights", "A")
    assert "caprese" not in parse().additional_config, "a parse left its flags behind in the shared default"
    assert "caprese" not in EngineArgs(model=str(model_dir("llama"))).additional_config


def test_the_last_additional_config_wins_but_not_over_flags() -> None:
    twice = [f'--additional-config={{"caprese": {{"density": {d}}}}}' for d in (0.5, 0.25)]
    assert parse(*twice).additional_config == {"caprese": {"density": 0.25}}
    both = parse("--caprese-config", '{"density": 0.75}', *twice, "--caprese-weights", "A")
    assert both.additional_config == {"caprese": {"density": 0.75, "weights": "A"}}


def test_null_is_off_and_other_kinds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("--additional-config", '{"caprese": null}').additional_config == {"caprese": None}
    both = parse("--additional-config", '{"caprese": null}', "--caprese-weights", "A")
    assert both.additional_config == {"caprese": {"weights": "A"}}
    with pytest.raises(SystemExit):
        parse("--additional-config", '{"caprese": "x"}', "--caprese-weights", "A")
    assert "found 'x'" in capsys.readouterr().err


def test_a_wrong_configuration_exits_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse("--caprese-config", '{"density": 2}')
    assert exit_info.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("caprese: --caprese-config: key 'density'")


def test_the_resolved_method_reaches_every_process(model_dir: ModelDir, tmp_path: Path) -> None:
    adapter = make_adapter(model_dir("llama"), tmp_path / "a.safetensors", "griffin", rank=4)
    config = configure(model_dir("llama"), {"weights": str(adapter)})
    ours = EngineSettings.read(config)
    assert ours is not None
    assert ours.method == Method("griffin", 0.5, (0, 1), 4)
    assert ours.weights is not None
    assert Path(ours.weights).is_absolute()
    assert config.cache_config.enable_prefix_caching is True
    assert ours.num_pages > 0
    config.additional_config = json.loads(json.dumps(config.additional_config))
    assert EngineSettings.read(config) == ours, "vLLM hashes it as JSON"
    assert EngineSettings.read(pickle.loads(pickle.dumps(config))) == ours, "and pickles it for each process"
    assert config.scheduler_config.get_scheduler_cls().__name__ == "CapreseScheduler"
    assert config.compilation_config.cudagraph_mode is None or not config.compilation_config.cudagraph_mode


@pytest.mark.parametrize(
    ("caprese", "options", "named"),
    [
        ({}, {}, "neither"),
        ({"weights": "/nowhere/a.safetensors"}, {}, "/nowhere/a.safetensors"),
        ({"weights": "x" * 300 + "/y/z"}, {}, "File name too long"),
        ({"method": "relu"}, {}, "method"),
        ({"method": "griffin", "density": 0.0}, {}, "density"),
        ({"method": "griffin", "density": 0.001}, {}, "density"),
        ({"method": "griffin", "layers": [9]}, {}, "9"),
        ({"method": "griffin", "kernel": "triton"}, {}, "triton"),
        (
            {"method": "griffin", "reselect_interval": 8},
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "speculative decoding",
        ),
        ({"method": "cats", "reselect_interval": 0}, {"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"method": "griffin", "reselect_interval": 8}, {"kv_transfer_config": CONNECTOR}, "KV transfer"),
        ({"method": "griffin", "kernel_extension": "mine"}, {}, "found 'mine'; registered: "),
        ({"method": "griffin", "unknown": 1}, {}, "unknown"),
        ({"method": "griffin"}, {"tensor_parallel_size": 2}, "divides the model's 97 neurons"),
        ({"method": "griffin"}, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, "together with pipeline"),
        ({"method": "griffin"}, {"data_parallel_size": 2}, "data parallelism"),
        ({"method": "griffin"}, {"quantization": "fp8"}, "quantization fp8"),
        (
            {"method": "griffin"},
            {"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "speculative decoding by ngram_gpu",
        ),
        ({"method": "griffin"}, {"quantization": "bitsandbytes"}, "quantization bitsandbytes"),
        ({"method": "griffin"}, {"kv_transfer_config": CONNECTOR}, "KV transfer"),
        ({"method": "griffin"}, {"weight_transfer_config": {"backend": "nccl"}}, "run-time weight transfer"),
        ({"method": "griffin"}, {"enable_prompt_embeds": True}, "prompt embeddings"),
        ({"method": "griffin"}, {"enable_sleep_mode": True}, "sleep mode"),
        ({"method": "griffin"}, {"cpu_offload_gb": 1}, "weight offloading"),
        ({"method": "griffin"}, {"load_format": "sharded_state"}, "sharded_state"),
        ({"method": "griffin"}, {"model_impl": "transformers"}, "implementation transformers"),
        ({"method": "griffin"}, {"worker_extension_cls": "some.Extension"}, "some.Extension"),
        ({"method": "griffin"}, {"runner": "pooling"}, "pooling"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_what_does_not_fit_is_refused_by_name(
    model_dir: ModelDir, caprese: dict[str, Any], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(CapreseError, match=r"expected .*; found") as error:
        configure(model_dir("llama"), caprese, **options)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_reselection_that_cannot_be_is_refused_with_the_reason(model_dir: ModelDir, tmp_path: Path) -> None:
    """One selection for all; layers that drop KV entries, unless the window holds any text, or all blocks stay."""
    directory = model_dir("llama")
    shared = {"score": "weighted", "prior": 0.5, "core": 1.0}
    adapter = make_adapter(directory, tmp_path / "a.safetensors", "griffin", selection=shared)
    asked = {"weights": str(adapter), "reselect_interval": 64}
    with pytest.raises(CapreseError, match=r"core 1: all requests share one selection, which no text changes; leave"):
        configure(directory, asked)
    assert configure(directory, {**asked, "core": 0.5}).scheduler_config.get_scheduler_cls().__name__ == (
        "ReselectingScheduler"
    )
    window = {"method": "griffin", "reselect_interval": 64}
    with pytest.raises(CapreseError, match=r"behind a window of 32 tokens; leave it out, add --disable-hybrid"):
        configure(model_dir("gemma2"), window)
    configure(model_dir("gemma2"), window, max_model_len=32)
    configure(model_dir("gemma2"), window, disable_hybrid_kv_cache_manager=True)


def test_a_density_that_leaves_a_rank_no_neuron(model_dir: ModelDir) -> None:
    """160 neurons: one of them is 1/160, but on each of two ranks one of 80."""
    configure(model_dir("qwen2"), {"method": "griffin", "density": 0.01})
    with pytest.raises(CapreseError, match=r"each rank's 80 neurons kept; found 0\.01; use 0\.0125 or more"):
        configure(model_dir("qwen2"), {"method": "griffin", "density": 0.01}, tensor_parallel_size=2)
    configure(model_dir("qwen2"), {"method": "cats", "density": 0.01}, tensor_parallel_size=2)


def test_a_model_of_another_size_is_refused(model_dir: ModelDir, tmp_path: Path) -> None:
    adapter = make_adapter(model_dir("llama"), tmp_path / "a.safetensors", "griffin")
    other = make_model("llama", tmp_path / "other", intermediate_size=99)
    with pytest.raises(CapreseError, match=r"intermediate_size 97.*intermediate_size 99"):
        configure(other, {"weights": str(adapter)})
    with pytest.raises(CapreseError, match=r"LlamaForCausalLM.*Qwen2ForCausalLM"):
        configure(model_dir("qwen2"), {"weights": str(adapter)})


def test_a_quantized_checkpoint_is_refused(model_dir: ModelDir, tmp_path: Path) -> None:
    shutil.copytree(model_dir("llama"), tmp_path / "quantized")
    config = tmp_path / "quantized" / "config.json"
    quantized = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    settings = json.loads(config.read_text()) | {"quantization_config": quantized}
    config.write_text(json.dumps(settings))
    with pytest.raises(CapreseError, match="quantization awq"):
        configure(tmp_path / "quantized", {"method": "griffin"})


def test_drafting_models_are_refused(model_dir: ModelDir) -> None:
    """Their own FF blocks must run dense, and no test shows that Caprese distinguishes them from the model's."""
    for method in ("draft_model", "eagle"):
        drafter = {"method": method, "model": str(model_dir("llama")), "num_speculative_tokens": 2}
        with pytest.raises(CapreseError, match=f"speculative decoding by {method}"):
            configure(model_dir("llama"), {"method": "griffin"}, speculative_config=drafter)


@pytest.mark.parametrize(
    "architecture",
    [
        "BloomForCausalLM",
        "Qwen3MoeForCausalLM",
        "MixtralForCausalLM",
        "DeepseekV3ForCausalLM",
        "Qwen2VLForConditionalGeneration",
        "Gemma3ForConditionalGeneration",
        "Llama4ForConditionalGeneration",
        "BertForMaskedLM",
    ],
)
def test_an_unsupported_architecture_is_refused(tmp_path: Path, architecture: str) -> None:
    """By its name, before vLLM asks for packages that some models need."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    with pytest.raises(CapreseError, match=f"architecture {architecture}"):
        configure(tmp_path, {"method": "griffin"})


def test_a_config_that_is_no_strict_json_is_read(tmp_path: Path) -> None:
    text = '{"architectures": ["BertForMaskedLM"], "limit": Infinity, "padding": "' + "x" * (2 << 20) + '"}'
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CapreseError, match="architecture BertForMaskedLM"):
        configure(tmp_path, {"method": "griffin"})


def test_an_overridden_architecture_is_refused(model_dir: ModelDir) -> None:
    with pytest.raises(CapreseError, match="architecture GraniteMoeForCausalLM"):
        configure(model_dir("llama"), {"method": "griffin"}, hf_overrides={"architectures": ["GraniteMoeForCausalLM"]})


def test_experts_beside_an_ff_block_are_refused(tmp_path: Path) -> None:
    """Gemma 4 has them in some sizes only: its architecture is supported."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "gemma4_text", enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32
    )
    config.architectures = ["Gemma4ForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(CapreseError, match="mixture of experts"):
        configure(tmp_path, {"method": "griffin"}, skip_tokenizer_init=True)


def test_the_adapter_decides_and_the_user_may_narrow(model_dir: ModelDir, tmp_path: Path) -> None:
    adapter = make_adapter(model_dir("llama"), tmp_path / "a.safetensors", "cats", density=0.3)
    ours = EngineSettings.read(configure(model_dir("llama"), {"weights": str(adapter), "layers": [1, 3]}))
    assert ours is not None
    assert ours.method == Method("cats", 0.3, (1, 3), 8)
    with pytest.raises(CapreseError, match=r"'cats'.*'griffin'"):
        configure(model_dir("llama"), {"weights": str(adapter), "method": "griffin"})


@pytest.mark.parametrize(
    ("mode", "splitting", "kernel", "v2", "becomes"),
    [
        ("FULL_AND_PIECEWISE", True, "triton", True, "FULL_AND_PIECEWISE"),
        ("FULL_DECODE_ONLY", True, "triton", True, "FULL_DECODE_ONLY"),
        ("FULL_DECODE_ONLY", False, "triton", True, "FULL_DECODE_ONLY"),
        ("FULL_AND_PIECEWISE", True, "reference", True, "PIECEWISE"),
        ("FULL_AND_PIECEWISE", True, "triton", False, "PIECEWISE"),
        ("FULL_AND_PIECEWISE", False, "reference", True, "PIECEWISE"),
        ("FULL_DECODE_ONLY", False, "reference", True, "NONE"),
        ("PIECEWISE", True, "reference", False, "PIECEWISE"),
        ("NONE", False, "triton", True, "NONE"),
    ],
)
def test_which_graphs(mode: str, splitting: bool, kernel: str, v2: bool, becomes: str) -> None:
    """Full graphs of decoding stay as asked for wherever the FF op can be part of them."""
    ops = ["vllm::attention"] if splitting else []
    compilation = SimpleNamespace(cudagraph_mode=CUDAGraphMode[mode], splitting_ops=ops)
    config = SimpleNamespace(compilation_config=compilation, use_v2_model_runner=v2)
    _choose_graphs(config, SimpleNamespace(NAME=kernel), None)
    assert compilation.cudagraph_mode == CUDAGraphMode[becomes]
    assert ops == (["vllm::attention", "caprese::ff"] if splitting else [])


def test_full_graphs_of_prompts_are_refused(model_dir: ModelDir) -> None:
    config = configure(model_dir("llama"), {"method": "griffin"})  # on a CPU there are no graphs
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
    with pytest.raises(CapreseError, match=r"found cudagraph_mode FULL.*FULL_AND_PIECEWISE"):
        check_engine(config)
