"""The Triton kernels compiled for an H200 (sm_90), on any machine: Triton brings its own assembler.

The interpreter takes more than the compiler does, and it does not know how wide a load is. The launchers run as they
are; each launch is compiled for its arguments instead of being run. `test_gpu.py` runs this module as a process.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from caprese_kernels import gpu, reference
from caprese_kernels.gpu import tuning
from caprese_kernels.packed import PackedFF
from tools.compile_kernels.compiling import Compiled, Launch, intercepted


@pytest.fixture
def compiled() -> Iterator[dict[str, Compiled]]:
    """What the launches since then were compiled to, by kernel."""
    found: dict[str, Compiled] = {}

    def keep(launch: Launch) -> None:
        found[launch.name] = launch.compile(90)

    with intercepted(keep):
        yield found


def block(depth: int, neurons: int, rank: int, dtype: torch.dtype, act: str, gated: bool, biased: bool) -> PackedFF:
    inputs = neurons * (2 if gated else 1)
    weights = torch.zeros(inputs + rank, depth, dtype=dtype), torch.zeros(neurons + rank, depth, dtype=dtype)
    biases = (torch.zeros(inputs, dtype=dtype), torch.zeros(depth, dtype=dtype)) if biased else (None, None)
    return PackedFF(*weights, act, rank, *biases)


@pytest.mark.parametrize("tokens", [1, 16])
def test_rows_are_read_wide_and_ahead(compiled: dict[str, Compiled], tokens: int) -> None:
    """bfloat16 and aligned rows: weights come 16 bytes a thread, copied asynchronously, several stages ahead."""
    ff, keep = block(256, 512, 16, torch.bfloat16, "silu", True, False), torch.zeros(4, 512, dtype=torch.bool)
    x, slots = torch.zeros(tokens, 256, dtype=torch.bfloat16), torch.zeros(tokens, dtype=torch.int64)
    found = {}
    gpu.griffin_ff(x, ff, keep, slots, path="gather")
    found |= {f"griffin {name}": kernel for name, kernel in compiled.items()}
    gpu.cats_ff(x, ff, torch.zeros(4), slots, path="gather")
    found |= {"cats up": compiled["cats_up"], "cats down": compiled["down"]}
    for name, kernel in found.items():
        ptx = kernel.asm["ptx"]
        if name != "griffin plan_rows":
            # .cg is the form of 16 bytes; it appears for each of several stages.
            assert len(re.findall(r"cp\.async\.cg\.shared\.global", ptx)) >= 6, name
            # One token: values also come out of shared memory 16 bytes at a time.
            assert tokens > 1 or re.search(r"ld\.shared\.v4", ptx), name
        assert ("mma" in ptx) == (tokens == 16 and name != "griffin plan_rows"), name
    assert "atom.global.gpu.acq_rel.add" in found["griffin down"].asm["ptx"]


@pytest.mark.parametrize("dependent", [True, False])
def test_dependent_launches_wait(
    compiled: dict[str, Compiled], monkeypatch: pytest.MonkeyPatch, dependent: bool
) -> None:
    """Before the first load: a kernel that may start early must not read what the one before has not written."""
    monkeypatch.setattr(tuning, "dependent_launch", lambda device: dependent)
    ff, slots = block(64, 64, 16, torch.bfloat16, "silu", True, False), torch.zeros(1, dtype=torch.int64)
    x, keep = torch.zeros(1, 64, dtype=torch.bfloat16), torch.zeros(4, 64, dtype=torch.bool)
    gpu.griffin_ff(x, ff, keep, slots, path="gather")
    gpu.cats_ff(x, ff, torch.zeros(4), slots, path="gather")
    for name in ("griffin_up", "cats_up", "down"):
        ptx, waits = compiled[name].asm["ptx"], "griddepcontrol.wait"
        assert (waits in ptx) == dependent, name
        assert ("griddepcontrol.launch_dependents" in ptx) == dependent, name
        if dependent:
            before = ptx[: ptx.index(waits)]
            assert not re.search(r"(ld|st|atom|red)\.global|cp\.async", before), name


@pytest.mark.parametrize(
    ("ff", "tokens"),
    [
        pytest.param(block(1, 1, 1, torch.bfloat16, "relu", True, True), 1, id="ones"),
        pytest.param(block(33, 45, 3, torch.float32, "gelu", False, True), 17, id="fp32"),
        pytest.param(block(33, 45, 0, torch.float16, "gelu_pytorch_tanh", True, True), 2, id="fp16"),
    ],
)
def test_any_size(compiled: dict[str, Compiled], ff: PackedFF, tokens: int) -> None:
    """Sizes of 1, which Triton makes constants; odd ones, whose rows are not aligned; each dtype and activation."""
    dtype, neurons = ff.down_plus.dtype, ff.num_neurons
    x, slots = torch.zeros(tokens, ff.hidden_size, dtype=dtype), torch.zeros(tokens, dtype=torch.int64)
    keep, tau = torch.zeros(2, neurons, dtype=torch.bool), torch.zeros(2)
    for path in ("gather", "masked"):
        gpu.griffin_ff(x, ff, keep, slots, path=path)
        gpu.cats_ff(x, ff, tau, slots, path=path)
    gpu.dense_ff(x, ff)
    assert set(compiled) == {"plan_rows", "griffin_up", "cats_up", "down", "_activate_and_mask"}


def test_scales(compiled: dict[str, Compiled]) -> None:
    """Each kernel that knows neurons' scales also compiles with them."""
    scale, slots = torch.ones(64), torch.zeros(2, dtype=torch.int64)
    ff = replace(block(48, 64, 4, torch.bfloat16, "silu", True, False), scale=scale)
    for path in ("gather", "masked"):
        gpu.cats_ff(torch.zeros(2, 48, dtype=torch.bfloat16), ff, torch.zeros(2), slots, path=path)
    z, offsets = torch.zeros(40, 64, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64)
    for norms in (None, gpu.griffin_norms(z, scale)):
        gpu.griffin_observe(z, offsets, slots[:1], torch.zeros(2, 64), norms, scale)
    histogram = torch.zeros(2, reference.NUM_MAGNITUDES, dtype=torch.int64)
    gpu.cats_observe(z, "silu", offsets, slots[:1], histogram, scale)
    assert {"cats_up", "_activate_and_mask", "_norms", "_partial_statistics", "_count"} <= set(compiled)


