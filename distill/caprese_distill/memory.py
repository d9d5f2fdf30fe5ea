"""Estimates a distillation's memory by arithmetic, before any weight is read, and checks what the machine has.

Shapes alone are enough (a model on torch's meta device will do). Peak = process + weights + the most that a stage adds.
With D the hidden size, F neurons, r the rank:

    moments     X'X and X'E, fitted and held out, float64: 32 D^2 bytes a sparse layer
    solve       eight D x D matrices in float64 beside them
    weighted    twice those moments; the activations of a training step, or of LOGIT_ROWS tokens' distributions
    training    L, R, those of the best epoch, their gradients and Adam's two averages in float32: 40 D r bytes a sparse
                layer; for a loss of logits, LOGIT_ROWS tokens' distributions before the backward pass
    core        where all tokens keep the same k neurons, copies: D (F - k) values of a layer's W_2 layer-wise, and in
                training the 3 D k values of the neurons kept
    activations of the largest batch, from what each layer's operations keep (see `_BatchMemory`)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from caprese_kernels.config import BaseModelInfo, Method
from caprese_kernels.errors import CapreseError
from caprese_kernels.reference import griffin_count

from .data.batches import Batch, make_batches, pack
from .data.samples import split
from .end_to_end.train import steps_of
from .head import LOGIT_ROWS
from .work import Work

# What loading and running a model add to a process that has imported torch and transformers: its code, threads' stacks,
# the matrix library's buffers. Measured with transformers 5.19, torch 2.13: 40 to 70 MiB on a CPU.
RUNNING = 64 << 20


@dataclass(frozen=True)
class Memory:
    """Bytes by what takes them (the keys name it).

    always  on the device where the model runs, in every stage     stages  on that device, added by each stage
    host    in the process beside a GPU; empty without a GPU       disk    the most that files beside the output take
    output  the adapter file
    """

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


def estimate_memory(model: Any, work: Work, device: torch.device, stored: torch.dtype) -> Memory:
    """Memory of `run_stages` for `work` on `device`; `model` may be on any device, meta included.

    `stored` is the dtype of the checkpoint's files. They are mapped while they are read, and count as resident then;
    on a CPU, weights of that dtype are the mapping itself.
    """
    samples, info, method, recipe, adam = work.samples, work.info, work.method, work.recipe, work.adam
    size = model.dtype.itemsize
    count = sum(p.numel() for p in model.parameters())
    depth, layers = info.hidden_size, len(method.layers)
    pairs = 2 * depth * method.rank * layers  # parameters of L and R
    moments = 32 * depth**2 * layers
    fed = [_BatchMemory(batch, model, info, method) for batch in make_batches(samples, device)]
    stages = {
        "loading": {"the file, beside its conversion": count * stored.itemsize if stored != model.dtype else 0},
    }
    activations = {"activations": max(b.observed for b in fed)}
    kept, dropped = _copies(info, method, size)
    in_lists = 8 * pairs if device.type == "cuda" else 0  # Adam's own work there
    if adam is None:
        sums = {f"moments of {layers} layers": moments}
        stages["layer-wise"] = sums | activations | dropped
        stages["closed form"] = sums | {"one layer's solution": 8 * 8 * depth**2}
        disk = moments
    else:
        stages["layer-wise"] = {"L and R, gradients, Adam": 16 * pairs + in_lists} | activations | dropped
        disk = 12 * pairs
    if work.weighting:
        stages["weighted"] = {
            f"moments of {layers} layers, unweighted and weighted": 2 * moments,
            "L and R": (4 + size) * pairs,
            "activations with gradient checkpointing": max(b.weighted for b in fed),
        } | (kept | dropped)
        disk = 2 * moments
    if recipe is not None:
        steps = steps_of(split(samples)[0], recipe)
        largest = max((b for step in steps for b in pack(step, device)), key=lambda b: b.num_padded)
        batch = _BatchMemory(largest, model, info, method)
        checkpointed = recipe.gradient_checkpointing
        stages["end to end"] = {
            "L and R, the best epoch's, gradients, Adam": 20 * pairs + in_lists,
            "layer-wise L and R": size * pairs,
            f"activations with{'' if checkpointed else 'out'} gradient checkpointing": batch.trained(
                checkpointed, recipe.loss != "hidden"
            ),
        } | kept
        disk = max(disk, 16 * pairs) + (2 if work.weighting else 1) * size * pairs
    process, output = psutil.Process().memory_info().rss, size * pairs
    disk = 2 * disk + output  # the next checkpoint is written beside the last one
    weights = {f"weights, {count:,} in {str(model.dtype).removeprefix('torch.')}": count * size}
    process_itself = {"python, torch, transformers": process + RUNNING}
    if device.type == "cpu":
        return Memory(process_itself | weights, stages, disk=disk, output=output)
    mapped = sum(stages.pop("loading").values())
    copies = max(0 if adam else moments, 16 * pairs)
    host = process_itself | {"weights while loading, or a checkpoint's tensors": max(count * size + mapped, copies)}
    return Memory(weights, stages, host, disk, output)


def _copies(info: BaseModelInfo, method: Method, size: int) -> tuple[dict[str, int], dict[str, int]]:
    """The neurons that all tokens keep, and those that they drop; empty where each request has its own."""
    if method.needs_statistic:
        return {}, {}
    count = sum(griffin_count(method.at(i).density, info.intermediate_size) for i in method.layers)
    a_neuron = size * info.hidden_size
    kept, dropped = 3 * a_neuron * count, a_neuron * (len(method.layers) * info.intermediate_size - count)
    return {"the kept neurons' weights, copied": kept}, {"the dropped neurons' rows of W_2, copied": dropped}


class _BatchMemory:
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
        """Bytes of the pass of the original model that sums the moments."""
        s, d, f = self.size, self.depth, self.neurons
        block = self.tokens * s * (f * (2 if self.cats else 1) + 7 * d)
        return block + max(self.rows * (f * (1 + 2 * s) + d * (8 + s)), self._selection) + 8 * d * d

    def trained(self, checkpointed: bool, logits: bool = False) -> int:
        """Bytes of both passes of a training step, and of the gradients; `logits`: of a loss of distributions."""
        s, d, f = self.size, self.depth, self.neurons
        layer = self.tokens * (f * 3 * s + d * (16 + 2 * s) + self.attention)
        own = self.tokens * f + self.rows * s * (d + self.rank)  # kept by a sparse layer in addition
        behind = self.layers - self.first - 1  # the input of the first block with L and R needs no gradient
        kept = behind * self.tokens * s * d + layer + own if checkpointed else behind * layer + self.sparse * own
        backward = max(self.tokens * s * (2 * f + 2 * d), self._selection, self._distributions if logits else 0)
        return kept + backward + self.rows * d * (8 + s)

    @property
    def weighted(self) -> int:
        """Bytes of the weighted closed form: every sparse layer's x, e, y, probe and gradient; and the larger of the
        distributions of LOGIT_ROWS tokens (two, their logits and gradients, in float32) and the backward pass."""
        s, d = self.size, self.depth
        behind = (self.layers - self.first - 1) * self.tokens * s * d
        return max(self.trained(True), behind + self._distributions) + self.sparse * self.rows * s * d * 5

    @property
    def _distributions(self) -> int:
        """Two distributions of LOGIT_ROWS tokens, their logits and gradients, in float32."""
        return 5 * 4 * min(LOGIT_ROWS, self.rows) * self.words

    @property
    def _selection(self) -> int:
        return self.prompt * self.neurons * (8 + 2 * self.size if self.cats else 16)


def check_memory(memory: Memory, device: torch.device) -> str | None:
    """CapreseError if a GPU has less free memory than the peak. For the CPU's memory a warning, or None if it suffices:
    the system may still find some, since the weights' file is only mapped."""
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
        return f"memory: needs {gib(needed)} more, {gib(free)} are available: the system may kill the process; {fix}"
    return None


def check_disk(memory: Memory, output: Path, held: int) -> None:
    """CapreseError if the output's file system lacks room for checkpoints and output, of which `held` bytes exist
    already."""
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
    """The peak so far in bytes: "host", resident in this process (including mapped files that were read); and, for a
    GPU, "device", of tensors on it."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss may come from the process that started this one
        kibibytes = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        found = {"host": kibibytes << 10}
    else:
        import resource

        found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    return found | ({"device": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {})
