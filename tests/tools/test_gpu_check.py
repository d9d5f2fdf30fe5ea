"""`make gpu-check` where there is no GPU: its messages, plans and limits; test_gpu_rehearsal.py runs it whole."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer

from caprese_bench.engine import engines
from caprese_bench.engine.models import ARCHS
from caprese_bench.engine.variants import VARIANTS
from caprese_bench.kernels.floor import Weights
from caprese_bench.results import schemas
from caprese_serve import cli as caprese
from tools.gpu_check import cli, machine, pack, plan
from tools.gpu_check.plan import LIMITS, Context, Step
from tools.gpu_check.run import MARK, kill_marked, marked, run

ROOT = Path(__file__).parents[2]
BRANCHES: tuple[plan.Branch, ...] = ("batches", "sanitizer", "engine")


def python(code: str, seconds: float = 30, name: str = "step", **fields: Any) -> Step:
    return Step(name, (sys.executable, "-c", code), seconds, **fields)


# -- messages ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu(tmp_path: Path) -> None:
    command = ["make", "--no-print-directory", "-C", str(ROOT), "gpu-check"]
    command += [f"GPU_PYTHON={sys.executable}", f"GPU_FLAGS=--out {tmp_path}"]
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == "gpu-check: needs an NVIDIA GPU that torch can use; found none"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_names_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine.find_spec
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name == "triton" else real(name))
    assert "packages missing: triton;" in (machine.missing() or "")
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name == "caprese_bench" else real(name))
    assert "run it as make gpu-check" in (machine.missing() or "")


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """A shell's background job ignores SIGINT, and so would the steps begun here; cli.main sees to that itself."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "NAME"], "--set takes NAME=VALUE; found 'NAME'"),
        (["--only", "latancy"], "--only takes one of environment, GPU tests, .*latency.*; found 'latancy'"),
        (["--unpack-with", "none.py"], "--unpack-with takes a file"),
    ],
)
def test_wrong_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu-check", *flags])
    with pytest.raises(SystemExit):
        cli.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


# -- one step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "seconds", "status"),
    [
        ("print('fine')", 30, "passed"),
        ("import sys; print('fine'); sys.exit(3)", 30, "failed"),
        # Writes what it has when it is stopped, as the benchmark does.
        ("import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('fine')", 30, "out of time"),
    ],
)
def test_a_step_is_recorded(tmp_path: Path, code: str, seconds: float, status: str) -> None:
    record = run(python(code), seconds, tmp_path / "log", os.environ)
    assert (record["status"], record["output"]) == (status, "fine\n")
    assert record["seconds"] < seconds


def test_a_program_that_is_not_there_fails(tmp_path: Path) -> None:
    record = run(Step("step", (str(tmp_path / "none"),), 5), 5, tmp_path / "log", os.environ)
    assert record["status"] == "failed"
    assert "No such file" in record["output"]


