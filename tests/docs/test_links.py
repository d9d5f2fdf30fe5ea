"""Links and paths in README.md, docs/ and examples/ exist."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.support.markdown import PAGES, ROOT, anchors, inline_code, links

FOLDERS = ("benchmarks/", "caprese_vllm/", "deploy/", "distill/", "docs/", "examples/", "kernels/", "requirements/",
           "serve/", "tests/", "tools/")  # fmt: skip


def by_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.text.partition("#")
        if re.match(r"https?://", target):
            continue
        assert ":" not in target, f"{link}: {link.text}"
        file = (page.parent / unquote(target)).resolve() if target else page
        assert file.is_relative_to(ROOT), f"{link}: {target} is outside the repository"
        assert file.exists(), f"{link}: no {target}"
        if anchor:
            assert anchor in anchors(file), f"{link}: no heading #{anchor} in {file.name}"


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_named_paths_exist(page: Path) -> None:
    """Inline code that begins with a folder of the repository is a path in it."""
    for span in inline_code(page):
        path = span.text.split(":")[0]
        if path.startswith(FOLDERS) and re.fullmatch(r"[\w./-]+", path):
            assert (ROOT / path).exists(), f"{span}: no {path}"


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs/index.md"
    listed = {(index.parent / link.text).resolve() for link in links(index)}
    pages = {page for page in PAGES if page.parent == index.parent}
    assert pages - listed == {index, ROOT / "docs/package-index.md"}  # the latter is the README for a package index


def test_modules_of_the_architecture_page_exist() -> None:
    """Each section `## \\`folder/\\`` has tables whose first column names files of that folder."""
    page = ROOT / "docs/architecture.md"
    sections = re.split(r"^## ", page.read_text(), flags=re.M)
    checked = 0
    for section in sections:
        folder = re.match(r"`([\w/]+)/`", section)
        if not folder:
            continue
        for row in re.findall(r"^\| (`.*?) \|", section, flags=re.M):
            for name in re.findall(r"`([^`]+)`", row):
                assert (ROOT / folder[1] / name).exists(), f"{page}: no {folder[1]}/{name}"
                checked += 1
    assert checked > 40


def test_every_module_of_the_plugin_is_in_the_architecture_page() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    modules = {path.name for path in (ROOT / "caprese_vllm").glob("*.py")} - {"__init__.py"}
    assert not {name for name in modules if f"`{name}`" not in text}
