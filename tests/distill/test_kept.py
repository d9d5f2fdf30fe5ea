"""Progress of another run with the same output is kept, the difference is named, and its run takes it back."""

import io
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from caprese_distill import DistillConfig, checkpoint
from caprese_distill.job import Job
from caprese_distill.kept import kept_files, set_aside, take_back
from caprese_distill.loading import load_model_on
from caprese_distill.stage_files import all_progress, held_bytes
from caprese_distill.stages import remaining_work
from caprese_kernels.adapters import Adapters
from caprese_kernels.errors import CapreseError
from tests.support.cases import TEMPLATES
from tests.support.distill import ModelDir, WriteRows, make_rows, run_distill

Capture = pytest.CaptureFixture[str]


def test_files_are_numbered_and_exchanged(tmp_path: Path) -> None:
    path, console = tmp_path / ".a[1].resume", Console(file=io.StringIO(), width=1000)
    for n in range(1, 12):
        path.write_text(str(n))
        assert set_aside(path, "why", console).name == f".a[1].resume.kept-{n}"
    (tmp_path / ".a[1].resume.kept-x").touch()
    assert [p.read_text() for p in kept_files(path)] == [str(n) for n in range(11, 0, -1)]

    path.write_text("own")
    take_back(path, lambda each: each.read_text() in ("own", "3"), console)
    assert path.read_text() == "own"
    take_back(path, lambda each: each.read_text() == "no such", console)
    assert path.read_text() == "own"
    take_back(path, lambda each: each.read_text() == "3", console)
    assert path.read_text() == "3"
    assert [p.read_text() for p in kept_files(path)] == ["own", "11", "10", "9", "8", "7", "6", "5", "4", "2", "1"]
    said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert said[0] == f"{path}: why (kept: .a[1].resume.kept-1)"
    assert said[-2:] == [
        f"{path}: it belongs to another run (kept: .a[1].resume.kept-12)",
        f"{path}: it was kept, and is taken back (from: .a[1].resume.kept-3)",
    ]


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Runs a distillation that is interrupted when its adapter is written, or after the first checkpoint."""

    def run(work: Callable[[], Any], after_stage: bool = False) -> None:
        save = Adapters.save if after_stage else None
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0.0)

            def stop(adapters: Adapters, path: Path) -> None:
                if save is not None and path.suffix in (".prior", ".layer-wise"):
                    return save(adapters, path)
                os.kill(os.getpid(), signal.SIGINT)
                return None

            patch.setattr(Adapters, "save", stop)
            with pytest.raises(KeyboardInterrupt):
                work()

    return run


def test_a_run_of_another_density_keeps_the_progress(
    model_dir: ModelDir,
    write_rows: WriteRows,
    tmp_path: Path,
    capsys: Capture,
    interrupted: Callable[..., None],
) -> None:
    data, output = write_rows(make_rows(6)), tmp_path / "a.safetensors"

    def run(**settings: Any) -> None:
        run_distill(str(model_dir("llama")), data, output, rank=4, device="cpu", epochs=1, **settings)

    interrupted(run, after_stage=True)
    progress = [checkpoint.resume_path(output), tmp_path / ".a.safetensors.layer-wise"]
    before = [path.read_bytes() for path in progress]
    capsys.readouterr()
    run(density=0.25)
    said = " ".join(capsys.readouterr().err.split())
    assert "it belongs to a run with other density; starting anew" in said
    assert re.search(r"other density, [a-z, ]*; starting anew", said), said
    kept = [kept_files(path)[0] for path in progress]
    assert [path.read_bytes() for path in kept] == before

    output.unlink()
    run()
    said = " ".join(capsys.readouterr().err.split())
    assert "layer-wise stage: done before" in said
    assert "going on after step" in said
    run_distill(str(model_dir("llama")), data, tmp_path / "whole.safetensors", rank=4, device="cpu", epochs=1)
    whole, parts = Adapters.load(tmp_path / "whole.safetensors"), Adapters.load(output)
    assert all(whole.left[i].equal(parts.left[i]) for i in whole.left)
    assert not list(tmp_path.glob(".*"))


def test_a_layer_wise_run_keeps_what_follows_it(
    model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path, interrupted: Callable[..., None]
) -> None:
    """Its own result is the first stage of the other run."""
    data, output = write_rows(make_rows(6)), tmp_path / "a.safetensors"

    def run(**settings: Any) -> None:
        run_distill(str(model_dir("llama")), data, output, rank=4, device="cpu", epochs=1, **settings)

    interrupted(run, after_stage=True)
    before = checkpoint.resume_path(output).read_bytes()
    run(stage="layer-wise")
    assert kept_files(checkpoint.resume_path(output))[0].read_bytes() == before
    assert (tmp_path / ".a.safetensors.layer-wise").exists()


def test_a_template_that_prints_the_date(
    model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path, capsys: Capture, interrupted: Callable[..., None]
) -> None:
    data, output = write_rows(make_rows(6)), tmp_path / "a.safetensors"

    def run(date: str | None) -> None:
        settings: dict[str, Any] = {"rank": 4, "device": "cpu", "epochs": 1, "chat_template": TEMPLATES["dated"]}
        run_distill(str(model_dir("llama")), data, output, **settings, date=date)

    interrupted(lambda: run("2026-03-01"), after_stage=True)
    assert "prints the date" not in capsys.readouterr().err
    interrupted(lambda: run(None), after_stage=True)
    said = " ".join(capsys.readouterr().err.split())
    assert "the chat template prints the date: continue this run on another day with --date 20" in said
    assert "it belongs to a run with other token ids; starting anew" in said
    run("2026-03-01")
    assert "layer-wise stage: done before" in " ".join(capsys.readouterr().err.split())


def test_a_kill_between_a_finished_stage_and_its_checkpoint(
    model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The checkpoint, which the finished stage took the place of, is of no other run and does not stay."""
    data, output = write_rows(make_rows(6)), tmp_path / "a.safetensors"

    def run(path: Path) -> None:
        run_distill(str(model_dir("llama")), data, path, rank=4, device="cpu", epochs=1)

    class Killed(BaseException):
        pass

    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0.0)
    remove = checkpoint.remove
    for suffix in (".prior-resume", ".resume"):
        left = tmp_path / f".a.safetensors{suffix}"

        def kill(path: Path, left: Path = left) -> None:
            if path == left:
                raise Killed(path)
            remove(path)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "remove", kill)
            with pytest.raises(Killed):
                run(output)
        assert left.exists()
    capsys.readouterr()
    run(output)
    said = " ".join(capsys.readouterr().err.split())
    assert "layer-wise stage: done before" in said
    assert "another run" not in said
    assert "belongs to" not in said
    assert [path.name for path in tmp_path.glob(".*")] == []
    run(tmp_path / "whole.safetensors")
    whole, parts = Adapters.load(tmp_path / "whole.safetensors"), Adapters.load(output)
    assert all(whole.left[i].equal(parts.left[i]) for i in whole.left)
    assert parts.config.training.keys() == whole.config.training.keys()


