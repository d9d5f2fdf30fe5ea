"""Several workers, here processes of this machine under a real Ray: the same adapters, whichever worker dies."""

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from caprese_distill import checkpoint
from caprese_distill.blocks import resolve_method
from caprese_distill.data.batches import BATCH_TOKENS, make_batches
from caprese_distill.data.samples import Sample, split
from caprese_distill.end_to_end.train import RankContext, Recipe, Trainer, distill_end_to_end
from caprese_distill.layer_wise.closed_form import distill_layer_wise
from caprese_distill.layer_wise.moments import Moments
from caprese_distill.layer_wise.passes import Pass, run_pass
from caprese_distill.prior import collect_priors
from caprese_distill.quality import measure_adapters
from caprese_distill.scale import cluster
from caprese_distill.scale import pool as workers_pool
from caprese_distill.scale.ray_training import Workers
from caprese_distill.work import Work
from caprese_kernels.errors import CapreseError
from tests.support.distill import ModelDir, make_samples

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
HALF = {"CPU": 0.5}


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    """Ray with three CPUs, however many the machine has."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(
        address="local",
        num_cpus=3,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        logging_level="ERROR",
        log_to_driver=False,
    )
    yield
    ray.shutdown()


def load(path: Path, mark: Path | None = None, deaths: int = 0, at: int = 3) -> Any:
    """The model; the first `deaths` processes that reach its batch `at` die there as by kill -9, leaving a mark."""
    torch.set_num_threads(1)
    checkpoint.CHECKPOINT_SECONDS = 0.0
    model = AutoModelForCausalLM.from_pretrained(path)
    batches = 0

    def die(*_: object) -> None:
        nonlocal batches
        batches += 1
        if mark is not None and batches == at and len(list(mark.parent.glob(f"{mark.name}.*"))) < deaths:
            (mark.parent / f"{mark.name}.{os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    model.get_decoder().register_forward_pre_hook(die)
    return model


def assert_equal(a: Pass, b: Pass, rtol: float = 0.0) -> None:
    assert a.batches == b.batches
    for part in ("fit", "held_out"):
        for i, moments in getattr(a, part).items():
            for f in fields(Moments):
                found, expected = getattr(moments, f.name), getattr(getattr(b, part)[i], f.name)
                torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return make_samples(60)


@pytest.fixture(scope="module")
def three(ray_cluster: None, model_dir: ModelDir) -> Iterator[workers_pool.Pool]:
    with workers_pool.Pool(partial(load, model_dir("llama")), 3, HALF) as pool:
        yield pool


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 64)  # this process cuts the batches, for all workers
    monkeypatch.setattr(cluster, "SHARDS", 9)
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0.0)


def test_more_workers_than_cpus_are_refused() -> None:
    assert workers_pool.connect(2) == workers_pool.connect(2, "cpu") == ("cpu", {"CPU": 1})
    with pytest.raises(CapreseError, match="--num-workers: expected at most 3, the CPUs that Ray has free; found 4"):
        workers_pool.connect(4)
    with pytest.raises(CapreseError, match="--num-workers: expected at most 0, the GPUs that Ray has free; found 2"):
        workers_pool.connect(2, "cuda")


@pytest.mark.parametrize(
    ("nodes", "workers", "threads"), [([8], 3, 2), ([8, 8], 3, 4), ([8, 8], 2, 8), ([16, 4], 4, 4), ([3, 1], 4, 1)]
)
def test_a_workers_cpus_are_on_one_node(nodes: list[int], workers: int, threads: int) -> None:
    """Otherwise Ray would wait for such a node."""
    assert workers_pool.threads_of(nodes, workers, sum(nodes)) == threads


def test_the_same_adapters_from_one_two_and_three_workers_one_of_them_killed(
    model_dir: ModelDir, samples: list[Sample], three: workers_pool.Pool, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
    info, method = resolve_method(model.config, "m", "griffin", 0.5, 8)
    one = run_pass(model, samples, info, method)
    of_three = cluster.run_pass(three, samples, info, method)
    dying = partial(load, model_dir("llama"), tmp_path / "dead", deaths=1)
    two = cluster.Cluster(Workers(dying, 2, HALF, tmp_path))
    of_two = cluster.run_pass(two.pool(), samples, info, method)
    assert len(list(tmp_path.glob("dead.*"))) == 1
    adapters = two.layer_wise(Work(samples, info, method))
    assert_equal(of_two, of_three)
    # The batches' products are the same bits; the order of some 30 float64 additions, 2^-53 = 1.1e-16 each, differs.
    assert_equal(of_two, one, rtol=1e-14)
    expected = distill_layer_wise(model, samples, info, method)
    for i, errors in expected.config.training["errors"].items():
        assert adapters.config.training["errors"][i] == pytest.approx(errors, rel=1e-6)  # float32's L and R
        assert errors["remaining"] < 0.99
    assert adapters.config.training.keys() == expected.config.training.keys()


def test_a_killed_run_continues_after_its_last_shard(
    model_dir: ModelDir,
    samples: list[Sample],
    three: workers_pool.Pool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On workers to the same bits, and also without them: a checkpoint does not depend on the number of workers."""
    model = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
    info, method = resolve_method(model.config, "m", "cats", 0.3, 8)
    resume, save, deaths = tmp_path / "resume", checkpoint.save, 0

    def dying(*args: Any) -> None:
        save(*args)
        raise InterruptedError

    whole = cluster.run_pass(three, samples, info, method)
    parts = cluster.shards(make_batches(samples, torch.device("cpu")))
    while True:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", dying)
            try:
                found = cluster.run_pass(three, samples, info, method, resume)
                break
            except InterruptedError:
                deaths += 1
        if deaths == 4:
            alone = run_pass(model, samples, info, method, resume, Console(stderr=True, width=200))
            printed = f"going on after batch {sum(map(len, parts[:4]))}\n"
            assert printed in capsys.readouterr().err
            assert_equal(alone, whole, rtol=1e-14)  # as above
            resume.unlink()
    assert deaths == 4 + len(parts)
    assert_equal(found, whole)


