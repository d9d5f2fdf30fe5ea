"""Every Triton kernel compiles for three GPUs to what the table says, and the registry knows all kernels."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.compile_kernels import cli
from tools.compile_kernels.cli import TABLE, TARGETS

LACKING = cli.missing()
needs_assembler = pytest.mark.skipif(LACKING is not None, reason=str(LACKING))


def expected() -> dict[str, Any]:
    """This Triton's part of the table."""
    import triton

    table = json.loads(TABLE.read_text())
    if triton.__version__ not in table:
        pytest.skip(f"the table knows Triton {', '.join(table)}, not {triton.__version__}")
    return dict(table[triton.__version__])


@needs_assembler
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_as_in_the_table(target: str) -> None:
    table = expected()
    found: cli.Entries = {}
    for key, name, resources, text in cli.compile_all([target]):
        found.setdefault(key, {})[name] = resources
        assert resources["registers"] <= 255, text
        # An A100 gives a program 163 KB at most, the others 227.
        assert resources["shared"] <= (163 if target == "sm_80" else 227) * 1024, text
    assert cli.differences(table, found, [target]) == []


@needs_assembler
def test_every_kernel_that_the_backend_launches_is_in_the_registry() -> None:
    """And every launch of a case has its needs."""
    from tools.compile_kernels.launches import cases, launched_kernels, record

    launched = set()
    for case in cases():
        names = {launch.name for launch in record(case, 132)}
        assert names == set(case.needs), case.name
        launched |= names
    assert launched == launched_kernels()


def rows() -> Iterator[tuple[str, str, dict[str, int], str]]:
    yield "case: kernel", "sm_90", {"registers": 8, "spilled": 0, "shared": 16}, "a line"


def test_a_difference_is_an_error_and_update_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.json"
    monkeypatch.setattr(cli, "TABLE", table)
    monkeypatch.setattr(cli, "missing", lambda: None)
    monkeypatch.setattr(cli, "compile_all", lambda targets: rows())

    def run(*flags: str) -> int:
        monkeypatch.setattr(sys, "argv", ["", "--target", "sm_90", *flags])
        return cli.main()

    assert run() == 1
    assert "no entries for Triton" in capsys.readouterr().err
    assert run("--update") == 0
    assert run() == 0
    assert "1 launches, 0 differences" in capsys.readouterr().out
    written = json.loads(table.read_text())
    for entries in written.values():
        entries["case: kernel"]["sm_90"]["registers"] = 7
        entries["case: gone"] = {"sm_90": {"registers": 1, "spilled": 0, "shared": 0}}
    table.write_text(json.dumps(written))
    assert run() == 1
    out = capsys.readouterr().out
    assert "case: kernel, sm_90: expected {'registers': 7" in out
    assert "case: gone, sm_90: expected {'registers': 1" in out
    assert "2 differences" in out


def test_what_a_multiprocessor_holds() -> None:
    """Warps, registers (in steps of 8) and shared memory each set a limit."""
    h200 = TARGETS["sm_90"]
    assert h200.programs({"registers": 32, "shared": 0}, warps=4) == 16
    assert h200.programs({"registers": 121, "shared": 0}, warps=4) == 4
    assert h200.programs({"registers": 32, "shared": 100 * 1024}, warps=4) == 2
