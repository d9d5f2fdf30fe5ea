"""A distillation from its settings to the adapter file: data, model, plan, stages, result.

from caprese_distill import DistillConfig, distill

result = distill(DistillConfig(model="Qwen/Qwen2.5-1.5B-Instruct", data="openai/gsm8k:main", rank=128))
print(result.adapter, result.held_out_errors)
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from caprese_kernels import files
from caprese_kernels.config import BaseModelInfo, Method
from caprese_kernels.errors import CapreseError
from caprese_kernels.hub import check_upload
from caprese_kernels.memory import out_of_memory

from .blocks import adapter_config, find_blocks
from .calibration import calibrated_densities, check_calibration, read_calibration
from .card import write_card
from .config import DistillConfig
from .data.bad_rows import BadRows
from .data.chat import ChatRenderer
from .data.generate import Generated, Generation, generate_samples
from .data.samples import Sample, split
from .data.sources import Source
from .end_to_end.train import Recipe, default_learning_rate
from .inputs import (
    chat_renderer,
    check_samples,
    check_writable,
    encode_rows,
    note_remarks,
    read_rows,
    resolve_selection,
)
from .layer_wise.adam import AdamSettings
from .loading import (
    find_device,
    load_model,
    load_model_on,
    load_skeleton,
    load_small_parts,
    memory_error,
    stored_dtype,
)
from .memory import check_disk, check_memory, estimate_memory
from .plan import DistillationPlan, Estimate
from .progress import note
from .push import push
from .quality import MAX_HELD_OUT
from .report import library_versions
from .result import Result
from .scale.cluster import Cluster
from .scale.pool import connect
from .scale.ray_training import Workers
from .stage_files import all_progress, clean_up, held_bytes, scratch_path
from .stages import executor_of, remaining_work, run_stages
from .timing import estimate_seconds
from .work import Work


def distill(config: DistillConfig, console: Console | None = None) -> Result:
    """Make the adapter file that `config` describes, and its model card; what `caprese distill` does.

    `console` gets remarks and progress bars. A killed or failed run continues where it stopped when it is called again
    with the same settings. CapreseError for what cannot work: data, model or settings that do not fit, too little
    memory or disk.
    """
    with files.output_lock(config.output):
        return Job(config, console).run()


class Job:
    """One distillation. `run` does all of it; `plan` and `estimate` are its first steps, and write nothing.

    (With `generate`, the plan needs the responses: it makes them, and keeps them beside the output.)
    """

    def __init__(self, config: DistillConfig, console: Console | None = None):
        self.config, self._calibrated = read_calibration(config)
        self.console = console or Console(quiet=True)
        self._plan: DistillationPlan | None = None
        self._estimate: Estimate | None = None
        self._model: Any = None  # a transformers causal LM, or the Cluster whose workers have it
        self._provenance: dict[str, Any] = {}
        self._generated: Generated | None = None

    @property
    def _on_one_device(self) -> bool:
        """Memory and time of several devices, or several processes that resume, are not estimated."""
        return self.config.num_workers == 1 and self.config.device_map is None

    @property
    def _device(self) -> torch.device:
        """The device that the model runs on; Ray's workers may have GPUs that this machine lacks."""
        return find_device("auto" if self.config.num_workers > 1 else self.config.device)

    def plan(self) -> DistillationPlan:
        """Read the data, make the samples and check the model's shapes; reads no weights."""
        if self._plan is None:
            self._plan = self._make_plan()
        return self._plan

    def estimate(self) -> Estimate | None:
        """Check memory and disk, load the model, and time a few batches; None for several devices or processes."""
        plan, config = self.plan(), self.config
        if self._model is not None:
            return self._estimate
        check_disk(plan.memory, config.output, held_bytes(all_progress(config.output)))  # the least that it takes
        if self._on_one_device and (warning := check_memory(plan.memory, self._device)):
            self._note(warning)
        with _reported_memory():
            self._model = self._load_model()
            if self._on_one_device:
                remaining = remaining_work(self._model, plan.work, config.output)
                check_disk(plan.memory, config.output, held_bytes(remaining.files))
                seconds = estimate_seconds(self._model, plan.work, remaining)
                self._estimate = Estimate(plan.memory, seconds, remaining.resumed, self._device)
        return self._estimate

    def run(self) -> Result:
        """Run the stages that an earlier run has not finished; write the adapter, then its card."""
        config, plan, estimate = self.config, self.plan(), self.estimate()
        output = config.output
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _reported_memory():
                adapters = run_stages(self._model, plan.work, output, self.console, config.tensorboard)
                held_out = split(plan.work.samples)[1][:MAX_HELD_OUT]
                quality = executor_of(self._model).quality(held_out, adapters, self.console)
        except KeyboardInterrupt:
            self._note("interrupted; the same command continues from the last checkpoint")
            raise
        adapters.config.training |= {
            "quality": {name: asdict(found) for name, found in quality.items()},
            "data": self._provenance,
            "command": shlex.join(config.command()),
            "versions": library_versions(),
            "resources": asdict(estimate.usage()) if estimate else None,
        }
        adapters.save(output)
        responses = self._generated.keep() if self._generated else None  # before a killed run's files are removed
        clean_up(output)
        result = Result(output, write_card(adapters, output), responses, adapters)
        if config.push_to_hub is not None:
            self._note(f"uploaded: {push(config.push_to_hub, output, result.record(), adapters)}")
        return result

    def _make_plan(self) -> DistillationPlan:
        config = self.config
        if config.tensorboard is not None:
            _check_tensorboard(config.tensorboard)
        if config.push_to_hub is not None:
            check_upload(config.push_to_hub)
        bad_rows = BadRows(config.max_bad_rows)
        source = read_rows(config, bad_rows, responses=not config.generate)
        check_writable(config.output)
        device = self._device  # checked before the tokenizer is loaded
        for text in (str(source), *source.notes):
            self._note(text)
        model_config, tokenizer = load_small_parts(config.model)
        info, method = resolve_selection(config, model_config, config.rank)
        if self._calibrated:
            check_calibration(config, self._calibrated.config, info)
            method = calibrated_densities(method, self._calibrated.config)
        skeleton = load_skeleton(config.model, model_config, config.dtype)
        find_blocks(skeleton, info, method.layers)
        renderer = chat_renderer(config, model_config, tokenizer, self.console)
        samples = self._make_samples(source, model_config, renderer, bad_rows)
        fed = sum(s.num_rows for s in samples)
        if fed < info.hidden_size:
            self._note(f"only {fed} response tokens for hidden size {info.hidden_size}: give more samples")
        work = self._make_work(samples, info, method)
        memory = estimate_memory(skeleton, work, device, stored_dtype(model_config))
        return DistillationPlan(work, sum(p.numel() for p in skeleton.parameters()), len(source.rows), memory)

    def _make_samples(
        self, source: Source, model_config: Any, renderer: ChatRenderer, bad_rows: BadRows
    ) -> list[Sample]:
        """Token ids of the data's responses, or of those that the model generates."""
        config, self._provenance = self.config, source.provenance
        if not config.generate:
            return encode_rows(config, source, model_config, renderer, bad_rows, self.console)
        config.output.parent.mkdir(parents=True, exist_ok=True)
        settings = Generation(
            config.max_length,
            config.temperature,
            config.max_new_tokens,
            config.seed,
            config.dtype,
            config.engine or {},
        )
        self._generated = generate_samples(
            source.rows,
            renderer,
            config.model,
            model_config,
            config.output,
            settings,
            bad_rows,
            self.console,
        )
        note_remarks(renderer, source, self.console)
        self._provenance["generated"] = self._generated.provenance
        check_samples(config, self._generated.samples, self._generated.skipped, bad_rows, source, self.console)
        return self._generated.samples

    def _make_work(self, samples: list[Sample], info: BaseModelInfo, method: Method) -> Work:
        config = self.config
        recipe, adam = None, None
        if config.stage == "end-to-end":
            recipe = Recipe(
                config.learning_rate or default_learning_rate(info.hidden_size),
                config.batch,
                config.epochs,
                seed=config.seed,
                gradient_checkpointing=config.gradient_checkpointing,
                loss=config.loss,
            )
        if config.solver == "adam":
            adam = AdamSettings(
                config.layer_wise_learning_rate, config.layer_wise_batch, config.layer_wise_epochs, seed=config.seed
            )
        priors = self._calibrated.prior if self._calibrated else None
        collects = priors is None and adapter_config(info, method, {}).prior_required
        weighted = config.weighting == "gradient"
        return Work(samples, info, method, recipe, adam, weighted, priors, collects_priors=collects)

    def _load_model(self) -> Any:
        """The model in this process, or the Cluster whose workers load it."""
        config = self.config
        if config.device_map is not None:
            return load_model(config.model, config.dtype, config.device_map)
        if config.num_workers == 1:
            return load_model_on(config.model, config.dtype, self._device)
        device, resources = connect(config.num_workers, config.device)
        # Workers have working directories of their own.
        name = str(Path(config.model).absolute()) if Path(config.model).is_dir() else config.model
        load = partial(load_model_on, name, config.dtype, device)
        return Cluster(Workers(load, config.num_workers, resources, scratch_path(config.output)))

    def _note(self, text: str) -> None:
        note(self.console, text)


@contextlib.contextmanager
def _reported_memory() -> Iterator[None]:
    """Raise a lack of memory, the device's or the process's, as a CapreseError."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not out_of_memory(error):
            raise
        raise memory_error(error) from None


def _check_tensorboard(logs: Path) -> None:
    """CapreseError before the layer-wise stage, not after it."""
    if importlib.util.find_spec("tensorboard") is None:
        raise CapreseError(
            "--tensorboard",
            expected="the package tensorboard",
            found="none",
            fix='pip install "caprese-vllm[distill]"',
        )
    if any(path.exists() and not path.is_dir() for path in (logs, *logs.parents)):
        raise CapreseError("--tensorboard", expected="a directory", found=f"a file at {logs}", fix="give another path")
