"""`caprese bench selection` on the demo model: relations that hold for any figures."""

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest

from caprese_bench.recovery.domains import domain_rows, functions, passages
from caprese_bench.recovery.selection import MIXTURE, SECTIONS, selection
from caprese_kernels.errors import CapreseError
from caprese_serve.demo import MODEL


def write(path: Path, words: str, count: int = 12) -> str:
    rows = [{"prompt": f"{words} {n}?", "response": f"{words}: {n} + {n} = {2 * n}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(out: Path, data: list[str], **options: Any) -> list[dict[str, Any]]:
    given = {"samples": 2, "prior_samples": 3, "densities": "0.5,1", "priors": "0,0.5,1", "cores": "0,0.5,1"}
    selection(model=str(MODEL), data=data, **(given | options), out=out)
    return json.loads((out / "selection.json").read_text())["rows"]


def test_the_table(tmp_path: Path) -> None:
    data = [f"sums={write(tmp_path / 'a.jsonl', 'Add')}", f"pairs={write(tmp_path / 'b.jsonl', 'Two of')}"]
    rows = run(tmp_path, data)
    assert {row["section"] for row in rows} == set(SECTIONS.values())
    assert {row["data"] for row in rows} == {"sums", "pairs"}
    assert {row["prior_data"] for row in rows} == {None, MIXTURE, "sums", "pairs"}
    for row in rows:
        assert math.isfinite(row["kl"])
        assert row["kl"] >= -1e-6
        assert 0 <= row["agreement"] <= 1
        if row["density"] == 1:  # nothing is left out
            assert row["kl"] == pytest.approx(0, abs=1e-5)
            assert row["agreement"] == 1
    half = [row for row in rows if row["density"] == 0.5]
    assert max(row["kl"] for row in half) > 1e-4
    # Where the prior alone decides, its weight and the core say the same twice.
    by_prior = {row["data"]: row["kl"] for row in half if row["prior"] == 1 and not row["core"] and same(row)}
    by_core = {row["data"]: row["kl"] for row in half if row["core"] == 1 and same(row)}
    assert by_prior == pytest.approx(by_core, rel=1e-6)
    assert len(by_core) == 2


def same(row: dict[str, Any]) -> bool:
    return row["section"] == SECTIONS["all"] and row["prior_data"] == MIXTURE


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    data = [f"sums={write(tmp_path / 'a.jsonl', 'Add')}"]
    options = {"layers": "all", "densities": "0.5", "priors": "0.5", "cores": "0"}
    rows = run(tmp_path, data, **options)
    path = tmp_path / "selection.json"
    left = json.loads(path.read_text())
    left["rows"] = rows[1:]
    path.write_text(json.dumps(left))
    again = run(tmp_path, data, **options, resume=True)
    assert sorted(again, key=str) == sorted(rows, key=str)
    write(tmp_path / "a.jsonl", "Other words", 5)  # as many as are needed, and other ones
    with pytest.raises(CapreseError, match=r"--resume of .*expected the same settings"):
        run(tmp_path, data, **options, resume=True)
    run(tmp_path, data, **options)
    write(tmp_path / "a.jsonl", "Other words", 4)
    with pytest.raises(CapreseError, match="samples of sums: expected 5 of at most 512 tokens; found 4"):
        run(tmp_path, data, **options)


def test_built_in_domains() -> None:
    for prompt, response in list(functions())[:50]:
        assert prompt.startswith("Write this Python function:\n\ndef ")
        (node,) = ast.parse(response.removeprefix("```python\n").removesuffix("```")).body
        assert isinstance(node, ast.FunctionDef)
    assert len(list(passages())) > 50
    assert domain_rows("prose", "", 5, 1) == domain_rows("prose", "", 5, 1) != domain_rows("prose", "", 5, 2)


def test_the_rows_of_a_source_are_shuffled(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", "Add", 40)
    rows, provenance = domain_rows("sums", source, 30, 1)
    assert len(rows) == 30
    assert [row.line for row in rows] != sorted(row.line for row in rows)
    assert provenance["rows"] == 40
    assert len(domain_rows("sums", source, 50, 1)[0]) == 40


def test_what_a_user_mistypes(tmp_path: Path) -> None:
    with pytest.raises(CapreseError, match=r"--data poems: .* one of code, prose"):
        run(tmp_path, ["poems"])
    with pytest.raises(CapreseError, match="NAME other than mixture"):
        run(tmp_path, [f"mixture={write(tmp_path / 'a.jsonl', 'Add')}"])
    with pytest.raises(CapreseError, match="samples of sums"):
        run(tmp_path, [f"sums={write(tmp_path / 'b.jsonl', 'Add', count=3)}"])
    with pytest.raises(CapreseError, match="samples of sums: expected 5 of at most 16 tokens"):
        run(tmp_path, [f"sums={write(tmp_path / 'c.jsonl', 'Add ' * 20)}"], max_length=16)
