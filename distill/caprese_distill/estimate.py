"""What a distillation will take, before it begins: memory by arithmetic, time by a few of its own batches.

Memory is known from shapes alone (a model on torch's meta device will do), so that what cannot fit is told before any
weight is read. Peak = process + weights + the most that a stage adds. With D the hidden size, F neurons, r the rank:

    moments     X'X and X'E, fitted and held out, float64: 32 D^2 bytes a sparse layer
    solve       eight D x D matrices in float64 beside them
    weighted    twice those moments; the activations of a training step, or of LOGIT_ROWS tokens' distributions
    training    L, R, their gradients and Adam's two averages in float32: 32 D r bytes a sparse layer
    activations of the largest batch, from what each layer's operations keep (see `_Batch`)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from caprese_kernels.config import BaseModelInfo, Method
from caprese_kernels.errors import CapreseError

from .blocks import find_blocks
from .data.samples import Sample, split
from .end_to_end.train import Recipe, steps_of
from .layer_wise.adam import AdamSettings, LowRank
from .layer_wise.closed_form import feeding, make_batches, pack
from .layer_wise.moments import Batch, Moments, Sink
from .layer_wise.solve import RIDGES, reduced_rank
from .layer_wise.weighted import LOGIT_ROWS, Gradients
from .placement import return_freed
from .stages import Remaining
from .student import Student, frozen

# What loading and running add to a process that has imported torch and transformers: the model's own code, threads'
# stacks, the matrix library's buffers. Measured with transformers 5.19, torch 2.13: 40 to 70 MiB on a CPU.
RUNNING = 64 << 20
PROBES = 3  # batches of a stage that are timed


@dataclass(frozen=True)
class Memory:
    """Bytes where the model runs: `always`, and by stage what it adds; keys say what they are. `host` is the same
    for the process beside a GPU, and empty without one. `disk` is what files beside the output take at the most."""

    always: dict[str, int]
    stages: dict[str, dict[str, int]]
    host: dict[str, int] = field(default_factory=dict)
    disk: int = 0
    output: int = 0

    @property
    def peak(self) -> int:
        return sum(self.always.values()) + max(sum(parts.values()) for parts in self.stages.values())

    @property
    def host_peak(self) -> int:
        return sum(self.host.values()) if self.host else self.peak


def estimate_memory(
    model: Any,
    samples: Sequence[Sample],
    info: BaseModelInfo,
    method: Method,
    recipe: Recipe | None,
    device: torch.device,
    stored: torch.dtype,
    adam: AdamSettings | None = None,
    weighting: bool = False,
) -> Memory:
    """Memory of `run_stages` with these arguments, for `model` on any device, meta included.

    `stored` is the dtype of the checkpoint's files, which are mapped while they are read and count as resident
    then; without a conversion a CPU's weights are that mapping itself.
    """
    size = model.dtype.itemsize
    count = sum(p.numel() for p in model.parameters())
    depth, layers = info.hidden_size, len(method.layers)
    pairs = 2 * depth * method.rank * layers  # parameters of L and R
    moments = 32 * depth**2 * layers
    fed = [_Batch(batch, model, info, method) for batch in make_batches(samples, device)]
    stages = {
        "loading": {"the file, beside its conversion": count * stored.itemsize if stored != model.dtype else 0},
    }
    activations = {"activations": max(b.observed for b in fed)}
    in_lists = 8 * pairs if device.type == "cuda" else 0  # Adam's own work there
    if adam is None:
        sums = {f"moments of {layers} layers": moments}
        stages["layer-wise"] = sums | activations
        stages["closed form"] = sums | {"one layer's solution": 8 * 8 * depth**2}
        disk = moments
    else:
        stages["layer-wise"] = {"L and R, gradients, Adam": 16 * pairs + in_lists} | activations
        disk = 12 * pairs
    if weighting:
        stages["weighted"] = {
            f"moments of {layers} layers, alike and weighted": 2 * moments,
            "L and R": (4 + size) * pairs,
            "activations with gradient checkpointing": max(b.weighted for b in fed),
        }
        disk = 2 * moments
    if recipe is not None:
        steps = steps_of(split(samples)[0], recipe)
        longest = max((b for step in steps for b in pack(step, device)), key=lambda b: b.num_padded)
        batch = _Batch(longest, model, info, method)
        checkpointed = recipe.gradient_checkpointing
        stages["end to end"] = {
            "L and R, gradients, Adam": 16 * pairs + in_lists,
            "layer-wise L and R": size * pairs,
            f"activations with{'' if checkpointed else 'out'} gradient checkpointing": batch.trained(checkpointed),
        }
        disk = max(disk, 12 * pairs) + (2 if weighting else 1) * size * pairs
    process, output = psutil.Process().memory_info().rss, size * pairs
    disk = 2 * disk + output  # a checkpoint's successor is written beside it
    weights = {f"weights, {count:,} in {str(model.dtype).removeprefix('torch.')}": count * size}
    own = {"python, torch, transformers": process + RUNNING}
    if device.type == "cpu":
        return Memory(own | weights, stages, disk=disk, output=output)
    mapped = sum(stages.pop("loading").values())
    copies = max(0 if adam else moments, 16 * pairs)
    host = own | {"weights on their way, or a checkpoint's tensors": max(count * size + mapped, copies)}
    return Memory(weights, stages, host, disk, output)


class _Batch:
    """Bytes of activations of one batch, in a layer of the model's dtype of s bytes, per token (padding included):

    moments   z (and CATS: g) [F], seven of the size [D]; for generated tokens the mask and the dropped part, [F];
              for the longest prompt GRIFFIN's squares in float32, or CATS's magnitudes in int64
    training  kept by a layer: the activation's input and output and W_1's output, s [F] each, the mask [F]; two
              norms' input and output in float32 [D]; queries, keys and values, before and after their positions;
              eager attention: scores and their softmax in float32, [heads, T].
              Beside what is kept, a backward pass holds two gradients [F] and two [D]
    """

    def __init__(self, batch: Batch, model: Any, info: BaseModelInfo, method: Method):
        self.tokens, self.rows = batch.num_padded, sum(s.num_rows for s in batch.samples)
        self.prompt = max(s.prompt_length for s in batch.samples)
        self.size, self.depth, self.neurons = model.dtype.itemsize, info.hidden_size, info.intermediate_size
        self.cats, self.rank = method.name == "cats", method.rank
        config = model.config.get_text_config()
        self.words, heads = config.vocab_size, config.num_attention_heads
        width = getattr(config, "head_dim", None) or self.depth // heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        self.attention = self.size * width * 2 * (2 * heads + 2 * groups)
        if config._attn_implementation == "eager":
            self.attention += heads * max(len(s.ids) for s in batch.samples) * (4 + self.size)
        self.first, self.sparse, self.layers = min(method.layers), len(method.layers), info.num_hidden_layers

    @property
    def observed(self) -> int:
        """The pass of the original model that sums the moments."""
        s, d, f = self.size, self.depth, self.neurons
        block = self.tokens * s * (f * (2 if self.cats else 1) + 7 * d)
        return block + max(self.rows * (f * (1 + 2 * s) + d * (8 + s)), self._selection) + 8 * d * d

    def trained(self, checkpointed: bool) -> int:
        """Both passes of a training step, and the gradients."""
        s, d, f = self.size, self.depth, self.neurons
        layer = self.tokens * (f * 3 * s + d * (16 + 2 * s) + self.attention)
        own = self.tokens * f + self.rows * s * (d + self.rank)  # what a sparse layer keeps besides
        behind = self.layers - self.first - 1  # the input of the first block with L and R needs no gradient
        kept = behind * self.tokens * s * d + layer + own if checkpointed else behind * layer + self.sparse * own
        return kept + max(self.tokens * s * (2 * f + 2 * d), self._selection) + self.rows * d * (8 + s)

    @property
    def weighted(self) -> int:
        """The weighted closed form: every sparse layer's x, e, y, probe and gradient, and the most of two moments: some
        tokens' distributions (two, their logits and gradients, in float32), then the backward pass."""
        s, d = self.size, self.depth
        behind = (self.layers - self.first - 1) * self.tokens * s * d
        distributions = 5 * 4 * min(LOGIT_ROWS, self.rows) * self.words
        return max(self.trained(True), behind + distributions) + self.sparse * self.rows * s * d * 5

    @property
    def _selection(self) -> int:
        return self.prompt * self.neurons * (8 + 2 * self.size if self.cats else 16)


