"""The README's figures are the measured ones."""

from caprese_serve.demo.results import DemoReport
from tools import readme


def test_the_readmes_tables_are_the_measured_ones() -> None:
    text = readme.README.read_text()
    assert readme.render(text) == text, "run: python tools/readme.py"


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
