"""The adapter file, version 1: what is written and read, and every refusal.

The files to be refused are made by plain `safetensors` from the format's description; one thing is wrong in each.
"""

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from caprese_kernels import __version__
from caprese_kernels.adapters import Adapters, find_adapter, is_adapter_file, read_config
from caprese_kernels.config import AdapterConfig, method_of
from caprese_kernels.errors import CapreseError

DEPTH, RANK, LAYERS = 6, 3, [0, 2]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def make_config(**changes: Any) -> dict[str, Any]:
    return {
        "base_model": {
            "name_or_path": "tiny/llama",
            "architecture": "LlamaForCausalLM",
            "hidden_size": DEPTH,
            "intermediate_size": 10,
            "num_hidden_layers": 4,
            "hidden_act": "silu",
        },
        "method": "griffin",
        "density": 0.5,
        "rank": RANK,
        "layers": LAYERS,
        "training": {"stage": "end-to-end", "samples": 20000, "solver": "closed-form"},
        "caprese_version": "0.1.0",
    } | changes


def make_tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in LAYERS:
        tensors[f"layers.{i}.L"] = torch.randn(DEPTH, RANK, generator=generator).to(dtype)
        tensors[f"layers.{i}.R"] = torch.randn(RANK, DEPTH, generator=generator).to(dtype)
    return tensors


def write(path: Path, tensors: Mapping[str, Tensor] | None = None, **header: str | None) -> Path:
    """A valid file but for what is given; a header entry of None is left out."""
    entries = {"format": "caprese", "format_version": "1", "config": json.dumps(make_config())} | header
    metadata = {key: value for key, value in entries.items() if value is not None}
    save_file(dict(make_tensors() if tensors is None else tensors), path, metadata=metadata)
    return path


def assert_told(error: CapreseError, *named: str) -> None:
    """One line that names the offender and says what was expected, what was found and what to do."""
    line = str(error)
    assert "\n" not in line
    assert line == f"{error.what}: expected {error.expected}; found {error.found}; {error.fix}"
    assert error.what
    assert error.expected
    assert error.found
    assert error.fix
    for fragment in named:
        assert fragment in line


def refused(path: Path) -> CapreseError:
    with pytest.raises(CapreseError) as caught:
        Adapters.load(path)
    assert path.name in str(caught.value)
    return caught.value


@pytest.mark.parametrize("dtype", DTYPES)
def test_loads_a_file_written_by_plain_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = make_tensors(dtype)
    adapters = Adapters.load(write(tmp_path / "a.safetensors", tensors))
    assert sorted(adapters.left) == sorted(adapters.right) == LAYERS
    for i in LAYERS:
        assert torch.equal(adapters.left[i], tensors[f"layers.{i}.L"])
        assert torch.equal(adapters.right[i], tensors[f"layers.{i}.R"])
    assert adapters.dtype == dtype
    assert adapters.num_parameters == 4 * DEPTH * RANK
    config = adapters.config
    assert (config.method, config.density, config.rank, config.layers) == ("griffin", 0.5, RANK, LAYERS)
    assert config.base_model.architecture == "LlamaForCausalLM"
    assert config.training["samples"] == 20000
    assert read_config(tmp_path / "a.safetensors") == config


def test_the_header_of_a_saved_file(tmp_path: Path) -> None:
    """Read back by plain safetensors: the names, shapes and metadata of the format, and nothing else."""
    config = AdapterConfig.model_validate(make_config(caprese_version="0.0.0"))
    path = tmp_path / "new" / "folder" / "a.safetensors"
    Adapters.from_tensors(config, make_tensors(torch.bfloat16), "here").save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert set(metadata) == {"format", "format_version", "config"}
    assert (metadata["format"], metadata["format_version"]) == ("caprese", "1")
    assert json.loads(metadata["config"]) == make_config(caprese_version=__version__)
    saved = load_file(path)
    assert saved.keys() == make_tensors().keys()
    assert all(torch.equal(saved[name], t) for name, t in make_tensors(torch.bfloat16).items())
    assert list(path.parent.iterdir()) == [path], "no partial file remains"