def check_memory(memory: Memory, device: torch.device) -> str | None:
    """CapreseError where a GPU has less free memory than the peak; on a CPU, whose system may still find some
    (the weights' file is only mapped), a warning or None."""
    fix = "use --stage layer-wise, fewer --layers, a lower --max-length, or a smaller --dtype"
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if memory.peak > free:
            raise CapreseError(
                "device memory",
                expected=f"{gib(memory.peak)} free for this distillation",
                found=gib(free),
                fix=f"{fix}, or --device cpu",
            )
    needed = memory.host_peak - psutil.Process().memory_info().rss
    free = psutil.virtual_memory().available
    if needed > free:
        return f"memory: {gib(needed)} more are needed, {gib(free)} are available: it may be killed; {fix}"
    return None


def check_disk(memory: Memory, output: Path, held: int) -> None:
    """CapreseError where the output's file system lacks room for checkpoints and output; `held` bytes of them are
    there already."""
    place = next(p for p in output.absolute().parents if p.exists())
    free = psutil.disk_usage(str(place)).free
    if free + held < memory.disk:
        raise CapreseError(
            f"output {output}",
            expected=f"{gib(memory.disk)} of free disk for the adapter and its checkpoints",
            found=gib(free),
            fix="free some space, or give another --output",
        )