def test_errors_of_a_worker_reach_the_user(
    model_dir: ModelDir, samples: list[Sample], three: workers_pool.Pool, tmp_path: Path
) -> None:
    info, method = resolve_method(
        AutoModelForCausalLM.from_pretrained(model_dir("llama")).config, "m", "griffin", 0.5, 8
    )
    broken = make_samples(3)
    broken[1].ids[0] = 300
    with pytest.raises(CapreseError, match=r"token ids below 300.*found 300 in the sample of line 2") as error:
        cluster.run_pass(three, broken, info, method)
    assert type(error.value) is CapreseError
    assert "\n" not in str(error.value)
    three.call(spoil)  # which one is not known, so every one has a share below
    with pytest.raises(CapreseError, match=r"activations of layer 0: expected finite values; found NaN or Inf.*line"):
        list(three.map(cluster._sum_shard, [(info, method, make_batches(samples, torch.device("cpu")), None)]))


def spoil(model: Any) -> None:
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("nan"))


def test_a_worker_that_dies_of_its_work_ends_the_run(
    model_dir: ModelDir, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_pool, "RETRIES", 0)
    info, method = resolve_method(
        AutoModelForCausalLM.from_pretrained(model_dir("llama")).config, "m", "griffin", 0.5, 8
    )
    dying = partial(load, model_dir("llama"), tmp_path / "dead", deaths=99)
    with (
        workers_pool.Pool(dying, 1, HALF) as pool,
        pytest.raises(
            CapreseError, match=r"workers: expected one that.*in 1 attempts; found .*(died|unavailable)"
        ) as error,
    ):
        cluster.run_pass(pool, samples, info, method)
    assert "\n" not in str(error.value)
    assert len(list(tmp_path.glob("dead.*"))) == 1


@pytest.mark.parametrize("count", [2, 7, 60, 400])
def test_shards_are_cut_at_the_same_places_wherever_a_run_begins(count: int) -> None:
    batches = make_batches(make_samples(count), torch.device("cpu"))
    whole = cluster.shards(batches)
    assert [b for part in whole for b in part] == batches
    assert len(whole) <= 10 + 1
    assert all(len({b.held_out for b in part}) == 1 for part in whole)
    ends = {id(part[-1]) for part in whole}
    for done in range(len(batches) + 1):
        rest = cluster.shards(batches, done)
        assert [b for part in rest for b in part] == batches[done:]
        assert all(rest)
        assert {id(part[-1]) for part in rest} <= ends


