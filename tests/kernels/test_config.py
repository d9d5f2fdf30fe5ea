"""Configuration: what a user writes, and how it joins with an adapter's for one model."""

import json
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caprese_kernels.config import (
    AdapterConfig,
    BaseModelInfo,
    CapreseConfig,
    Method,
    layer_spans,
    resolve,
    resolve_layers,
)
from caprese_kernels.errors import CapreseError

BASE = {
    "name_or_path": "tiny/llama",
    "architecture": "LlamaForCausalLM",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 5,
    "hidden_act": "silu",
}


def served(**changes: Any) -> BaseModelInfo:
    return BaseModelInfo.model_validate(BASE | {"name_or_path": "served/model"} | changes)


def adapter(**changes: Any) -> AdapterConfig:
    config = {"base_model": BASE, "method": "griffin", "density": 0.5, "rank": 8, "layers": [1, 0]}
    return AdapterConfig.model_validate(config | changes)


def config(**given: Any) -> CapreseConfig:
    return CapreseConfig.parse(given, "--caprese-config")


def assert_told(error: CapreseError, *named: str) -> None:
    line = str(error)
    assert "\n" not in line
    assert line == f"{error.what}: expected {error.expected}; found {error.found}; {error.fix}"
    for fragment in named:
        assert fragment in line


def test_parse_takes_a_mapping_or_its_json() -> None:
    given = {
        "weights": "a.safetensors",
        "method": "cats",
        "density": 0.25,
        "layers": [3, 1],
        "score": "weighted",
        "prior": 0.5,
        "core": 1.0,
        "reselect_interval": 64,
        "statistics_page": 256,
        "statistics_mib": 100,
        "kernel": "reference",
        "start_up_check": False,
        "show_selections": True,
        "kernel_extension": "mine",
    }
    parsed = CapreseConfig.parse(given, "here")
    assert parsed.model_dump() == given
    assert CapreseConfig.parse(json.dumps(given), "here") == parsed


def test_keys_that_are_not_given_stay_open() -> None:
    assert CapreseConfig.parse("{}", "here").model_dump() == {
        "weights": None,
        "method": None,
        "density": None,
        "layers": None,
        "score": None,
        "prior": None,
        "core": None,
        "reselect_interval": None,
        "statistics_page": 512,
        "statistics_mib": None,
        "kernel": "auto",
        "start_up_check": True,
        "show_selections": False,
        "kernel_extension": None,
    }
    assert config(density=1).density == 1.0
    assert config(reselect_interval=None, layers="all").layers == "all"
    assert config(reselect_interval=0).reselect_interval == 0


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"densty": 0.5}, ("key 'densty'", "one of weights, method, density", "found 0.5")),
        ({"density": "half"}, ("key 'density'", "number", "'half'")),
        ({"density": True}, ("key 'density'", "number", "True")),
        ({"density": 0}, ("key 'density'", "greater than 0", "found 0")),
        ({"density": 1.5}, ("key 'density'", "less than or equal to 1", "1.5")),
        ({"density": float("nan")}, ("key 'density'", "finite", "nan")),
        ({"density": [0.5]}, ("key 'density'", "number", "[0.5]")),
        ({"method": "Griffin"}, ("key 'method'", "'griffin' or 'cats'", "'Griffin'")),
        ({"layers": "half"}, ("key 'layers'", "'first-half' or 'all'", "list", "'half'")),
        ({"layers": 3}, ("key 'layers'", "'first-half' or 'all'", "list", "found 3")),
        ({"layers": [0, -1]}, ("key 'layers.1'", "greater than or equal to 0", "-1")),
        ({"layers": [0, "1"]}, ("key 'layers.1'", "integer", "'1'")),
        ({"layers": [1.5]}, ("key 'layers.0'", "integer", "1.5")),
        ({"reselect_interval": -1}, ("key 'reselect_interval'", "greater than or equal to 0", "found -1")),
        ({"reselect_interval": 6.4}, ("key 'reselect_interval'", "integer", "found 6.4")),
        ({"reselect_interval": True}, ("key 'reselect_interval'", "integer", "True")),
        ({"statistics_page": 0}, ("key 'statistics_page'", "greater than or equal to 1", "found 0")),
        ({"statistics_mib": -1}, ("key 'statistics_mib'", "greater than or equal to 0", "found -1")),
        ({"kernel": "cuda"}, ("key 'kernel'", "'triton', 'cpu' or 'reference'", "'cuda'")),
        ({"kernel_extension": ""}, ("key 'kernel_extension'", "at least 1 character", "''")),
        ({"weights": 3}, ("key 'weights'", "string", "found 3")),
        ({"weights": ""}, ("key 'weights'", "at least 1 character", "''")),
    ],
)
def test_parse_names_the_key(given: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(CapreseError) as caught:
        config(**given)
    assert_told(caught.value, "--caprese-config", *named)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ('{"density": 0.5', "'{\"density\": 0.5' (Expecting ',' delimiter)"),
        ("{density: 0.5}", "'{density: 0.5}' (Expecting property name enclosed in double quotes)"),
        ("", "'' (Expecting value)"),
        ("[]", "found list"),
        ("0.5", "found float"),
        ("null", "found NoneType"),
        (["griffin"], "found list"),
        (None, "found NoneType"),
    ],
)
def test_parse_refuses_what_is_not_an_object(given: Any, found: str) -> None:
    with pytest.raises(CapreseError) as caught:
        CapreseConfig.parse(given, "additional_config['caprese']")
    assert_told(caught.value, "additional_config['caprese']: expected a JSON object", found)