def gib(size: int) -> str:
    """Bytes as a user reads them."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most bytes so far: `host`, resident in this process (mapped files that were read count), and on a GPU
    `device`, of tensors there."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss may be that of the process which started this one
        kibibytes = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        found = {"host": kibibytes << 10}
    else:
        import resource

        found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    return found | ({"device": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {})


def estimate_seconds(
    model: Any,
    info: BaseModelInfo,
    method: Method,
    recipe: Recipe | None,
    samples: Sequence[Sample],
    left: Remaining,
    adam: AdamSettings | None = None,
) -> dict[str, float]:
    """Seconds of every stage that is not done yet, by running small parts of it; they change nothing."""
    seconds: dict[str, float] = {}
    device = next(model.parameters()).device
    model.eval()
    if left.batches:
        sink: Sink
        if adam is None:
            sink = Moments.zeros(info.hidden_size, device)
        else:
            sink = LowRank(info.hidden_size, method.rank, torch.Generator().manual_seed(0), device)
        name = "original model" if adam is None else "Adam"
        seconds[name] = _seconds_of_pass(model, info, method, left.batches, sink)
    if left.weighted:
        seconds["gradients"] = _seconds_of_gradients(model, info, method, left.weighted)
    if left.layers:
        seconds["closed form"] = len(left.layers) * _seconds_of_solve(info.hidden_size, method.rank, device)
    if recipe is not None and (left.steps or left.looks):
        seconds["end to end"] = _seconds_of_training(model, info, method, recipe, samples, left)
    return seconds


@torch.no_grad()
def _seconds_of_pass(model: Any, info: BaseModelInfo, method: Method, batches: Sequence[Batch], sink: Sink) -> float:
    """One sink takes the rows of all layers: memory of one layer, and the same work."""
    device = next(model.parameters()).device
    sinks, chosen = dict.fromkeys(method.layers, sink), _spread(batches)
    with feeding(model, info, method) as feed:
        feed(_small(batches), sinks)
        seconds = _timed(device, lambda: [feed(batch, sinks) for batch in chosen])
    return seconds / _padded(chosen) * _padded(batches)


def _seconds_of_gradients(model: Any, info: BaseModelInfo, method: Method, batches: Sequence[Batch]) -> float:
    """The pass of the weighted closed form; one layer's sums, twice, stand for those of all."""
    device, chosen = next(model.parameters()).device, _spread(batches)
    blocks, sums = find_blocks(model, info, method.layers), Moments.zeros(info.hidden_size, device)

    def feed(batch: Batch) -> None:
        target = student.original(batch)
        for gradient in gradients(batch, target).values():
            for _ in range(2):
                sums.add(target, gradient, target)

    with (
        frozen(model, True),
        Student(model, blocks, method, *_zeros(info, method)) as student,
        Gradients(model, blocks, student) as gradients,
    ):
        feed(_small(batches))
        seconds = sum(_timed(device, partial(feed, batch)) for batch in chosen)
    return seconds / _padded(chosen) * _padded(batches)