def test_what_remains_counts_progress_that_was_kept(
    model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path, interrupted: Callable[..., None]
) -> None:
    """--dry-run says what the run would do, which takes its progress back; and the disk that it has is its own."""
    data, output = write_rows(make_rows(6)), tmp_path / "a.safetensors"
    settings: dict[str, Any] = {"rank": 4, "device": "cpu", "epochs": 1, "model": str(model_dir("llama"))}
    settings |= {"data": str(data), "output": output}

    def remaining(**changes: Any) -> Any:
        job = Job(DistillConfig(**settings | changes))
        return remaining_work(load_model_on(settings["model"], "auto", "cpu"), job.plan().work, output)

    def run(**changes: Any) -> None:
        run_distill(str(model_dir("llama")), data, output, rank=4, device="cpu", epochs=1, **changes)

    whole = remaining()
    assert not whole.resumed
    assert not whole.files
    interrupted(run, after_stage=True)
    own = remaining()
    assert own.resumed
    assert len(own.steps) < len(whole.steps)
    assert {path.name for path in own.files} == {f".a.safetensors.{n}" for n in ("prior", "layer-wise", "resume")}
    interrupted(lambda: run(density=0.25, score="paper"), after_stage=True)
    kept = remaining()
    assert (len(kept.prior), len(kept.batches), len(kept.steps)) == (0, 0, len(own.steps))
    assert {path.name for path in kept.files} == {f"{path.name}.kept-1" for path in own.files}
    other = remaining(density=0.4, score="paper", prior=1.0)  # the prior depends on the score alone
    assert [path.name for path in other.files] == [".a.safetensors.prior"]


def test_the_disk_of_other_runs_is_not_counted(
    model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path, interrupted: Callable[..., None], monkeypatch: Any
) -> None:
    """Their files stay. The run that they belong to needs that much less."""
    data, output = write_rows(make_rows(6)), tmp_path / "a.safetensors"
    settings: dict[str, Any] = {"rank": 4, "device": "cpu", "epochs": 1}
    interrupted(lambda: run_distill(str(model_dir("llama")), data, output, **settings), after_stage=True)
    config = DistillConfig(model=str(model_dir("llama")), data=str(data), output=output, **settings)
    held = held_bytes(all_progress(output))
    needed = Job(config).plan().memory.disk
    usage = psutil.disk_usage(str(tmp_path))
    monkeypatch.setattr(psutil, "disk_usage", lambda _: usage._replace(free=needed - held))
    assert Job(config).estimate() is not None
    with pytest.raises(CapreseError, match="free disk for the adapter and its checkpoints"):
        Job(config.model_copy(update={"density": 0.25})).estimate()
