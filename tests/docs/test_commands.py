"""Every command in README.md, docs/ and the other pages is run, or parsed by the program it calls; none is unknown.

A shell block is a fence with the language `bash`; output is `text`. Inline code that begins with a program's name is
held to that program's verbs and flags too. Commands that a published result records as its own are history, and are
left out.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.requirements import Requirement

from caprese_serve import cli
from caprese_vllm.compat import PROVEN_VLLM
from tests.support.markdown import PAGES, ROOT, Snippet, code_blocks, inline_code

LANGUAGES = {"bash", "python", "text", "yaml", "json", "toml"}
# Run from a copy of the tree's top folder, where math.jsonl, adapters.safetensors and out/ are the test's own.
RUN = (
    "caprese --version",
    "caprese --help",
    "caprese inspect --help",
    "caprese serve serve/caprese_serve/demo/model "
    "--caprese-weights serve/caprese_serve/demo/adapters/griffin.safetensors --dry-run",
    "caprese collect-env",
    "caprese collect-env --json",
    "caprese inspect serve/caprese_serve/demo/adapters/griffin.safetensors --model serve/caprese_serve/demo/model",
    "caprese inspect serve/caprese_serve/demo/adapters/cats.safetensors --json",
    "caprese bench compare benchmarks/results/amd-epyc/kernels.json out/bench/kernels.json",
    "caprese bench validate benchmarks/results/intel-xeon/latency.json",
    "caprese distill --config examples/distill.yaml --dry-run",
    "caprese distill --config examples/distill.yaml --rank 16 --dry-run",
    "make help",
)
# The others, by how they begin, and why they are only parsed.
PARSED = {
    "caprese demo": "minutes: tests/serve/test_demo.py runs it in small",
    "caprese serve": "starts a server, or needs a model of the Hub; tests/serve/test_serve.py",
    "caprese playground": "starts a server; tests/serve/test_playground.py opens its page",
    "caprese distill": "needs a model of the Hub; tests/distill runs every option",
    "caprese calibrate": "needs a model of the Hub; tests/distill/test_calibrate.py runs it",
    "caprese evaluate": "needs a model of the Hub; tests/distill/test_selected.py runs it",
    "caprese inspect": "needs a model of the Hub, or names placeholders",
    "caprese doctor": "needs a model of the Hub; tests/engine/test_doctor.py runs it",
    "caprese bench": "minutes to hours; tests/benchmarks runs every verb in small",
    "caprese --install-completion": "changes the user's shell",
    "vllm serve": "starts a server: tests/e2e and tests/examples do",
    "pip install": "changes the environment; tests/docs/test_install.py runs the one that needs no network",
    "make": "minutes, or makes an environment; the target's existence is checked",
    "python -m tools.": "can write into the tree; tests/tools runs each",
    "python examples/": "tests/examples runs each",
    "bash examples/": "tests/examples runs each",
    "pytest": "this is pytest; the files it names are checked",
    "curl": "needs a server; tests/e2e asks the same path",
    "docker": "needs a container service; tests/deploy builds and asks the CPU image where there is one",
    "kubectl": "needs a cluster; tests/deploy holds the manifests to known fields",
    "helm": "needs a cluster; tests/deploy holds the values to known fields",
    "pre-commit install": "changes the user's hooks",
    ". .venv/bin/activate": "changes the user's shell",
}


@dataclass(frozen=True)
class Command:
    """One command, its words without redirections, and where it stands. Inline ones may be incomplete."""

    where: Snippet
    words: tuple[str, ...]
    inline: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def begins(self, start: str) -> bool:
        """Whether its first words are these; a start that ends in "/" or "." leaves the last word open."""
        return f"{self.text} ".startswith(f"{start} " if start[-1].isalnum() else start)


def commands_of(script: str) -> Iterator[tuple[str, ...]]:
    """The commands of a shell script: continued lines joined, comments and redirections dropped, `&&` split."""
    for line in script.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word in ("&&", "&", ";"):
                if words:
                    yield tuple(words)
                words = []
            else:
                words.append(word)


def normal(words: tuple[str, ...]) -> tuple[str, ...]:
    """`.venv/bin/vllm` as `vllm`, no `> file`."""
    kept = words[: words.index(">")] if ">" in words else words
    return (kept[0].removeprefix(".venv/bin/"), *kept[1:])


def find_commands() -> list[Command]:
    found = []
    for page in PAGES:
        for block in code_blocks(page):
            if block.language == "bash":
                found += [Command(block, normal(words)) for words in commands_of(block.text)]
        lines = page.read_text().splitlines()
        for span in inline_code(page):
            recorded = f"Measured by `{span.text}`"
            if any(recorded in line for line in lines):
                continue
            if re.match(r"(caprese|make|vllm serve|pip install|python -m) [a-z\"-]", span.text):
                found += [Command(span, normal(words), inline=True) for words in commands_of(span.text)]
    return list({(c.where.page, c.words, c.inline): c for c in found}.values())


COMMANDS = find_commands()


# -- what each program knows -----------------------------------------------------------------------------------------


def check_caprese(command: Command) -> None:
    """The verb exists, and so does every flag; in a shell block, all arguments together parse."""
    node: Any = typer.main.get_command(cli.app)
    name, rest = "caprese", list(command.words[1:])
    while hasattr(node, "list_commands"):
        if not rest or rest[0].startswith("-"):
            assert {word for word in rest if word.startswith("-")} <= flags_of(node) | {"--help"}, command
            return
        context = node.make_context(name, [], resilient_parsing=True)
        verb, node, rest = node.resolve_command(context, rest)  # a usage error, if there is no such verb
        name = f"{name} {verb}"
    if node.context_settings.get("ignore_unknown_options"):
        return  # vLLM's flags, which `test_vllm_knows_its_flags` checks
    given = {word.split("=")[0] for word in rest if re.fullmatch(r"--?[a-z][\w-]*(=.*)?", word)}
    assert given <= flags_of(node) | {"--help"}, f"{command}: no {sorted(given - flags_of(node))}"
    if not command.inline and "--help" not in given:
        node.make_context(name, rest)  # raises a usage error with the reason


def flags_of(node: Any) -> set[str]:
    return {flag for parameter in node.params for flag in (*parameter.opts, *parameter.secondary_opts)}


def check_make(command: Command) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    variables = set(re.findall(r"^([A-Z_]+) \??:?=", (ROOT / "Makefile").read_text(), flags=re.M))
    for word in command.words[1:]:
        variable, assigned, _ = word.partition("=")
        assert variable in (variables if assigned else targets), f"{command}: no {variable}"


def check_pip(command: Command) -> None:
    """The extras that it names exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in command.words[2:]:
        if word.startswith("."):
            wanted = set(re.findall(r"[\w-]+", word[1:]))
        elif word.startswith("caprese-vllm"):
            wanted = Requirement(word.replace("$REPOSITORY", "https://example.org/x.git")).extras
        else:
            assert word in ("pre-commit", f"vllm=={PROVEN_VLLM}.*"), command
            continue
        assert wanted <= set(extras), f"{command}: no extra {sorted(wanted - set(extras))}"