def _zeros(info: BaseModelInfo, method: Method) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """L and R."""
    shapes = ((info.hidden_size, method.rank), (method.rank, info.hidden_size))
    left, right = ({i: torch.zeros(shape) for i in method.layers} for shape in shapes)
    return left, right


def _seconds_of_solve(depth: int, rank: int, device: torch.device) -> float:
    """One layer's: the same for every ridge, so that one will do."""
    rows = torch.randn(2 * depth, 2 * depth, generator=torch.Generator().manual_seed(0)).to(device)
    moments = Moments.zeros(depth, device)
    moments.add(rows[:, :depth], rows[:, depth:], rows[:, :depth])

    def solve_one() -> None:
        found = reduced_rank(moments, rank, RIDGES[len(RIDGES) // 2])
        assert found is not None
        moments.error(*found)

    return len(RIDGES) * _timed(device, solve_one)


def _seconds_of_training(
    model: Any, info: BaseModelInfo, method: Method, recipe: Recipe, samples: Sequence[Sample], left: Remaining
) -> float:
    device = next(model.parameters()).device
    batches = [batch for step in left.steps for batch in pack(step, device)]
    held_out = [batch for batch in make_batches(samples, device) if batch.held_out]
    chosen = _spread(batches or held_out)
    blocks = find_blocks(model, info, method.layers)
    losses: list[Tensor] = []

    def look(batch: Batch) -> None:
        target = student.original(batch).float()
        losses.append((student(batch).float() - target).square().sum())

    with frozen(model, recipe.gradient_checkpointing), Student(model, blocks, method, *_zeros(info, method)) as student:
        look(_small(chosen))
        losses.pop().backward()
        return_freed()
        forward, backward = 0.0, 0.0
        for batch in chosen:
            forward += _timed(device, partial(look, batch))
            backward += _timed(device, losses.pop().backward)
            return_freed()
        optimizer = torch.optim.Adam(student.parameters())
        optimizer.step()  # makes its state
        update = _timed(device, optimizer.step)
    rate = forward / _padded(chosen)
    looks = left.looks * rate * _padded(held_out)
    return (rate + backward / _padded(chosen)) * _padded(batches) + len(left.steps) * update + looks


def _spread(batches: Sequence[Batch]) -> list[Batch]:
    """PROBES of them, from the largest to the smallest."""
    ordered = sorted(batches, key=lambda b: b.num_padded)
    return [ordered[len(ordered) * (2 * i + 1) // (2 * PROBES)] for i in range(PROBES)]


def _small(batches: Sequence[Batch]) -> Batch:
    """To warm up with: one sample, the shortest."""
    shortest = min((s for batch in batches for s in batch.samples), key=lambda s: len(s.ids))
    return Batch([shortest], False, batches[0].device)


def _padded(batches: Sequence[Batch]) -> int:
    return sum(batch.num_padded for batch in batches)


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(time.monotonic() - started, math.ulp(1.0))
