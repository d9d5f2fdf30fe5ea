"""The Grafana dashboard: panels beside each other, expressions that Prometheus can read. tests/e2e has its metrics."""

import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path

import pytest

from caprese_vllm.metrics import METRICS
from tests.support.dashboard import DASHBOARD, expressions, metrics_of

VARIABLES = {"$__rate_interval": "5m", "$job": ".*", "$instance": ".*"}


def test_it_shows_every_metric_of_ours_and_no_other() -> None:
    ours = {name for name in metrics_of(DASHBOARD) if name.startswith("caprese:")}
    assert ours == {f"caprese:{metric.name}" for metric in METRICS} | {"caprese:info"}


def test_panels_have_their_own_place() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 10
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (a, b)


def test_each_panel_can_choose_its_servers() -> None:
    """Every selector has the variables that the dashboard defines, and no other variable is used."""
    known = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    for text in expressions(DASHBOARD):
        assert len(re.findall(r'job=~"\$job", instance=~"\$instance"', text)) == len(re.findall(r"\b\w+:\w+", text))
        assert {name for name in re.findall(r"\$(\w+)", text) if name != "__rate_interval"} <= known


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)")
def test_prometheus_can_read_the_expressions(tmp_path: Path) -> None:
    rules = ["groups:", "- name: dashboard", "  rules:"]
    for number, text in enumerate(expressions(DASHBOARD)):
        for name, value in VARIABLES.items():
            text = text.replace(name, value)
        rules += [f"  - record: test:{number}", f"    expr: {text!r}"]
    (tmp_path / "rules.yaml").write_text("\n".join(rules))
    done = subprocess.run(["promtool", "check", "rules", "rules.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(list(expressions(DASHBOARD)))} rules found" in done.stdout