@settings(max_examples=30, deadline=None)
@given(
    depth=st.integers(1, 9),
    rank=st.integers(1, 5),
    layers=st.sets(st.integers(0, 11), min_size=1, max_size=12).flatmap(lambda s: st.permutations(sorted(s))),
    dtype=st.sampled_from(DTYPES),
    density=st.floats(0, 1, exclude_min=True),
    method=st.sampled_from(["griffin", "cats"]),
    training=st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=5), max_size=3),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    depth: int,
    rank: int,
    layers: list[int],
    dtype: torch.dtype,
    density: float,
    method: str,
    training: dict[str, Any],
) -> None:
    """Whatever is saved loads again, to the bit; also from views of one large tensor, and more than ten layers."""
    base = make_config()["base_model"] | {"hidden_size": depth, "num_hidden_layers": 12}
    raw = make_config(base_model=base, rank=rank, layers=layers, density=density, method=method, training=training)
    config = AdapterConfig.model_validate(raw)
    stacked = torch.randn(2, len(layers), depth, rank).to(dtype)
    left = {i: stacked[0, n] for n, i in enumerate(layers)}
    right = {i: stacked[1, n].t() for n, i in enumerate(layers)}
    path = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    Adapters(config, left, right).save(path)
    loaded = Adapters.load(path)
    settings = {"score": "paper", "prior": 0.0, "core": 0.0, "densities": None}
    assert loaded.config.model_dump() == raw | settings | {"caprese_version": __version__}
    assert all(torch.equal(loaded.left[i], left[i]) and loaded.left[i].dtype == dtype for i in layers)
    assert all(torch.equal(loaded.right[i], right[i]) for i in layers)


