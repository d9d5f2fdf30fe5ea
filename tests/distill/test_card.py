"""The model card: what it says, and what it never overwrites."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from caprese_distill.card import make_card, write_card
from caprese_kernels.adapters import Adapters
from caprese_kernels.errors import CapreseError
from tests.support.distill import WriteRows, make_rows, run_distill


@pytest.fixture
def output(model_dir: Callable[[str], Path], write_rows: WriteRows, tmp_path: Path) -> Path:
    path = tmp_path / "out" / "a.safetensors"
    run_distill(str(model_dir("llama")), str(write_rows(make_rows(12))), path, rank=8, epochs=2)
    return path


def test_it_says_what_the_adapter_is(output: Path) -> None:
    text = (output.parent / "README.md").read_text()
    adapters = Adapters.load(output)
    training, model = adapters.config.training, adapters.config.base_model.name_or_path
    assert text == make_card(adapters, output.name)
    _, front, body = text.split("---\n", 2)
    entries = yaml.safe_load(front)
    assert "base_model" not in entries  # a directory: the Hub wants a repository there
    named = adapters.config.base_model.model_copy(update={"name_or_path": "Qwen/Qwen2.5-1.5B"})
    published = Adapters(adapters.config.model_copy(update={"base_model": named}), adapters.left, adapters.right)
    front_of_published = yaml.safe_load(make_card(published, "a.safetensors").split("---\n", 2)[1])
    assert front_of_published["base_model"] == "Qwen/Qwen2.5-1.5B"
    assert entries["library_name"] == "caprese"
    assert {"caprese", "griffin"} <= set(entries["tags"])
    assert entries["caprese_adapter"] == "a.safetensors"
    lines = body.splitlines()
    assert f"vllm serve {model} --caprese-weights a.safetensors" in lines
    for row in ("| method | griffin |", "| density | 0.5 |", "| rank | 8 |", "| layers | 0-1 of 4 |"):
        assert row in lines
    for layer, errors in training["errors"].items():
        assert any(
            line.startswith(f"| {layer} | {errors['error_before']:.2%} | {errors['error_after']:.2%} |")
            for line in lines
        )
    for epoch, error in enumerate(training["end_to_end"]["held_out_errors"]):
        assert f"| {epoch} | {error:.3%} |" in lines
    assert training["command"] in lines
    for fact in (training["data"]["sha256"], training["versions"]["torch"], "; was "):
        assert fact in body


def test_other_files_are_not_overwritten(output: Path) -> None:
    adapters, readme, named = Adapters.load(output), output.parent / "README.md", output.with_name("a.md")
    readme.write_text(readme.read_text().replace("density", "old"))
    assert write_card(adapters, output) == readme  # ours: written again
    assert "density" in readme.read_text()
    assert write_card(adapters, output.with_name("b.safetensors")) == output.with_name("b.md")  # README.md is a's
    for foreign in (b'# My project\n\ncaprese_adapter: "a.safetensors"\n', b"---\nlicense: mit\n---\n", b"\xff\xfe"):
        readme.write_bytes(foreign)
        assert write_card(adapters, output) == named
        assert readme.read_bytes() == foreign
    named.write_text("notes")
    assert write_card(adapters, output) is None
    assert named.read_text() == "notes"
    assert sorted(p.name for p in output.parent.iterdir()) == ["README.md", "a.md", "a.safetensors", "b.md"]


def test_a_full_disk_raises(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    adapters, before = Adapters.load(output), sorted(output.parent.iterdir())
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CapreseError, match=r"model card .*the adapter, which is written; found No space left"):
        write_card(adapters, output)
    assert sorted(output.parent.iterdir()) == before


def test_a_table_survives_an_instruction_of_lines(output: Path) -> None:
    adapters = Adapters.load(output)
    adapters.config.training["data"]["instruction"] = "One.\nTwo | three."
    assert r"instruction `One. Two \| three.`" in make_card(adapters, output.name)


def test_it_appears_whole(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters, readme = Adapters.load(output), output.parent / "README.md"
    before = readme.read_text()

    def half(path: Path, *_: object, **__: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        write_card(adapters, output)
    assert readme.read_text() == before
    assert sorted(p.name for p in output.parent.iterdir()) == ["README.md", "a.safetensors"]