@given(text=st.text(max_size=80))
def test_parse_of_any_text_is_an_answer_or_one_line(text: str) -> None:
    try:
        CapreseConfig.parse(text, "here")
    except CapreseError as error:
        assert_told(error, "here")


def test_resolve_the_plain_baseline() -> None:
    """GRIFFIN on the first half of the layers, rounded down, CATS on all; half of the neurons."""
    assert resolve(config(method="griffin"), None, served()) == (Method("griffin", 0.5, (0, 1), 0), [])
    assert resolve(config(method="cats"), None, served()) == (Method("cats", 0.5, (0, 1, 2, 3, 4), 0), [])
    given = config(method="griffin", density=0.3, layers=[4, 2])
    assert resolve(given, None, served()) == (Method("griffin", 0.3, (2, 4), 0), [])
    assert resolve(config(method="cats", layers="first-half"), None, served())[0].layers == (0, 1)


def test_resolve_takes_everything_from_the_adapter() -> None:
    assert resolve(config(weights="a"), adapter(), served()) == (Method("griffin", 0.5, (0, 1), 8), [])
    cats = adapter(method="cats", density=0.2, rank=256, layers=[4, 0, 2])
    assert resolve(config(weights="a", method="cats"), cats, served()) == (Method("cats", 0.2, (0, 2, 4), 256), [])


def test_resolve_warns_of_another_density() -> None:
    method, warnings = resolve(config(weights="a", density=0.4), adapter(), served())
    assert method == Method("griffin", 0.4, (0, 1), 8)
    assert len(warnings) == 1
    assert "0.4" in warnings[0]
    assert "0.5" in warnings[0]
    assert resolve(config(weights="a", density=0.5), adapter(), served())[1] == []


def test_resolve_takes_the_densities_of_the_adapter_in_the_order_of_layers() -> None:
    allocated = adapter(version="2", densities=[0.75, 0.25])  # of layers 1 and 0
    method, warnings = resolve(config(weights="a"), allocated, served())
    assert (method, warnings) == (Method("griffin", 0.5, (0, 1), 8, densities=(0.25, 0.75)), [])
    assert [method.at(i).density for i in (0, 1)] == [0.25, 0.75]
    assert method.at(1) == Method("griffin", 0.75, (0, 1), 8)
    assert str(method) == "method griffin, density 0.5 (0.25 to 0.75 by layer), rank 8"
    assert resolve(config(weights="a", layers=[1]), allocated, served())[0].densities == (0.75,)
    method, warnings = resolve(config(weights="a", density=0.5), allocated, served())
    assert method == Method("griffin", 0.5, (0, 1), 8)
    assert "0.25 to 0.75 by layer" in warnings[0]
    with pytest.raises(CapreseError, match=r"density: expected at least one of 160 neurons kept; found 0\.006"):
        resolve(config(weights="a"), adapter(version="2", densities=[0.9, 0.006]), served())