def test_saving_refuses_what_loading_would_and_leaves_nothing(tmp_path: Path) -> None:
    tensors = make_tensors()
    adapters = Adapters.from_tensors(AdapterConfig.model_validate(make_config()), tensors, "here")
    adapters.left[0][1, 1] = torch.nan
    with pytest.raises(CapreseError, match=r"layers\.0\.L"):
        adapters.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = Adapters.load(write(tmp_path / "a.safetensors"))
    before = (tmp_path / "a.safetensors").read_bytes()

    def full_disk(tensors: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("caprese_kernels.adapters.save_file", full_disk)
    with pytest.raises(CapreseError, match="No space"):
        adapters.save(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "a.safetensors"]


Change = Callable[[dict[str, Tensor]], None]
WRONG_TENSORS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "missing R": (lambda t: t.pop("layers.2.R"), ("tensor layers.2.R", "[0, 2]")),
    "missing layer": (lambda t: [t.pop(f"layers.2.{part}") for part in "LR"], ("tensor layers.2.L", "[0, 2]")),
    "no tensors": (lambda t: t.clear(), ("tensor layers.0.L",)),
    "surplus layer": (lambda t: t.update({"layers.3.L": torch.ones(DEPTH, RANK)}), ("tensor layers.3.L", "[0, 2]")),
    "unknown name": (lambda t: t.update(bias=torch.ones(1)), ("tensor bias", "unknown name")),
    "padded index": (lambda t: t.update({"layers.02.L": t["layers.2.L"] + 0}), ("tensor layers.02.L",)),
    "transposed L": (lambda t: t.update({"layers.2.L": torch.ones(RANK, DEPTH)}), ("layers.2.L", "[6, 3]", "[3, 6]")),
    "other rank": (lambda t: t.update({"layers.0.R": torch.ones(2, DEPTH)}), ("layers.0.R", "[3, 6]", "[2, 6]")),
    "one axis": (lambda t: t.update({"layers.0.L": torch.ones(DEPTH * RANK)}), ("layers.0.L", "[6, 3]", "[18]")),
    "NaN": (lambda t: t["layers.2.R"].__setitem__((2, 5), torch.nan), ("layers.2.R", "NaN or Inf")),
    "Inf": (lambda t: t["layers.0.L"].__setitem__((0, 0), -torch.inf), ("layers.0.L", "NaN or Inf")),
    "mixed dtypes": (
        lambda t: t.update({"layers.2.L": t["layers.2.L"].half()}),
        ("one dtype", "layers.2.L in float16"),
    ),
    "integers": (
        lambda t: t.update({name: v.to(torch.int32) for name, v in t.items()}),
        ("layers.0.L", "bfloat16, float16 or float32", "int32"),
    ),
    "doubles": (
        lambda t: t.update({name: v.double() for name, v in t.items()}),
        ("layers.0.L", "bfloat16, float16 or float32", "float64"),
    ),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_refuses_tensors(tmp_path: Path, case: str) -> None:
    change, named = WRONG_TENSORS[case]
    tensors = make_tensors()
    change(tensors)
    assert_told(refused(write(tmp_path / "a.safetensors", tensors)), *named)


WRONG_HEADERS: dict[str, tuple[dict[str, str | None], tuple[str, ...]]] = {
    "no format": ({"format": None}, ("format 'caprese'", "format None", "caprese distill")),
    "another format": ({"format": "pt"}, ("format 'caprese'", "format 'pt'", "caprese distill")),
    "no version": ({"format_version": None}, ("format_version '1'", "None", "upgrade")),
    "unknown version": ({"format_version": "3"}, ("format_version '1' or '2'", "'3'", "upgrade")),
    "no config": ({"config": None}, ("'config'", "none")),
    "bad JSON": ({"config": '{"method": '}, ("JSON in the header's 'config'", "char 11")),
    "JSON list": ({"config": "[]"}, ("config", "a JSON object", "[]")),
    "JSON NaN": ({"config": json.dumps(make_config(density=float("nan")))}, ("JSON in the header's 'config'", "NaN")),
}


@pytest.mark.parametrize("case", WRONG_HEADERS)
def test_refuses_headers(tmp_path: Path, case: str) -> None:
    header, named = WRONG_HEADERS[case]
    assert_told(refused(write(tmp_path / "a.safetensors", **header)), *named)


WRONG_CONFIGS: list[tuple[str, Any, tuple[str, ...]]] = [
    ("method", "wina", ("'method'", "'griffin' or 'cats'", "'wina'")),
    ("density", 0, ("'density'", "greater than 0")),
    ("density", -0.5, ("'density'", "greater than 0", "-0.5")),
    ("density", 1.01, ("'density'", "less than or equal to 1", "1.01")),
    ("density", "0.5", ("'density'", "number", "'0.5'")),
    ("rank", -1, ("'rank'", "greater than or equal to 0", "found -1")),
    ("rank", 0, ("version 1", "rank 0")),
    ("core", 0.5, ("version 1", "core 0.5")),
    ("densities", [0.5, 0.5], ("version 1", "found densities")),
    ("densities", [0.5, 0], ("'densities.1'", "greater than 0")),
    ("densities", 0.5, ("'densities'", "list", "0.5")),
    ("core", 1.5, ("'core'", "less than or equal to 1", "1.5")),
    ("prior", "all", ("'prior'", "number", "'all'")),
    ("score", "best", ("'score'", "'paper' or 'weighted'", "'best'")),
    ("rank", 2.5, ("'rank'", "integer", "2.5")),
    ("layers", [], ("'layers'", "at least 1", "[]")),
    ("layers", "all", ("'layers'", "list", "'all'")),
    ("layers", [0, -2], ("'layers.1'", "greater than or equal to 0", "-2")),
    ("layers", [0, 0, 2], ("different layers", "[0, 0, 2]")),
    ("layers", [0, 2, 4], ("from 0 to 3", "[0, 2, 4]")),
    ("base_model", "tiny/llama", ("'base_model'", "'tiny/llama'")),
    ("base_model.hidden_size", 0, ("'base_model.hidden_size'", "greater than 0")),
    ("base_model.num_hidden_layers", "many", ("'base_model.num_hidden_layers'", "integer", "'many'")),
    ("base_model.architecture", None, ("'base_model.architecture'", "string", "None")),
]


@pytest.mark.parametrize(("key", "value", "named"), WRONG_CONFIGS)
def test_refuses_configs(tmp_path: Path, key: str, value: Any, named: tuple[str, ...]) -> None:
    config = make_config()
    *outer, last = key.split(".")
    for part in outer:
        config = config[part]
    config[last] = value
    whole = make_config() | ({outer[0]: config} if outer else config)
    assert_told(refused(write(tmp_path / "a.safetensors", config=json.dumps(whole))), *named)


@pytest.mark.parametrize("key", ["base_model", "method", "density", "rank", "layers", "base_model.hidden_act"])
def test_refuses_configs_with_a_key_missing(tmp_path: Path, key: str) -> None:
    config = make_config()
    *outer, last = key.split(".")
    del (config[outer[0]] if outer else config)[last]
    path = write(tmp_path / "a.safetensors", config=json.dumps(config))
    assert_told(refused(path), f"key '{key}'", "required", "found nothing")


def test_refuses_files_that_are_cut_short(tmp_path: Path) -> None:
    """At every length: within the header's size, within the header, within the tensors."""
    whole = write(tmp_path / "a.safetensors").read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path = tmp_path / f"cut{length}.safetensors"
        path.write_bytes(whole[:length])
        assert_told(refused(path), "readable safetensors file", "truncated or foreign", "copy the file again")


class Exploit:
    """Unpickling it creates the file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_refuses_pickles_unread(tmp_path: Path, protocol: int) -> None:
    target, path = tmp_path / "executed", tmp_path / "a.safetensors"
    path.write_bytes(pickle.dumps({"layers.0.L": Exploit(target)}, protocol=protocol))
    assert_told(refused(path), "a pickle or PyTorch archive", "never loaded")
    assert not target.exists()
    pickle.loads(path.read_bytes())
    assert target.exists(), "the exploit must work, or its absence proves nothing"


@pytest.mark.parametrize("archive", [True, False])
def test_refuses_pytorch_checkpoints(tmp_path: Path, archive: bool) -> None:
    path = tmp_path / "a.safetensors"
    torch.save(make_tensors(), path, _use_new_zipfile_serialization=archive)
    assert_told(refused(path), "a pickle or PyTorch archive", "never loaded")


def test_refuses_paths_that_cannot_be_read(tmp_path: Path) -> None:
    assert_told(refused(tmp_path / "absent.safetensors"), "No such file")
    (tmp_path / "folder.safetensors").mkdir()
    assert_told(refused(tmp_path / "folder.safetensors"), "directory")


def test_is_adapter_file(tmp_path: Path) -> None:
    assert is_adapter_file(write(tmp_path / "a.safetensors"))
    assert is_adapter_file(write(tmp_path / "b.safetensors", format_version="9")), "of any version"
    assert not is_adapter_file(write(tmp_path / "c.safetensors", format=None))
    (tmp_path / "d.safetensors").write_text("text")
    (tmp_path / "e.safetensors").mkdir()
    for other in ("d.safetensors", "e.safetensors", "absent"):
        assert not is_adapter_file(tmp_path / other)


def test_find_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file; a directory with the usual name, or with one adapter beside a model's weights."""
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    one = write(tmp_path / "one.safetensors").resolve()
    assert find_adapter(str(one)) == find_adapter(str(tmp_path)) == one
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_adapter("one.safetensors") == find_adapter(".") == find_adapter("~/one.safetensors") == one
    two = write(tmp_path / "two.safetensors").resolve()
    with pytest.raises(CapreseError) as caught:
        find_adapter(str(tmp_path))
    assert_told(caught.value, str(tmp_path), "one.safetensors, two.safetensors", "name the file")
    assert find_adapter(str(two)) == two
    usual = write(tmp_path / "adapters.safetensors").resolve()
    assert find_adapter(str(tmp_path)) == usual


@pytest.mark.parametrize("weights", ["absent", "absent.safetensors", "owner/absent.safetensors", "/a/b/c", "~nobody/x"])
def test_find_adapter_refuses_paths_with_nothing_there(weights: str) -> None:
    with pytest.raises(CapreseError) as caught:
        find_adapter(weights)
    assert_told(
        caught.value,
        f"nothing at {weights}",
        "a file, a directory, or owner/name[/file] on the Hub",
        "correct the path",
    )


def test_find_adapter_refuses_an_empty_directory(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CapreseError) as caught:
        find_adapter(str(tmp_path))
    assert_told(caught.value, str(tmp_path), "adapters.safetensors", "found none")


# -- version 2 -------------------------------------------------------------------------------------------------------


def make_priors(neurons: int = 10) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shares = {f"layers.{i}.prior": torch.rand(neurons, generator=generator) for i in LAYERS}
    return {name: each / each.sum() for name, each in shares.items()}


@pytest.mark.parametrize("rank", [RANK, 0])
def test_a_file_with_priors_is_of_version_2(tmp_path: Path, rank: int) -> None:
    """With L and R, and without; the priors stay float32 beside them."""
    raw = make_config(rank=rank, score="weighted", prior=0.25, core=0.8)
    tensors = make_priors() | (make_tensors(torch.bfloat16) if rank else {})
    path = tmp_path / "a.safetensors"
    Adapters.from_tensors(AdapterConfig.model_validate(raw), tensors, "here").save(path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format_version"] == "2"
        assert json.loads(file.metadata()["config"]) == raw | {"caprese_version": __version__}
    loaded = Adapters.load(path)
    assert loaded.tensors().keys() == tensors.keys()
    assert all(torch.equal(loaded.tensors()[name], t) for name, t in tensors.items())
    assert loaded.dtype == (torch.bfloat16 if rank else None)
    assert loaded.config.version == "2"
    assert loaded.num_parameters == 4 * DEPTH * rank


def write_version_2(path: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    settings = make_config() | {"rank": 0, "score": "weighted", "prior": 0.5, "core": 0.8} | config
    return write(path, tensors, format_version="2", config=json.dumps(settings))


def test_a_density_for_each_layer(tmp_path: Path) -> None:
    densities = [0.25 * (i + 1) for i in range(len(LAYERS))]
    path = write_version_2(tmp_path / "a.safetensors", make_priors(), densities=densities)
    adapters = Adapters.load(path)
    assert method_of(adapters.config).densities == tuple(densities)
    assert adapters.version == "2"
    adapters.save(tmp_path / "again.safetensors")
    again = Adapters.load(tmp_path / "again.safetensors").config
    assert (again.densities, again.version) == (densities, "2")
    error = refused(write_version_2(path, make_priors(), densities=densities[1:]))
    assert_told(error, f"a density for each of its {len(LAYERS)} layers", f"found {len(LAYERS) - 1}")


def test_cats_needs_no_prior(tmp_path: Path) -> None:
    """Nor does its file; a file that names one must have it, and so must GRIFFIN's with the weighted score."""
    raw = make_config(method="cats", score="weighted", prior=0.0, core=0.0)
    path = tmp_path / "a.safetensors"
    Adapters.from_tensors(AdapterConfig.model_validate(raw), make_tensors(), "here").save(path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format_version"] == "2"
    loaded = Adapters.load(path)
    assert (loaded.config.score, loaded.config.version, loaded.prior) == ("weighted", "2", {})
    for wrong in ({"prior": 0.5}, {"core": 0.5}, {"method": "griffin"}, {"rank": 0}):
        tensors = {} if "rank" in wrong else make_tensors()
        config = AdapterConfig.model_validate(raw | wrong)
        with pytest.raises(CapreseError, match="priors of layers"):
            Adapters.from_tensors(config, tensors, "here")


WRONG_PRIORS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "none": (lambda t: t.clear(), ("priors of layers [0, 2]", "none")),
    "one layer's": (lambda t: t.pop("layers.2.prior"), ("tensor layers.2.prior",)),
    "surplus": (lambda t: t.update({"layers.1.prior": t["layers.0.prior"] + 0}), ("tensor layers.1.prior",)),
    "L at rank 0": (lambda t: t.update(make_tensors()), ("tensor layers.0.L", "does not announce")),
    "short": (lambda t: t.update({"layers.0.prior": torch.full((9,), 1 / 9)}), ("layers.0.prior", "[10]", "[9]")),
    "half": (lambda t: t.update({"layers.0.prior": t["layers.0.prior"].half()}), ("layers.0.prior", "float32")),
    "NaN": (lambda t: t["layers.2.prior"].__setitem__(3, torch.nan), ("layers.2.prior", "NaN or Inf")),
    "negative": (lambda t: t["layers.0.prior"].__setitem__(3, -0.5), ("layers.0.prior", "0 or more", "-0.5")),
    "sums to 2": (lambda t: t["layers.0.prior"].mul_(2), ("layers.0.prior", "sum to 1", "2")),
}


@pytest.mark.parametrize("case", WRONG_PRIORS)
def test_refuses_priors(tmp_path: Path, case: str) -> None:
    change, named = WRONG_PRIORS[case]
    tensors = make_priors()
    change(tensors)
    assert_told(refused(write_version_2(tmp_path / "a.safetensors", tensors)), *named)