# Neither it nor its child, which left the process group, ends when asked to.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
print("waits", flush=True)
time.sleep(300)
"""


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc, which is not here")
@pytest.mark.parametrize("code", [STUBBORN, STUBBORN.replace("time.sleep(300)\n", "")], ids=["killed", "ends itself"])
def test_nothing_of_a_step_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr("tools.gpu_check.run.GRACE", 1.0)
    log = tmp_path / "log"
    begin = time.monotonic()
    record = run(python(code), 4, log, os.environ)
    assert record["status"] == ("out of time" if code == STUBBORN else "passed")
    assert record["output"] == "waits\n"
    assert time.monotonic() - begin < 10
    assert not marked(f"{os.getpid()}-{log.name}")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc, which is not here")
def test_only_marked_processes_are_killed() -> None:
    mine, other = (
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=os.environ | {MARK: mark})
        for mark in ("mine", "other")
    )
    assert marked("mine") == [mine.pid]
    kill_marked("mine")
    assert mine.wait(5) < 0
    assert other.poll() is None
    other.kill()
    other.wait()


# -- plans -------------------------------------------------------------------------------------------------------------


def plans(tmp_path: Path, small: bool) -> dict[str, list[Step]]:
    folder = tmp_path / "a"
    cache = folder / plan.FAILED
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps({"tests/kernels/test_gpu.py::test_importing_the_package_leaves_triton_alone": True}))
    context = Context(folder, folder, small=small, unpack=("true",))
    return {"a": plan.stage_a(context)} | {branch: plan.stage_b(context, branch) for branch in BRANCHES}


@pytest.mark.parametrize("small", [False, True])
def test_every_command_is_right(tmp_path: Path, small: bool) -> None:
    """Words that a program does not know would cost a machine's time: benchmarks' flags parse, tests exist."""
    for steps in plans(tmp_path, small).values():
        for step in steps:
            words = list(step.command)
            if "bench" in words:
                verb, *flags = words[words.index("bench") + 1 :]
                group = typer.main.get_command(caprese.app)
                context = group.make_context("caprese", ["bench", verb], resilient_parsing=True)
                _, bench, _ = group.resolve_command(context, ["bench"])  # type: ignore[attr-defined]
                _, command, _ = bench.resolve_command(context, [verb])  # type: ignore[union-attr]
                parsed = command.make_context(verb, flags).params  # type: ignore[union-attr]
                assert set((parsed.get("variants") or "full").split(",")) <= {*VARIANTS, "caprese-griffin"}
                assert parsed.get("arch") in (None, *ARCHS)
            for word in words:
                if word.startswith("tests/"):
                    assert (ROOT / word.partition("::")[0]).exists()


def test_plans_stay_within_their_limits(tmp_path: Path) -> None:
    for name, steps in plans(tmp_path, small=False).items():
        limit = LIMITS["a" if name == "a" else "b"]
        needed = sum(max(step.seconds for step in group) for group in cli.grouped(steps))
        # Stage b unpacks only on a machine that did not run stage a; then its last step gets less.
        unpacking = 60 if name != "a" else 0
        assert needed <= limit + unpacking - cli.MARGIN - 5, name


def test_no_step_collects_all_tests(tmp_path: Path) -> None:
    for steps in plans(tmp_path, small=False).values():
        for step in steps:
            if "pytest" in step.command:
                assert any(word.startswith("tests/kernels/") for word in step.command)
                assert not {"tests", "tests/"} & set(step.command)


def test_a_core_is_measured_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context(tmp_path, tmp_path)
    for variants, expected in (
        (("full", "caprese"), "full,caprese"),
        (("full", "caprese", "core"), "full,caprese,core"),
    ):
        monkeypatch.setattr(plan, "VARIANTS", dict.fromkeys(variants))
        command = plan.stage_b(context, "batches")[0].command
        assert command[command.index("--variants") + 1] == expected


def test_four_engines_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the benchmark's own count, with the KV cache that the plan's prompt needs."""
    from transformers import AutoConfig

    for arch, gib in plan.FOUR_ENGINES.items():
        fields = {key: value for key, value in ARCHS[arch].items() if key != "model_type"}
        weights = Weights.of(AutoConfig.for_model(ARCHS[arch]["model_type"], **fields))
        model: Any = SimpleNamespace(weights=weights, itemsize=2)
        kv = engines.kv_gib(model, 2048 + 256)
        for memory, expected in ((gib, 4), (0.95 * gib, 3)):
            monkeypatch.setattr(engines, "free_gib", lambda device, memory=memory: memory)
            assert engines.engines_that_fit(model, "cuda", kv) == expected, arch
    assert [plan.arch_for(gib) for gib in (139, 79, 40, 12)] == [*plan.FOUR_ENGINES, plan.SMALLEST]


def row(step: str, status: str) -> dict[str, Any]:
    return {"step": step, "status": status}


def test_stage_b_follows_from_stage_a(tmp_path: Path) -> None:
    figures = tmp_path / "latency.json"
    assert plan.decide([], tmp_path)[0] == "batches"
    assert plan.decide([row("latency", "skipped")], tmp_path)[0] == "batches"
    for status in ("failed", "out of time"):
        assert plan.decide([row("latency", status)], tmp_path)[0] == "engine"
    figures.write_text('{"rows": []}')
    assert plan.decide([row("latency", "failed")], tmp_path)[0] == "engine"
    figures.write_text('{"rows": [{"tpot_ms": 1}]}')
    assert plan.decide([row("latency", "out of time")], tmp_path)[0] == "batches"
    failed = tmp_path / plan.FAILED
    failed.parent.mkdir(parents=True)
    failed.write_text('{"tests/kernels/gpu_cases.py::test_b": true, "tests/kernels/gpu_cases.py::test_a": true}')
    branch, why = plan.decide([row("latency", "passed")], tmp_path)
    assert branch == "sanitizer"
    assert "2 GPU tests failed, first tests/kernels/gpu_cases.py::test_a" in why


# -- a stage -----------------------------------------------------------------------------------------------------------