def test_resolve_takes_score_prior_and_core_from_the_adapter_unless_they_are_given() -> None:
    calibrated = adapter(rank=0, version="2", score="weighted", prior=0.25, core=0.8)
    method, warnings = resolve(config(weights="a"), calibrated, served())
    assert (method, warnings) == (Method("griffin", 0.5, (0, 1), 0, "weighted", 0.25, 0.8), [])
    assert str(method) == "method griffin, density 0.5, rank 0, score weighted, prior 0.25, core 0.8"
    method, warnings = resolve(config(weights="a", core=0.0, prior=0.0, score="paper"), calibrated, served())
    assert (method, warnings) == (Method("griffin", 0.5, (0, 1), 0), [])
    distilled = adapter(version="2", score="weighted", prior=0.25, core=0.8)
    method, warnings = resolve(config(weights="a", core=1.0), distilled, served())
    assert method.core == 1.0
    assert len(warnings) == 1
    assert "core 1 are served with L and R distilled at score weighted, prior 0.25, core 0.8" in warnings[0]


def test_resolve_may_use_fewer_layers_than_the_adapter_has() -> None:
    full = adapter(layers=[0, 1, 2, 3, 4])
    assert resolve(config(weights="a", layers=[3, 1]), full, served())[0].layers == (1, 3)
    assert resolve(config(weights="a", layers="first-half"), full, served())[0].layers == (0, 1)
    assert resolve(config(weights="a", layers="all"), full, served())[0].layers == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("given", "adapted", "named"),
    [
        ({}, None, ("'weights', or 'method'", "neither", "--caprese-weights FILE")),
        ({"density": 0.5}, None, ("'weights', or 'method'", "neither")),
        ({"weights": "a.st", "method": "cats"}, {}, ("method of adapter a.st", "'griffin'", "'cats'")),
        ({"weights": "a.st", "layers": "all"}, {}, ("layers of adapter a.st", "[0, 1]", "[2, 3, 4]")),
        ({"weights": "a.st", "layers": [1, 5]}, {}, ("from 0 to 4", "[1, 5]")),
        ({"method": "cats", "layers": [5]}, None, ("from 0 to 4", "[5]")),
        ({"method": "cats", "layers": []}, None, ("one or more", "[]")),
        ({"method": "cats", "layers": [1, 1]}, None, ("different indices", "[1, 1]")),
        ({"method": "griffin", "density": 0.006}, None, ("density", "at least one of 160", "0.006", "0.00625")),
        ({"weights": "a.st", "density": 0.006}, {}, ("density", "at least one of 160", "0.006", "0.00625")),
        ({"method": "griffin", "core": 0.5}, None, ("core in the configuration", "weights with a prior", "calibrate")),
        ({"weights": "a.st", "prior": 0.5}, {}, ("prior with adapter a.st", "version 2", "version 1", "calibrate")),
        ({"weights": "a.st", "core": 1.0}, {"method": "cats", "version": "2"}, ("core with method 'cats'", "found 1")),
    ],
)
def test_resolve_refuses(given: dict[str, Any], adapted: dict[str, Any] | None, named: tuple[str, ...]) -> None:
    with pytest.raises(CapreseError) as caught:
        resolve(config(**given), None if adapted is None else adapter(**adapted), served())
    assert_told(caught.value, *named)


