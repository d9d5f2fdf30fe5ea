"""The figures of README.md and docs/, and the picture, are the measured ones."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from caprese_serve.demo.results import DemoReport
from tools import picture, readme

MOST_LINES = 120  # a minute's reading


@pytest.mark.parametrize(("page", "text"), readme.pages().items(), ids=lambda value: getattr(value, "name", ""))
def test_the_page_is_the_measured_one(page: Path, text: str) -> None:
    assert page.read_text() == text, "run: python -m tools.readme"


def test_the_picture_carries_its_figures_and_their_source() -> None:
    """Text stays text in the SVG, and the same results give the same bytes: no date, no random ids."""
    shown = readme.Summary.load()
    drawn = readme.draw(shown)
    assert drawn == readme.draw(shown)
    texts = {"".join(element.itertext()).strip() for element in ElementTree.fromstring(drawn).iter()}
    for variant in picture.VARIANTS:
        time = shown.time(variant, readme.SMALL)
        assert time is not None
        assert f"{shown.score(variant, 'word problems')['score']:.1%}" in texts
        assert any(text.startswith(f"{time['tpot_ms']:.1f} ms") for text in texts)
    for path in (shown.accuracy_file, shown.latency_file):
        assert any(str(path.relative_to(readme.ROOT)) in text for text in texts)
    assert "<dc:date>" not in drawn
    assert "1.2M parameters" in drawn
    assert "random weights" in drawn


def test_the_readme_is_short() -> None:
    assert len(readme.README.read_text().splitlines()) <= MOST_LINES


def test_the_index_page_needs_no_repository() -> None:
    """A package index shows it without the files beside it."""
    text = readme.INDEX_PAGE.read_text()
    assert "](docs/" not in text
    for target in re.findall(r"\]\(([^)]*)\)", text):
        assert target.startswith("https://"), target
    assert "![" not in text
    assert readme.index_page("see [the docs](docs/x.md#y) and [`a.py`](a.py), [vLLM](https://vllm.ai)\n") == (
        "see the docs (`docs/x.md`) and `a.py`, [vLLM](https://vllm.ai)\n"
    )


def test_the_results_show_what_they_must() -> None:
    """The claims of the README: GRIFFIN loses much, and layer-wise adapters give at least half of it back."""
    report = DemoReport.model_validate_json(readme.newest("demo").read_text())
    full, griffin, caprese = (report.row(name) for name in ("Full", "GRIFFIN", "Caprese (GRIFFIN)"))
    assert full
    assert griffin
    assert caprese
    assert len(full.math.marks) >= 300
    assert len(full.reading.marks) >= 100
    assert min(full.math_accuracy, full.reading_accuracy) >= 0.9
    lost = full.math_accuracy - griffin.math_accuracy
    assert lost >= 0.15
    assert caprese.math_accuracy - griffin.math_accuracy >= lost / 2
