"""The extension point for FF kernels: what can be registered, and what is selected."""

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace

import pytest
from vllm.config import CUDAGraphMode

from caprese_kernels import reference
from caprese_kernels.backend import Backend
from caprese_kernels.config import Method
from caprese_kernels.errors import CapreseError
from caprese_kernels.packed import PackedFF
from caprese_vllm import ff_kernels
from caprese_vllm.enable import _choose_graphs

METHOD = Method("griffin", 0.5, (0, 1), 0)


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ff_kernels, "_extensions", {})


def one(backend: Backend, method: Method, blocks: Mapping[int, PackedFF]) -> Backend:
    return backend


def other(backend: Backend, method: Method, blocks: Mapping[int, PackedFF]) -> Backend:
    return backend


def test_a_name_is_registered_once() -> None:
    ff_kernels.register("mine", one)
    ff_kernels.register("mine", one)  # vLLM may call a plugin twice
    with pytest.raises(CapreseError, match=r"FF kernels 'mine': expected a name that is registered once"):
        ff_kernels.register("mine", other)
    with pytest.raises(CapreseError, match="found another"):
        ff_kernels.register("mine", one, cuda_graphs=True)


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(CapreseError, match=r"found 'mine'; registered: none; install the plugin"):
        ff_kernels.find("mine")
    ff_kernels.register("theirs", other)
    ff_kernels.register("ours", other)
    with pytest.raises(CapreseError, match=r"found 'mine'; registered: ours, theirs;"):
        ff_kernels.make("mine", reference, METHOD, {})


def test_without_an_extension_the_backend_stays_itself() -> None:
    assert ff_kernels.make(None, reference, METHOD, {}) is reference


def test_a_core_needs_kernels_for_it() -> None:
    class Older:
        NAME = "older"

    ff_kernels.register("older", lambda backend, method, blocks: Older())
    ff_kernels.register("whole", one)
    assert ff_kernels.make("older", reference, METHOD, {}).NAME == "older"
    for method in (replace(METHOD, core=0.5), replace(METHOD, prior=1.0)):
        assert ff_kernels.make("whole", reference, method, {}) is reference
        with pytest.raises(CapreseError, match=r"FF kernels 'older': expected a function core_ff, .*; found none; add"):
            ff_kernels.make("older", reference, method, {})


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_only_kernels_made_for_them_run_in_full_graphs(cuda_graphs: bool) -> None:
    ff_kernels.register("mine", other, cuda_graphs=cuda_graphs)
    compilation = SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, splitting_ops=["vllm::attention"])
    config = SimpleNamespace(compilation_config=compilation, use_v2_model_runner=True)
    _choose_graphs(config, SimpleNamespace(NAME="triton"), "mine")
    kept = CUDAGraphMode.FULL_AND_PIECEWISE if cuda_graphs else CUDAGraphMode.PIECEWISE
    assert compilation.cudagraph_mode == kept
