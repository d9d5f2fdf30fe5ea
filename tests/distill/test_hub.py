"""Adapters from and to the Hub, against one on this machine: each command in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from safetensors import safe_open

from caprese_kernels.errors import CapreseError
from caprese_kernels.hub import upload
from tests.support.distill import ModelDir, make_rows
from tests.support.fake_hub import FakeHub, fake_hub
from tests.support.models import make_adapter


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as found:
        yield found


def caprese(tmp_path: Path, env: dict[str, str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    command = [sys.executable, "-m", "caprese_serve", *map(str, words)]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"} | env
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout, done.stderr


def test_adapters_of_repositories(hub: FakeHub, model_dir: ModelDir, tmp_path: Path) -> None:
    content = make_adapter(model_dir("llama"), tmp_path / "a.safetensors", "griffin").read_bytes()
    hub.repositories = {
        "owner/usual": {"adapters.safetensors": content, "other.safetensors": b"", "README.md": b""},
        "owner/one": {"griffin.safetensors": content, "README.md": b""},
        "owner/two": {"a.safetensors": content, "sub/b.safetensors": content},
        "owner/none": {"README.md": b""},
    }
    for weights in ("owner/usual", "owner/one", "owner/two/a.safetensors", "owner/two/sub/b.safetensors"):
        code, shown, said = caprese(tmp_path, hub.env(), "inspect", weights, "--json")
        assert (code, said) == (0, ""), weights
        assert json.loads(shown)["bytes"] == len(content)
    for weights, found in (
        ("owner/two", "found a.safetensors, sub/b.safetensors; name the file, as owner/two/a.safetensors"),
        ("owner/none", "expected adapters.safetensors, or one safetensors file; found none"),
        ("owner/absent", "found 'owner/absent' (RepositoryNotFoundError)"),
        ("owner/one/b.safetensors", "found 'owner/one/b.safetensors' (RemoteEntryNotFoundError)"),
    ):
        code, _, said = caprese(tmp_path, hub.env(), "inspect", weights)
        assert code == 1
        assert said.count("\n") == 1
        assert found in said
    # What was fetched is there without the Hub; the rest is one line, at once.
    away = hub.env() | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for weights in ("owner/usual", "owner/one", "owner/two/a.safetensors"):
        assert caprese(tmp_path, away, "inspect", weights, "--json")[0] == 0
    code, _, said = caprese(tmp_path, away, "inspect", "owner/absent")
    assert (code, said.count("\n")) == (1, 1)
    assert "the Hub cannot be reached, and its cache has no such file" in said
    assert "Retrying" not in said
    code, _, said = caprese(tmp_path, away, "inspect", tmp_path / "a.safetensors", "--model", "owner/absent")
    assert (code, said.count("\n")) == (1, 1)
    assert "Retrying" not in said  # for half a minute


@pytest.mark.parametrize("verb", ["distill", "calibrate"])
def test_results_are_uploaded(hub: FakeHub, model_dir: ModelDir, tmp_path: Path, verb: str) -> None:
    data, output = tmp_path / "data.jsonl", tmp_path / "a.safetensors"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_rows(6)))
    words = [verb, model_dir("llama"), "--data", data, "--output", output, "--push-to-hub", "owner/made"]
    if verb == "distill":
        words += ["--stage", "layer-wise", "--rank", "4"]
    code, _, said = caprese(tmp_path, hub.env(), *words)
    assert code == 0, said
    assert "uploaded: " in said
    files = hub.repositories["owner/made"]
    assert set(files) == {"a.safetensors", "README.md", "report.json"}
    assert files["a.safetensors"] == output.read_bytes()
    card = files["README.md"].decode()
    assert "--caprese-weights owner/made/a.safetensors\n" in card
    quality = json.loads(files["report.json"])["config"]["training"]["quality"]
    assert f"| this adapter's, without L and R | {quality['selection']['kl']:.3f} |" in card
    assert "chosen by what the data's responses used most" in card  # as a core of 1 has it
    assert ("low-rank" in card.partition("\n---\n")[0]) == (verb == "distill")
    report = json.loads(files["report.json"])
    with safe_open(output, framework="pt") as file:
        recorded = json.loads(file.metadata()["config"])
    assert report["config"]["training"] == recorded["training"]
    assert str(tmp_path) not in json.dumps({key: report[key] for key in report if key != "config"})
    assert "push" not in recorded["training"]["command"]
    assert caprese(tmp_path, hub.env(), "inspect", "owner/made")[0] == 0


def test_a_failed_upload_names_what_uploads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    path = tmp_path / "a b.safetensors"
    with pytest.raises(CapreseError) as error:
        upload("owner/made", {path.name: path, "README.md": b""})
    assert f"hf upload owner/made '{path}' 'a b.safetensors'" in str(error.value)


def test_an_upload_that_cannot_be_is_refused_first(hub: FakeHub, model_dir: ModelDir, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_rows(6)))
    words = [
        "distill",
        model_dir("llama"),
        "--data",
        data,
        "--output",
        tmp_path / "a.safetensors",
        "--rank",
        "4",
        "--push-to-hub",
    ]
    for repo, env, found in (
        ("made", {}, "expected owner/name; found made"),
        ("owner/made", {"HF_TOKEN": "hf_other"}, "log in with"),
        ("owner/made", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "expected a Hub that can be reached, and a token for it"),
    ):
        code, _, said = caprese(tmp_path, hub.env() | env, *words, repo)
        assert code == 1
        assert found in said
        assert not (tmp_path / "a.safetensors").exists()