def test_the_density_that_is_advised_is_accepted() -> None:
    assert resolve(config(method="griffin", density=0.00625), None, served())[0].density == 0.00625


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "Qwen2ForCausalLM"),
        ("hidden_size", 128),
        ("intermediate_size", 161),
        ("num_hidden_layers", 6),
        ("hidden_act", "gelu"),
    ],
)
def test_resolve_refuses_another_base_model(field: str, value: Any) -> None:
    with pytest.raises(CapreseError) as caught:
        resolve(config(weights="a.st"), adapter(), served(**{field: value}))
    expected, found = f"expected {field} {BASE[field]!r}", f"found {field} {value!r} in served/model"
    assert_told(caught.value, "adapter a.st", "tiny/llama", expected, found)


def test_names_of_one_activation_are_equal_and_a_moved_model_is_served() -> None:
    resolve(config(weights="a"), adapter(), served(hidden_act="swish", name_or_path="/elsewhere"))


@given(layers=st.integers(2, 80))
def test_first_half_is_rounded_down(layers: int) -> None:
    assert resolve_layers("first-half", layers) == tuple(range(layers // 2))
    assert resolve_layers("all", layers) == tuple(range(layers))


def test_first_half_of_one_layer_is_refused() -> None:
    with pytest.raises(CapreseError) as caught:
        resolve_layers("first-half", 1)
    assert_told(caught.value, "2 layers or more", "1 layer", "use 'all'")


@pytest.mark.parametrize(
    ("layers", "text"),
    [((0,), "0"), ((0, 1), "0-1"), (range(12), "0-11"), ((0, 1, 2, 7), "0-2, 7"), ([1, 3], "1, 3")],
)
def test_spans_of_layers(layers: Any, text: str) -> None:
    assert layer_spans(layers) == text


def test_matrices_of_an_ff_block() -> None:
    assert served().num_ff_matrices == 3
    for architecture in ("OPTForCausalLM", "GPT2LMHeadModel", "PhiForCausalLM"):
        assert served(architecture=architecture).num_ff_matrices == 2
    assert "num_ff_matrices" not in served().model_dump(), "the adapter file's header stays as it is"


def test_base_model_from_a_transformers_config() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5}
    llama = SimpleNamespace(architectures=["LlamaForCausalLM"], hidden_act="silu", **sizes)
    assert BaseModelInfo.from_hf(llama, "tiny/llama") == BaseModelInfo.model_validate(BASE)
    gemma = SimpleNamespace(hidden_activation="gelu_pytorch_tanh", hidden_act="gelu", architectures=None, **sizes)
    info = BaseModelInfo.from_hf(gemma, "g", ["Gemma2ForCausalLM"])
    assert (info.architecture, info.hidden_act) == ("Gemma2ForCausalLM", "gelu_pytorch_tanh")


@pytest.mark.parametrize("architectures", [None, []])
def test_a_config_without_an_architecture_is_refused(architectures: list[str] | None) -> None:
    config = SimpleNamespace(
        architectures=architectures, hidden_act="silu", hidden_size=64, intermediate_size=160, num_hidden_layers=5
    )
    with pytest.raises(CapreseError, match=r'model m: expected "architectures" in its config.json, as \["LlamaFor'):
        BaseModelInfo.from_hf(config, "m")


def test_an_error_is_one_line_and_survives_pickling() -> None:
    """Engines report from other processes."""
    error = CapreseError("a\nb", expected="c  d", found="e\tf", fix="g")
    assert str(error) == "a b: expected c d; found e f; g"
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, CapreseError)
    assert isinstance(again, ValueError)
    assert (str(again), again.what, again.fix) == (str(error), "a b", "g")


def test_when_a_prompts_own_statistic_takes_part() -> None:
    def needed(name: str = "griffin", **settings: Any) -> bool:
        return Method(name, 0.5, (0,), 0, **settings).needs_statistic  # type: ignore[arg-type]

    assert needed()
    assert needed(prior=0.5, core=0.8)
    assert not needed(core=1.0)
    assert not needed(prior=1.0)
    assert needed("cats")
