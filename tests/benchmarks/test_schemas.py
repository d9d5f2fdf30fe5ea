"""Every committed result follows its schema; what breaks a schema is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from caprese_bench.results import schemas
from caprese_kernels.errors import CapreseError

RESULTS = sorted((Path(__file__).parents[2] / "benchmarks/results").glob("*/*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_results_are_valid(path: Path) -> None:
    assert schemas.check(path) > 0
    found = json.loads(path.read_text())
    if "name" in found:
        assert found["name"] == path.stem
        jsonschema.validate(found, schemas.json_schema(found["name"]))


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    found = json.loads(next(path for path in RESULTS if path.stem == "parameters").read_text())
    change(found)
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["rows"][3].pop("added"), r"rows\.3\.added: .*found nothing"),
        (lambda r: r["rows"][3].update(added="9"), r"rows\.3\.added: expected input should be a valid integer"),
        (lambda r: r["rows"][3].update(added_of_ff=1.5), r"rows\.3\.added_of_ff: "),
        (lambda r: r["rows"][3].update(colour=1), r"rows\.3\.colour: .*found 1"),
        (lambda r: r["provenance"].pop("time"), r"provenance\.time: .*found nothing"),
        (lambda r: r["keys"].append("colour"), "keys and measures among the columns; found colour"),
        (lambda r: r["rows"].append(r["rows"][0]), "one row for each case; found two for"),
        (lambda r: r.update(name="colours"), "one of kernels, "),
    ],
)
def test_what_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(changed(change)))
    with pytest.raises(CapreseError, match=message):
        schemas.check(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    for text in ("", "[]", "3"):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(CapreseError):
            schemas.check(tmp_path / "r.json")
    with pytest.raises(CapreseError, match="No such file"):
        schemas.check(tmp_path / "none.json")
