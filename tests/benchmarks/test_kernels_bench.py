"""The kernel benchmark on a tiny shape, and what its figures are made of."""

import csv
import re
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from caprese_bench.kernels import agreement as kernel_agreement
from caprese_bench.kernels import bench as kernel_bench
from caprese_bench.kernels import cases as kernel_cases
from caprese_bench.kernels import dense as kernel_dense
from caprese_bench.kernels import measure as kernel_measure
from caprese_bench.kernels import timing as kernel_timing
from caprese_bench.kernels.cases import Case, Shape
from caprese_bench.results import compare, recording
from caprese_bench.results.report import Columns, Result, show, table
from caprese_kernels import reference, terminal
from caprese_kernels.errors import CapreseError
from caprese_kernels.packed import PackedFF

TINY = Shape("tiny", 32, 96)
CPU: dict[str, Any] = {"cpu": {"model": "EPYC", "cores": 2}}
H200 = {"name": "NVIDIA H200"}
SETTINGS = kernel_measure.MeasurementSettings("cpu", "reference", repeats=3, quick=True, seconds=5)
FUNCTIONS = (
    "core_ff",
    "dense_ff",
    "griffin_ff",
    "plan_layers",
    "cats_ff",
    "griffin_observe",
    "griffin_select",
    "cats_observe",
    "cats_threshold",
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def backend(**others: Any) -> Any:
    """The reference, with some functions replaced."""
    return SimpleNamespace(NAME="reference", **{name: getattr(reference, name) for name in FUNCTIONS} | others)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches, buffers and samples as small as the shape; no vLLM, which takes seconds to import."""
    buffer = torch.ones(1 << 16, dtype=torch.int32)
    monkeypatch.setattr(kernel_measure, "memory", lambda device: ("buffer", buffer.nbytes, [buffer.amax]))
    monkeypatch.setattr(kernel_measure, "cache_bytes", lambda device: 1 << 15)
    monkeypatch.setattr(kernel_timing, "LEAST_SAMPLE", {"cpu": 1e-4})
    monkeypatch.setattr(kernel_dense, "_has_vllm", lambda: False)
    monkeypatch.setattr(kernel_cases, "SHAPES", {"tiny": TINY})


def all_groups(*sections: str) -> list[kernel_cases.Group]:
    return list(kernel_cases.groups(list(sections or kernel_cases.SECTIONS), [TINY], quick=True, prompt=40))


def test_required_bytes_by_hand() -> None:
    # D = 4, b = 2: a row is 8 bytes. Three matrices of 3 neurons, and L and R of rank 2.
    assert kernel_cases.griffin_bytes(4, union=3, rank=2, itemsize=2) == (3 * 3 + 2 * 2) * 8
    # The gate of all 10 neurons; two matrices of 3 of them.
    assert kernel_cases.cats_bytes(4, 10, union=3, rank=2, itemsize=2) == (10 + 2 * 3 + 2 * 2) * 8
    assert kernel_cases.dense_bytes(4, 10, itemsize=2) == 240
    # Everything kept and no low-rank layer: all three read the same.
    assert kernel_cases.griffin_bytes(4, 10, 0, 2) == kernel_cases.cats_bytes(4, 10, 10, 0, 2) == 240


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_selections_overlap_as_asked(overlap: float) -> None:
    keep = kernel_cases.overlapping(4, 400, 100, overlap, generator())
    common = round(overlap * 100)
    assert keep.sum(dim=1).tolist() == [100] * 4
    assert {int((a & b).sum()) for a, b in combinations(keep, 2)} == {common}
    assert int(keep.any(dim=0).sum()) == common + 4 * (100 - common)
    assert kernel_cases.pairwise_overlap(keep) == pytest.approx(overlap)


def test_selections_that_cannot_be_so_different_are_refused() -> None:
    with pytest.raises(CapreseError, match=r"at least 0\.67 for 4 times 200 of 400"):
        kernel_cases.overlapping(4, 400, 200, 0.6, generator())


def test_overlap_by_hand() -> None:
    keep = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    assert kernel_cases.pairwise_overlap(keep) == pytest.approx((1 + 0 + 1) / 3 / 2)


def test_independent_and_shared_selections() -> None:
    keep, slots = kernel_cases.selections(Case("griffin", 8, 0.5, selection="independent"), 401, generator())
    assert keep.sum(dim=1).tolist() == [200] * 8
    assert slots.tolist() == list(range(8))
    assert len({tuple(row) for row in keep.tolist()}) == 8
    assert kernel_cases.pairwise_overlap(keep) == pytest.approx(0.5, abs=0.05)
    keep, slots = kernel_cases.selections(Case("griffin", 8, 0.5, selection="shared"), 401, generator())
    assert (len(keep), slots.tolist()) == (1, [0] * 8)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_thresholds_keep_the_density(density: float) -> None:
    g = torch.randn(5, 1000, generator=generator())
    tau = kernel_cases.thresholds(g, density)
    assert (g.abs() >= tau[:, None]).sum(dim=1).tolist() == [round(1000 * density)] * 5


def test_thresholds_with_equal_magnitudes_keep_the_next_count() -> None:
    tau = kernel_cases.thresholds(torch.tensor([[3.0, -2.0, 2.0, 1.0]], dtype=torch.bfloat16), 0.5)
    assert tau.tolist() == [2.0]  # 3 of 4: there is no threshold for 2


def test_sections_cover_what_they_should() -> None:
    sections = list(kernel_cases.groups(list(kernel_cases.SECTIONS), [TINY], quick=False, prompt=2048))
    by = {name: [group for group in sections if group.section == name] for name in kernel_cases.SECTIONS}
    assert {(case.method, case.rank) for case in by["shapes"][0].cases} == {
        (method, rank) for method in ("griffin", "cats") for rank in (0, 256)
    }
    for method in ("griffin", "cats"):
        found = [case.density for case in by["density"][0].cases if case.method == method]
        assert found == pytest.approx([i / 10 for i in range(1, 11)])
    assert [group.tokens for group in by["batch"]] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert all(case.batch == group.tokens for group in by["batch"] for case in group.cases)
    assert {0.0, 0.5, 1.0} <= {case.overlap for case in by["overlap"][0].cases}
    for case in by["overlap"][0].cases:  # each can be made
        kernel_cases.selections(case, 14336, generator())
    assert [group.tokens for group in by["core"]] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert {(case.selection, case.rank) for case in by["core"][0].cases} == {
        (path, rank) for path in ("kernel", "products") for rank in (0, 256)
    }
    assert [group.tokens for group in by["statistics"]] == [2048]


def test_calls_in_turn_use_other_memory_beyond_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_measure, "cache_bytes", lambda device: 10_000)
    copies = kernel_measure.Copies(Shape("small", 8, 64), "cpu", needed=3_000)
    pointers = {ff.gate_up_plus.data_ptr() for ff in copies.packed} | {w.gate_up.data_ptr() for w in copies.dense}
    assert len(pointers) == len(copies.packed) + len(copies.dense)
    assert len(copies.packed) * 3_000 >= 4 * 10_000
    assert len(copies.dense) * kernel_cases.dense_bytes(8, 64, 2) >= 4 * 10_000
    assert kernel_measure.turns(1_000_000, "cpu") == 2, "a block larger than any cache has a second copy"
    plain = copies.blocks(rank=0)[0]
    assert (plain.num_neurons, plain.gate_up_plus.data_ptr()) == (64, copies.packed[0].gate_up_plus.data_ptr())


def test_a_wrong_token_is_found_among_right_ones() -> None:
    expected = torch.randn(16, 64, generator=generator())
    assert kernel_agreement.check(expected * (1 + 2**-9), expected) == pytest.approx(2**-9, rel=1e-3)
    for wrong in (1.02, float("nan")):
        y = expected.clone()
        y[7] *= wrong
        with pytest.raises(CapreseError, match="token by token"):
            kernel_agreement.check(y, expected)


def test_cats_may_round_at_the_threshold_only() -> None:
    down = torch.randn(32, 64, generator=generator()).bfloat16()
    ff = PackedFF(torch.zeros(64, 64).bfloat16(), down, "silu")
    g = torch.linspace(1, 2, 32)[None]
    tau = g[:, 16] * 1.001  # neuron 16 is just below
    z, right = torch.ones(1, 32), torch.arange(32)[None] >= 17

    def found(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (z * keep) @ ff.down_plus.float(), keep.sum(dim=1)

    at_threshold, elsewhere = right.clone(), right.clone()
    at_threshold[0, 16] = elsewhere[0, 5] = True
    for keep in (right, at_threshold):
        kernel_agreement.check_cats(found(keep), found(right), g, z, tau, ff)
    elsewhere[0, 17] = False  # as many, but others
    with pytest.raises(CapreseError, match="token by token"):
        kernel_agreement.check_cats(found(elsewhere), found(right), g, z, tau, ff)


def test_samples_take_turns_and_stop_in_time() -> None:
    made: list[str] = []

    class Fake:
        def __init__(self, name: str):
            self.name = name

        def sample(self) -> float:
            made.append(self.name)
            return float(len(made))

    timers: Any = {name: Fake(name) for name in "ab"}
    timings = kernel_timing.interleave(timers, repeats=4, seconds=60)
    assert "".join(made) == "abbaabba"
    assert timings["a"] == kernel_timing.Timing(median=4.5, least=1, iqr=pytest.approx(2.5), samples=4)  # 1, 4, 5, 8
    assert kernel_timing.interleave(timers, repeats=100, seconds=0)["a"].samples == 3


def test_vllms_own_linear_is_a_candidate() -> None:
    pytest.importorskip("vllm")
    weights = kernel_dense.DenseWeights(torch.randn(128, 32).bfloat16() / 6, torch.randn(32, 64).bfloat16() / 8)
    x = torch.randn(3, 32).bfloat16()
    found = kernel_dense.candidates("cpu", "silu", compiled=False)
    assert set(found) == {"linear", "onednn"}
    assert {"cublas", "cublas+compile", "compiled"} == set(kernel_dense.candidates("cuda", "silu", compiled=True))
    gate, up = (x.float() @ weights.gate_up.float().t()).chunk(2, dim=1)
    expected = (torch.nn.functional.silu(gate) * up) @ weights.down.float().t()
    for make in found.values():
        kernel_agreement.check(make(weights)(x), expected)


@pytest.mark.usefixtures("small")
def test_from_cases_to_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = kernel_bench.run(all_groups(), SETTINGS, backend(), tmp_path)
    assert (result.errors, result.partial) == ([], False)
    assert len(result.rows) == sum(len(group.cases) + 1 for group in all_groups())
    assert {"shapes", "batch", "density", "overlap", "core", "statistics"} == set(result.sections())
    for row in result.rows:
        assert row["gb_s"] == pytest.approx(row["required_mb"] * 1e6 / (row["time_us"] / 1e6) / 1e9)
        assert row["bandwidth_share"] == pytest.approx(row["gb_s"] / row["bandwidth_gb_s"])
        assert row["samples"] == 3
    one = {(row["method"], row.get("rank")): row for row in result.sections()["shapes"]}
    assert one["dense", None]["required_mb"] * 1e6 == 3 * 96 * 32 * 2
    assert one["dense", None]["ratio"] == 1
    assert one["griffin", 256]["required_mb"] * 1e6 == (3 * 48 + 2 * 256) * 32 * 2
    cats = one["cats", 256]
    assert cats["required_mb"] * 1e6 == (96 + 2 * cats["union"] + 2 * 256) * 32 * 2
    assert cats["union"] == round(96 * cats["kept_share"]) in range(48, 52)  # equal magnitudes may add a few
    assert one["griffin", 0]["ratio"] == pytest.approx(one["griffin", 0]["time_us"] / one["dense", None]["time_us"])
    cores = [row for row in result.sections()["core"] if row["method"] == "core"]
    assert {row["union"] for row in cores} == {48}
    assert {row["required_mb"] * 1e6 for row in cores} == {(3 * 48 + 2 * rank) * 32 * 2 for rank in (0, 256)}
    shared = [row for row in result.sections()["batch"] if row.get("selection") == "shared"]
    assert {row["union"] for row in shared} == {48}

    assert Result.load(tmp_path / "kernels.json") == result
    with (tmp_path / "kernels.csv").open() as file:
        assert [float(row["time_us"]) for row in csv.DictReader(file)] == [row["time_us"] for row in result.rows]
    page = (tmp_path / "kernels.html").read_text()
    assert page.count("<svg") == len(kernel_bench.PLOTS)
    assert page.count("<table>") == 2 * 6  # what the terminal shows, and all figures
    assert page.count("<tr>") == 2 * (len(result.rows) + 6)
    assert result.provenance["source"] in page
    assert not re.search(r"""<script|<link|<img|@import|(?:src|href)=(?!["']?#)|url\((?!#)""", page)
    show(result, kernel_bench.COLUMNS, as_json=False)
    printed = capsys.readouterr().out
    assert "tiny" in printed
    assert "of dense" in printed


@pytest.mark.usefixtures("small")
def test_a_wrong_kernel_is_an_error_not_a_row(tmp_path: Path) -> None:
    def wrong(*arguments: Any, **more: Any) -> torch.Tensor:
        return reference.griffin_ff(*arguments) * 1.1

    def broken(*arguments: Any, **more: Any) -> Any:
        raise RuntimeError("no such kernel")

    result = kernel_bench.run(all_groups("shapes"), SETTINGS, backend(griffin_ff=wrong, cats_ff=broken), tmp_path)
    assert [row["method"] for row in result.rows] == ["dense"]
    assert len(result.errors) == 4
    assert "griffin, density 0.5, rank 256: kernel: expected an output within" in result.errors[0]
    assert "no such kernel" in result.errors[-1]
    assert "Failed: shapes, tiny" in (tmp_path / "kernels.html").read_text()
    of_core = kernel_bench.run(all_groups("core")[:1], SETTINGS, backend(core_ff=broken), tmp_path / "core")
    assert [row.get("selection") for row in of_core.rows] == [None, "products", "products"]
    mended = kernel_bench.run(all_groups("shapes"), SETTINGS, backend(), tmp_path, resume=True)
    assert (len(mended.rows), mended.errors) == (5, [])


@pytest.mark.parametrize(("name", "slot"), [("griffin_observe", 3), ("cats_observe", 4)])
@pytest.mark.usefixtures("small")
def test_a_wrong_statistic_is_an_error(tmp_path: Path, name: str, slot: int) -> None:
    def twice(*arguments: Any) -> None:
        getattr(reference, name)(*arguments)
        arguments[slot].mul_(2)

    result = kernel_bench.run(all_groups("statistics"), SETTINGS, backend(**{name: twice}), tmp_path)
    assert len(result.errors) == 1
    assert len(result.rows) == 2


@pytest.mark.usefixtures("small")
def test_interrupted_then_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    todo, measured, real = all_groups("shapes", "batch"), [], kernel_measure.measure

    def measure(group: kernel_cases.Group, *rest: Any) -> kernel_measure.Measured:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(group)
        return real(group, *rest)

    monkeypatch.setattr(kernel_measure, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        kernel_bench.run(todo, SETTINGS, backend(), tmp_path)
    kept = Result.load(tmp_path / "kernels.json")
    assert kept.partial
    assert len(kept.rows) == sum(len(group.cases) + 1 for group in todo[:2])
    assert "Partial" in (tmp_path / "kernels.html").read_text()

    measured.clear()
    whole = kernel_bench.run(todo, SETTINGS, backend(), tmp_path, resume=True)
    assert not whole.partial
    assert measured == todo[2:]
    assert whole.rows[: len(kept.rows)] == kept.rows
    assert len(whole.rows) == sum(len(group.cases) + 1 for group in todo)

    measured.clear()
    for part in ("git_commit", "source", "hardware", "versions"):
        other = replace(whole, provenance=whole.provenance | {part: "another"})
        with pytest.raises(CapreseError, match=f"the same {part.replace('_', ' ')} as the earlier run"):
            recording.previous(tmp_path / "kernels.json", other)
    with pytest.raises(CapreseError, match="the same settings as the earlier run"):
        kernel_bench.run(todo, replace(SETTINGS, repeats=4), backend(), tmp_path, resume=True)
    kernel_bench.run(todo[:1], replace(SETTINGS, repeats=4), backend(), tmp_path)  # without --resume: measured again
    assert measured == todo[:1]


def test_users_mistakes(tmp_path: Path) -> None:
    with pytest.raises(CapreseError, match=r"--shapes: expected some of llama-3\.1-8b"):
        kernel_bench.kernels(shapes="llama")
    with pytest.raises(CapreseError, match="--sections"):
        kernel_bench.kernels(sections="shapes,colours")
    with pytest.raises(CapreseError, match="one for the device cpu"):
        kernel_bench.kernels(device="cpu", backend="triton")
    if not torch.cuda.is_available():
        with pytest.raises(CapreseError, match="a GPU that torch can use"):
            kernel_bench.kernels(device="cuda")
    (tmp_path / "file").touch()
    with pytest.raises(CapreseError, match="a folder that can be written"):
        kernel_bench.run([], SETTINGS, backend(), tmp_path / "file" / "out")
    with pytest.raises(CapreseError, match="a JSON file that a benchmark wrote"):
        Result.load(tmp_path / "file")


def made(tmp_path: Path, name: str, **changes: Any) -> Path:
    """A result's file, with parts of its provenance replaced."""
    rows = [
        {"section": "shapes", "shape": "tiny", "hidden_size": 8, "method": "dense", "time_us": 4.0, "ratio": 1.0},
        {"section": "shapes", "shape": "tiny", "hidden_size": 8, "method": "griffin", "time_us": 2.0, "ratio": 0.5},
    ]
    provenance = {
        "command": "caprese bench kernels",
        "git_commit": "abc",
        "time": "2026-11-20T10:00:00+00:00",
        "hardware": CPU | {"gpus": []},
        "versions": {"torch": "2.13"},
        "settings": {},
    }
    parts = {"rows": rows, "partial": False} | {key: changes.pop(key) for key in ("rows", "partial") if key in changes}
    keys, measures = ["section", "shape", "method"], ["time_us", "ratio"]
    result = Result(changes.pop("benchmark", "kernels"), provenance | changes, keys, measures, **parts)
    folder = tmp_path / name
    return result.write(folder)


def shown(capsys: pytest.CaptureFixture[str], a: Path, b: Path) -> str:
    compare.compare(a, b)
    return capsys.readouterr().out


def test_compare_sets_cases_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = made(tmp_path, "a")
    rows = [
        row | {"time_us": row["time_us"] * factor} for row, factor in zip(Result.load(a).rows, (1, 1.5), strict=True)
    ]
    text = shown(capsys, a, made(tmp_path, "b", rows=rows))
    (line,) = [line for line in text.splitlines() if "griffin" in line]
    assert [cell.strip() for cell in line.split("│")[2:5]] == ["2", "3", "1.500"]
    assert "warning" not in text


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"git_commit": "abc-dirty"}, "B was measured on uncommitted changes"),
        ({"git_commit": None}, "the commit of B is unknown"),
        ({"hardware": CPU | {"gpus": [H200]}}, "different hardware.gpus: [] and [{'name': 'NVIDIA H200'}]"),
        ({"versions": {"torch": "2.11"}}, "different versions.torch: 2.13 and 2.11"),
        ({"settings": {"repeats": 3}}, "different settings.repeats: None and 3"),
        ({"partial": True}, "B is partial"),
        ({"rows": [{"section": "shapes", "shape": "8b", "method": "dense"}]}, "different shapes: tiny and 8b"),
        (
            {"rows": [{"section": "shapes", "shape": "tiny", "hidden_size": 9, "method": "dense"}]},
            "shapes of one name but different sizes",
        ),
    ],
)
def test_compare_warns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], warning: str
) -> None:
    text = shown(capsys, made(tmp_path, "a"), made(tmp_path, "b", **changes))
    assert warning in text
    assert "cases are only in A" in text or len(changes.get("rows", "..")) == 2


def test_compare_refuses_another_benchmark(tmp_path: Path) -> None:
    with pytest.raises(CapreseError, match="two of one benchmark"):
        compare.compare(made(tmp_path, "a"), made(tmp_path, "b", benchmark="latency"))


def test_a_table_says_once_what_all_rows_share() -> None:
    columns: Columns = {"n": ("n", str), "rank": ("r", str), "x": ("x", str)}
    found = table("t", [{"n": 1, "r": 8}, {"n": 2, "r": 8}, {"n": 3}], columns)
    assert found.title == "t: rank 8"
    assert [column.header for column in found.columns] == ["n"]
    assert terminal.result().width >= 150


def test_the_command_works_outside_a_checkout(tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['caprese', 'bench', '--help']; from caprese_serve.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, "compare" in done.stdout) == (0, True), done.stderr