@pytest.mark.parametrize(("tokens", "neurons", "segments"), [(1, 1, 1), (40, 64, 3)])
def test_statistics(compiled: dict[str, Compiled], tokens: int, neurons: int, segments: int) -> None:
    z, offsets = torch.zeros(tokens, neurons, dtype=torch.bfloat16), torch.zeros(segments + 1, dtype=torch.int64)
    slots = torch.zeros(segments, dtype=torch.int64)
    gpu.griffin_observe(z, offsets, slots, torch.zeros(2, neurons))
    gpu.griffin_observe(z, offsets, slots, torch.zeros(2, neurons), gpu.griffin_norms(z))
    gpu.cats_observe(z, "silu", offsets, slots, torch.zeros(2, reference.NUM_MAGNITUDES, dtype=torch.int64))
    gpu.griffin_select(torch.zeros(segments, neurons), 1)
    assert set(compiled) == {"_norms", "_partial_statistics", "_add_statistics", "_count", "_select"}


def test_steps_of_any_size_take_the_same_kernels() -> None:
    """No user waits for a compiler because the number of prompts or of requests is new."""
    z, ff = torch.zeros(40, 64, dtype=torch.bfloat16), block(48, 64, 4, torch.bfloat16, "silu", True, False)
    keep, tau = torch.zeros(4, 64, dtype=torch.bool), torch.zeros(4)

    def variants(sizes: range, call: Callable[[int], object]) -> dict[str, int]:
        found = set()
        with intercepted(lambda launch: found.add(launch.variant)):
            for size in sizes:
                call(size)
        names = [name for name, *_ in found]
        return {name: names.count(name) for name in names}

    def observe(prompts: int) -> None:
        offsets, slots = torch.zeros(2 * prompts + 1, dtype=torch.int64), torch.zeros(2 * prompts, dtype=torch.int64)
        gpu.griffin_observe(z, offsets, slots, torch.zeros(4, 64))
        gpu.cats_observe(z, "silu", offsets, slots, torch.zeros(4, reference.NUM_MAGNITUDES, dtype=torch.int64))

    def decode(tokens: int) -> None:
        x, slots = torch.zeros(tokens, 48, dtype=torch.bfloat16), torch.zeros(tokens, dtype=torch.int64)
        gpu.griffin_ff(x, ff, keep, slots, path="gather")
        gpu.cats_ff(x, ff, tau, slots, path="gather")

    assert variants(range(1, 32), observe) == {"_partial_statistics": 1, "_add_statistics": 1, "_count": 1}
    found = variants(range(2, 17), decode)
    assert found.pop("plan_rows") == 4, "for 2, 4, 8 and 16 tokens"
    assert found == {"griffin_up": 1, "cats_up": 1, "down": 2}
