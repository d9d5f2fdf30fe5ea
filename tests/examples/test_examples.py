"""The programs in examples/, run as examples/README.md says."""

import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from caprese_serve.demo import ADAPTERS, MODEL
from caprese_serve.demo.run import ENV
from caprese_serve.server import VllmServer
from tests.support.markdown import links

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LEO = re.compile(r"27 \* 3 = 81|#### 81")  # the first prompt of the examples, answered


def run(*command: str, cwd: Path = ROOT) -> str:
    """What it prints to stdout."""
    path = os.pathsep.join([*filter(None, sys.path), os.environ.get("PYTHONPATH", "")])
    env = os.environ | ENV | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def python(example: str, *arguments: str) -> str:
    return run(sys.executable, str(EXAMPLES / example), *arguments)


def test_offline() -> None:
    shown = python("offline.py")
    answers = re.findall(r"^(Caprese|full model): (.*)", shown, flags=re.M)
    assert [title for title, _ in answers] == ["Caprese"] * 2 + ["full model"] * 2
    assert LEO.search(answers[2][1])
    assert all("####" in answer for _, answer in answers)


def test_client(tmp_path: Path) -> None:
    flags = ("--dtype", "float32", "--max-model-len", "512", "--enforce-eager")
    weights, quiet = ("--caprese-weights", str(ADAPTERS["griffin"])), Console(quiet=True)
    with VllmServer(MODEL, *flags, *weights, log=tmp_path / "server.log", env=ENV, console=quiet) as server:
        caprese, full, report = python("client.py", server.url).splitlines()
    assert caprese.startswith("Caprese: ")
    assert full.startswith("full model: ")
    assert LEO.search(full)
    count = re.fullmatch(r"server: griffin, density 0.5, (\d+) tokens ran sparse", report)
    assert count, report
    assert 5 < int(count[1]) < 60, "the first request ran sparse, the second did not"


def test_hugging_face() -> None:
    shown = python("hugging_face.py")
    assert "Caprese: 2 of 4 FF blocks replaced: method griffin, density 0.5, rank 48, layers 0-1\n" in shown
    solved = dict(re.findall(r"^(.+): (\d+) of 40 problems solved$", shown, flags=re.M))
    full, repaired, plain = (int(solved[title]) for title in ("full model", "with the adapter", "griffin alone"))
    assert plain < repaired <= full


def test_distill(tmp_path: Path) -> None:
    """In a folder of links, since it writes into out/."""
    for path in ROOT.iterdir():
        if path.name not in ("out", ".git"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "examples").unlink()  # the script goes to its own parent folder, links followed or not
    (tmp_path / "examples").mkdir()
    for path in filter(Path.is_file, EXAMPLES.iterdir()):
        (tmp_path / "examples" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/caprese"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m caprese_serve "$@"\n')
    program.chmod(0o755)
    path = f"PATH={tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    run("env", path, "bash", "examples/distill.sh", "--rank", "4", cwd=tmp_path)
    assert (tmp_path / "out/example/adapters.safetensors").is_file()


def test_every_example_is_listed() -> None:
    listed = {link.text for link in links(EXAMPLES / "README.md")}
    found = {path.name if path.is_file() else f"{path.name}/README.md" for path in EXAMPLES.iterdir()}
    assert found - {"README.md", "problems.jsonl", "__pycache__/README.md"} == listed