def test_a_failure_stops_nothing_and_all_is_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also what a step wrote before it was killed; and there is an archive after each step."""
    monkeypatch.setattr("tools.gpu_check.run.GRACE", 0.5)
    archive, copies = tmp_path / "out/gpu-check-a.tar.gz", tmp_path / "copies"
    copies.mkdir()
    keep = f"import shutil; shutil.copy({str(archive)!r}, {str(copies)!r} + '/NAME')"
    writes = f"open({str(tmp_path / 'work/a/figures')!r}, 'w').write('7')"
    steps = [
        python("print('ill'); exit(1)", name="one"),
        python("print('beside')", name="two", beside=True),
        python(f"{writes}\n{keep.replace('NAME', 'first')}\nwhile True: pass", 3, "three"),
        python(keep.replace("NAME", "second"), name="four"),
        python("", name="five", needs=("no-such-program",)),
    ]
    monkeypatch.setattr(cli, "stage_a", lambda context: steps)
    monkeypatch.setattr(sys, "argv", ["", "--rehearse", "--stage", "a", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--work", str(tmp_path / "work")])
    assert cli.main() == 1
    out = capsys.readouterr().out
    assert out.index("stage a:") < out.index("== one: begins")
    assert schemas.check(tmp_path / "work/a/check.json") == 5
    statuses = {"one": "failed", "two": "passed", "three": "out of time", "four": "passed", "five": "skipped"}
    for path, count in ((copies / "first", 2), (copies / "second", 3), (archive, 5)):
        pack.unpack(path, tmp_path / path.name / "a")
        record = json.loads((tmp_path / path.name / "a/check.json").read_text())
        assert [(r["step"], r["status"]) for r in record["rows"]] == list(statuses.items())[:count]
        assert record["partial"] == (count < 5)
    assert (tmp_path / archive.name / "a/figures").read_text() == "7"
    assert (tmp_path / archive.name / "a/step-0.log").read_text() == "ill\n"


def test_spare_time_goes_to_the_step_that_can_use_it(tmp_path: Path) -> None:
    steps = [
        python("", 2, "first"),
        python("", 3, "long", spare=True),
        python("", 4, "last"),
    ]
    (first,), (long,), (last,) = cli.results(steps, time.monotonic() + 60, tmp_path, tmp_path, {})
    assert (first["given_seconds"], last["given_seconds"]) == (2, 4)
    assert 45 < long["given_seconds"] <= 56
    late = cli.results(steps, time.monotonic() - 1, tmp_path, tmp_path, {})
    assert [record["status"] for (record,) in late] == ["out of time"] * 3


def test_long_logs_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "KEPT", 4)
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "log").write_text("begin, much, end!")
    pack.pack(folder, tmp_path / "x.tar.gz")
    with tarfile.open(tmp_path / "x.tar.gz") as tar:
        assert tar.getnames() == ["a/log"]
        assert tar.extractfile("a/log").read() == b"begi\n[9 bytes left out]\nend!"  # type: ignore[union-attr]


@pytest.mark.parametrize("own", [False, True], ids=["wheels", "--unpack-with"])
def test_packages_of_a_part_are_found(tmp_path: Path, own: bool) -> None:
    """Steps after the unpacking see them; the site is marked when it is whole, and is not unpacked again."""
    part, site = tmp_path / "packed/part.tar", tmp_path / "work/site"
    part.parent.mkdir()
    (tmp_path / "work").mkdir()
    if own:
        part.write_text("packed_here = 5")
        copy = "import pathlib, sys; site = pathlib.Path(sys.argv[1]); site.mkdir()\n"
        copy += "(site / 'packed_here.py').write_text(pathlib.Path(sys.argv[2]).read_text())"
        (part.parent / "unpack.py").write_text(copy)
    else:
        wheel = tmp_path / "packed_here-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("packed_here.py", "packed_here = 5")
            archive.writestr(
                "packed_here-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: packed-here\nVersion: 1\n"
            )
            archive.writestr("packed_here-1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr("packed_here-1.dist-info/RECORD", "")
        with tarfile.open(part, "w") as tar:
            tar.add(wheel, wheel.name)
    steps = [
        Step("unpack", cli._unpacking(part, site, part.parent / "unpack.py" if own else None), 30),
        python("import packed_here; print(packed_here.packed_here)", needs=("packed_here",)),
    ]
    assert machine.absent(("packed_here",), site) == ["packed_here"]
    (unpacked,), (used,) = cli.results(steps, time.monotonic() + 60, tmp_path, tmp_path / "work", {})
    assert unpacked["status"] == "passed", unpacked["output"]
    assert (used["status"], used["output"]) == ("passed", "5\n")
    (site / machine.COMPLETE).unlink()
    assert machine.absent(("packed_here",), site) == ["packed_here"], "half of a package is none"


def test_the_environment_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    site, registered = tmp_path / "site", tmp_path / "registered"
    (site / "flashinfer").mkdir(parents=True)
    (site / "flashinfer/__init__.py").touch()
    variables = machine.environment(site, registered, {"NAME": "value"})
    assert variables["NAME"] == "value"
    assert variables["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    assert variables["PYTHONPATH"].split(os.pathsep) == [str(registered), "/somewhere"]
    (site / machine.COMPLETE).touch()
    variables = machine.environment(site, registered, {})
    assert variables["VLLM_USE_FLASHINFER_SAMPLER"] == "1"
    assert variables["PYTHONPATH"].split(os.pathsep) == [str(site), str(registered), "/somewhere"]


def test_the_plugin_is_found_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine.metadata, "distribution", none)
    machine.register(tmp_path)
    (found,) = metadata.distributions(path=[str(tmp_path)])
    assert found.name == "caprese-vllm"
    (plugin,) = found.entry_points.select(group="vllm.general_plugins")
    assert (plugin.name, plugin.value) == ("caprese", "caprese_vllm.plugin:register")
    commands = found.entry_points.select(group="caprese.commands").names
    assert {"bench", "collect-env", "demo", "distill"} <= commands