def check_path(command: Command) -> None:
    """A script, a module or a test file of this tree."""
    for word in command.words[1:]:
        if "/" in word and not word.startswith("-"):
            assert (ROOT / word).exists(), f"{command}: no {word}"
    if command.words[1] == "-m":
        assert find_spec(command.words[2]), f"{command}: no module {command.words[2]}"


def check_file(command: Command) -> None:
    """What -f names is a file of this tree."""
    for option, word in pairwise(command.words):
        assert option != "-f" or (ROOT / word).is_file(), f"{command}: no {word}"


def check_docker(command: Command) -> None:
    """Its Dockerfile is there; an image that runs is one that a page builds, and its words serve with Caprese."""
    check_file(command)
    built = {c.words[c.words.index("-t") + 1] for c in COMMANDS if c.begins("docker build")}
    if command.words[1] == "run":
        (image,) = built & set(command.words)
        assert "--caprese-weights" in command.words[command.words.index(image) :], command


def check_nothing(command: Command) -> None:
    """A program of others, whose row in PARSED says why it is not run."""


CHECKS = {
    "caprese": check_caprese,
    "make": check_make,
    "pip": check_pip,
    "python": check_path,
    "bash": check_path,
    "pytest": check_path,
    "vllm": check_nothing,  # all at once, below: vLLM's parser takes ten seconds to import
    "curl": check_nothing,
    "docker": check_docker,
    "kubectl": check_file,
    "helm": check_file,
    "pre-commit": check_nothing,
    ".": check_nothing,
}


# -- the tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_the_program_knows_the_command(command: Command) -> None:
    assert command.words[0] in CHECKS, f"{command}: an unknown program"
    CHECKS[command.words[0]](command)


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.inline], ids=str)
def test_a_command_of_a_shell_block_is_run_or_says_why_not(command: Command) -> None:
    assert command.text in RUN or any(command.begins(start) for start in PARSED), "add it to RUN or PARSED"


def test_the_tables_are_not_longer_than_the_pages() -> None:
    written = {command.text for command in COMMANDS}
    assert set(RUN) <= written
    assert not [start for start in PARSED if not any(command.begins(start) for command in COMMANDS)]
    assert len(written) > 60


def test_vllm_knows_its_flags() -> None:
    starts = (("vllm", "serve"), ("caprese", "serve"))
    serving = [c.words[2:] for c in COMMANDS if c.words[:2] in starts and not c.inline and "--config" not in c.words]
    lines = [[word for word in words[1:] if word != "--dry-run"] for words in serving]
    assert len(lines) >= 6
    code = """
import json, sys
from caprese_vllm import plugin
plugin.register()
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
for words in json.loads(sys.argv[1]):
    known = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm serve"))
    assert "caprese" in known.parse_args(words).additional_config, words
"""
    done = subprocess.run([sys.executable, "-c", code, json.dumps(lines)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's top folder by links, with an out/ of its own."""
    top = tmp_path_factory.mktemp("tree")
    for path in ROOT.iterdir():
        if path.name not in ("out", ".git"):
            (top / path.name).symlink_to(path)
    (top / "out/bench").mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks/results/amd-epyc/kernels.json", top / "out/bench")
    return top


@pytest.mark.parametrize("text", RUN)
def test_the_command_runs(text: str, tree: Path) -> None:
    program, *arguments = shlex.split(text)
    command = [sys.executable, "-m", "caprese_serve"] if program == "caprese" else [program]
    done = subprocess.run([*command, *arguments], cwd=tree, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
    if "--json" in arguments:
        json.loads(done.stdout)


# -- the other languages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_have_a_language_and_parse(page: Path) -> None:
    for block in code_blocks(page):
        assert block.language in LANGUAGES, f"{block}: a fence with one of {sorted(LANGUAGES)}"
        if block.language == "python":
            compile(block.text, str(block), "exec")
        elif block.language == "yaml":
            assert yaml.safe_load(block.text), block
        elif block.language == "json":
            assert json.loads(block.text), block
        elif block.language == "toml":
            assert tomllib.loads(block.text), block
