"""Progress of another run with the same output is kept, the difference is named, and its run takes it back."""

import io
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from caprese_distill import checkpoint
from caprese_distill.kept import kept_files, set_aside, take_back
from caprese_kernels.adapters import Adapters
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