def test_a_prior_and_the_selection_by_it_on_workers(
    model_dir: ModelDir, samples: list[Sample], three: workers_pool.Pool, tmp_path: Path
) -> None:
    """The sums add up over shards; a killed pass goes on; moments and quality use the selection of one process."""
    model = AutoModelForCausalLM.from_pretrained(model_dir("llama")).eval()
    info, method = resolve_method(model.config, "m", "griffin", 0.5, 8)
    method = replace(method, score="weighted", prior=0.5, core=0.8)
    fit, held_out = split(samples)
    one = collect_priors(model, fit, info, method)
    workers = cluster.Cluster(Workers(partial(load, model_dir("llama")), 2, HALF, tmp_path))
    work = Work(samples, info, method, collects_priors=True)
    priors = workers.priors(work, tmp_path / "r")
    for i in method.layers:  # float64 sums, in the order of the shards
        torch.testing.assert_close(priors[i], one[i], rtol=1e-6, atol=0)
    printed = io.StringIO()
    again = workers.priors(work, tmp_path / "r", Console(file=printed, width=200))
    assert "going on after batch" in printed.getvalue()
    assert all(torch.equal(again[i], priors[i]) for i in method.layers)
    found = workers.layer_wise(replace(work, priors=priors, collects_priors=False))
    expected = distill_layer_wise(model, samples, info, method, priors=priors)
    assert found.config.core == 0.8
    assert all(torch.equal(found.prior[i], priors[i]) for i in method.layers)
    errors, alone = (each.config.training["errors"] for each in (found, expected))
    for i in errors:
        assert errors[i]["remaining"] == pytest.approx(alone[i]["remaining"], rel=1e-4)
    quality, by_one = workers.quality(held_out, found), measure_adapters(model, found, held_out)
    assert quality["adapter"].kl == pytest.approx(by_one["adapter"].kl, rel=1e-5)


def test_training_shared_out_equals_one_process_and_survives_a_death(
    model_dir: ModelDir, samples: list[Sample], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir("llama")).eval()
    info, method = resolve_method(model.config, "m", "griffin", 0.5, 8)
    initial = distill_layer_wise(model, samples, info, method)
    recipe, printed, seen = Recipe(1e-3, epochs=2, warmup=0.3), io.StringIO(), Written([])
    one = distill_end_to_end(model, samples, initial, recipe)
    work, console = Work(samples, info, method, recipe), Console(file=printed, width=200)
    dying = partial(load, model_dir("llama"), tmp_path / "dead", deaths=1, at=12)
    ctrl_c = signal.getsignal(signal.SIGINT)
    cluster_of_two = cluster.Cluster(Workers(dying, 2, HALF, tmp_path))
    two = cluster_of_two.end_to_end(work, initial, tmp_path / "resume", console, seen)
    assert signal.getsignal(signal.SIGINT) is ctrl_c  # Ray Train would keep it for itself
    assert len(list(tmp_path.glob("dead.*"))) == 1
    first = re.search(r"going on after step (\d) of 8", printed.getvalue())
    assert first
    assert int(first[1]) > 0
    assert {step for name, _, step in seen.scalars if name == "loss"} == set(range(1, 9))
    trained = two.config.training["end_to_end"]
    assert trained["held_out_errors"] == pytest.approx(one.config.training["end_to_end"]["held_out_errors"], rel=1e-4)
    assert trained["held_out_errors"][-1] < trained["held_out_errors"][0]
    for i in method.layers:
        for name in ("left", "right"):
            begun, a, b = (getattr(adapters, name)[i] for adapters in (initial, one, two))
            # Gradients differ by float32's rounding (their sums' order), which Adam, dividing by the gradient's own
            # size, lets grow where a gradient is nearly nothing.
            assert (a - b).norm() < 1e-2 * (a - begun).norm()


def test_processes_that_see_different_checkpoints_raise() -> None:
    class Other(RankContext):
        """A second process, which is at step 5."""

        size = 2

        def all_reduce(self, tensor: torch.Tensor) -> None:
            tensor[1] += 5

    for step in (5, 3):
        trainer: Any = SimpleNamespace(ranks=Other(), step=step)
        if step == 5:
            Trainer.check_same_step(trainer, Path("r"))
        else:
            with pytest.raises(CapreseError, match=r"one file that all nodes see; found steps \[3, 5\] by worker"):
                Trainer.check_same_step(trainer, Path("r"))


@dataclass
class Written:
    """The scalars that training writes for TensorBoard."""

    scalars: list[tuple[str, float, int]]

    def add_scalar(self, *scalar: Any) -> None:
        self.scalars.append(scalar)


def test_one_process_needs_no_ray() -> None:
    modules = "caprese_distill.cli, caprese_distill.stages, caprese_distill.scale.cluster"
    code = f"import sys, {modules}; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
