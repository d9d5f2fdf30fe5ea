"""The real thing: `vllm serve` with the demo model and an adapter, asked over HTTP."""

import subprocess
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import httpx
import pytest
from openai import BadRequestError, OpenAI
from rich.console import Console

from caprese_kernels.adapters import Adapters, read_config
from caprese_kernels.errors import CapreseError
from caprese_serve.demo import ADAPTERS, MODEL
from caprese_serve.demo.client import ask
from caprese_serve.demo.problems import Problem, chat, problems
from caprese_serve.demo.run import ENV, FLAGS, SERVED_NAME
from caprese_serve.playground.app import Playground
from caprese_serve.server import VllmServer, vllm_program
from caprese_vllm.metrics import METRICS
from tests.support.browser import MISSING, browsing
from tests.support.dashboard import DASHBOARD, metrics_of
from tests.support.fake_openai import serving
from tests.support.models import make_adapter

pytestmark = pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="the demo model is not in this tree")
CPU = ("--dtype", "float32")
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    shows = ("--caprese-config.show_selections", "true")
    flags = (*FLAGS, *CPU, "--caprese-weights", str(ADAPTERS["griffin"]), *shows)
    log = tmp_path_factory.mktemp("e2e") / "server.log"
    with VllmServer(MODEL, *flags, log=log, env=ENV, console=QUIET) as running:
        yield running


def scrape(server: VllmServer) -> dict[str, float]:
    """Every series on /metrics that is Caprese's or vLLM's."""
    lines = httpx.get(f"{server.url}/metrics", trust_env=False).text.splitlines()
    pairs = [line.rpartition(" ") for line in lines if line.startswith(("caprese:", "vllm:"))]
    return {name: float(value) for name, _, value in pairs}


@pytest.fixture(scope="module")
def client(server: VllmServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as connected:
        yield connected


@pytest.fixture(scope="module")
def asked() -> list[Problem]:
    """Math and reading problems by turns, so that prompts of different lengths meet in one batch."""
    pairs = zip(problems("math", "test", 5), problems("reading", "test", 5), strict=True)
    return list(chain.from_iterable(pairs))


def test_concurrent_requests_answer_as_sequential_ones(server: VllmServer, asked: list[Problem]) -> None:
    together, _ = ask(server, SERVED_NAME, asked, concurrency=len(asked))
    alone, _ = ask(server, SERVED_NAME, asked, concurrency=1)
    assert [a.response for a in together] == [a.response for a in alone]
    assert sum(a.correct for a in together) > len(asked) / 2


def test_streaming_gives_the_same_text(client: OpenAI, asked: list[Problem]) -> None:
    request = {"model": SERVED_NAME, "messages": chat(asked[0].prompt), "temperature": 0, "max_tokens": 60}
    whole = client.chat.completions.create(**request).choices[0].message.content  # type: ignore[call-overload]
    chunks = client.chat.completions.create(**request, stream=True)  # type: ignore[call-overload]
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert len(pieces) > 2
    assert "".join(piece or "" for piece in pieces) == whole


def test_a_request_can_turn_caprese_off(server: VllmServer, client: OpenAI, asked: list[Problem]) -> None:
    def answer(choice: str) -> None:
        client.chat.completions.create(
            model=SERVED_NAME, messages=chat(asked[0].prompt), extra_body={"vllm_xargs": {"caprese": choice}}  # type: ignore[arg-type]
        )  # fmt: skip

    before = server.get("/caprese")
    answer("off")
    after = server.get("/caprese")
    assert after.pop("off_tokens") > before.pop("off_tokens") + 10
    assert after == before, "a dense request was counted as a sparse one"
    with pytest.raises(BadRequestError, match="caprese"):
        answer("perhaps")


ENDPOINTS = {
    "chat/completions": {"messages": [{"role": "user", "content": "1 + 1?"}]},
    "completions": {"prompt": "1 + 1 ="},
    "responses": {"input": "1 + 1?"},
    "messages": {"messages": [{"role": "user", "content": "1 + 1?"}]},
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_wrong_switch_is_status_400_everywhere(server: VllmServer, endpoint: str, stream: bool) -> None:
    """And no traceback in the log; beam search, which cannot have the switch, says so."""
    logged = server.log.read_text().count("Traceback")
    body = {"model": SERVED_NAME, "max_tokens": 4, "stream": stream, **ENDPOINTS[endpoint]}
    wrong = [{"vllm_xargs": {"caprese": "on"}}, {"vllm_xargs": {"caprese": 1}}]
    if endpoint.endswith("completions") and not stream:
        wrong.append({"use_beam_search": True, "n": 2, "vllm_xargs": {"caprese": "off"}})
    for change in wrong:
        found = httpx.post(f"{server.url}/v1/{endpoint}", json=body | change, timeout=60, trust_env=False)
        assert found.status_code == 400, found.text
        assert "caprese" in found.text
    right = httpx.post(
        f"{server.url}/v1/{endpoint}", json=body | {"vllm_xargs": {"caprese": "off"}}, timeout=60, trust_env=False
    )
    assert right.status_code == 200, right.text
    assert server.log.read_text().count("Traceback") == logged


def test_a_client_sees_what_its_own_request_selected(server: VllmServer, client: OpenAI, asked: list[Problem]) -> None:
    """By the id in the answer, while it streams and afterwards; each prompt selects its own neurons."""
    seen = []
    for problem in asked[:2]:
        request = {"model": SERVED_NAME, "messages": chat(problem.prompt), "temperature": 0, "max_tokens": 60}
        chunks = client.chat.completions.create(**request, stream=True)  # type: ignore[call-overload]
        answer = next(iter(chunks)).id
        while_streaming = [server.get(f"/caprese/selections/{answer}")]
        list(chunks)
        seen.append(server.get(f"/caprese/selections/{answer}"))
        assert while_streaming == seen[-1:]
        for name in (answer[:-1], f"{answer}0", "chatcmpl", "0"):
            with pytest.raises(CapreseError, match="found 404"):
                server.get(f"/caprese/selections/{name}")
    assert seen[0] != seen[1]
    for found in seen:
        assert [row["layer"] for row in found["layers"]] == sorted(read_config(ADAPTERS["griffin"]).layers)
        for row in found["layers"]:
            assert sum(row["tail"]) / len(row["tail"]) == pytest.approx(0.5, abs=1e-6)
            assert not any(row["core"])


def test_report(server: VllmServer, asked: list[Problem]) -> None:
    ask(server, SERVED_NAME, asked[:2], concurrency=2)
    adapter, report = read_config(ADAPTERS["griffin"]), server.get("/caprese")
    assert report["enabled"] is True
    assert (report["method"], report["density"], report["rank"]) == ("griffin", adapter.density, adapter.rank)
    assert report["layers"] == sorted(adapter.layers)
    assert report["generated_tokens"] > 10
    assert 0 < report["ff_weights_read"] < 1


def test_the_log_proves_that_it_is_on(server: VllmServer) -> None:
    adapter, log = read_config(ADAPTERS["griffin"]), server.log.read_text()
    proof = f"Caprese: {len(adapter.layers)} of {adapter.base_model.num_hidden_layers} FF blocks replaced"
    assert log.count(proof) == 1
    assert f"method griffin, density {adapter.density:g}, rank {adapter.rank}" in log


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_the_playground_shows_both_answers_of_a_real_server(server: VllmServer, asked: list[Problem]) -> None:
    app = Playground(server.url, server.api_key, "secret", [asked[0].prompt]).app
    with serving(lambda: app) as url, browsing() as browser:
        browser.open(f"{url}/secret/")
        browser.wait("document.getElementById('prompt').value")
        browser.click("#run")
        browser.wait("document.querySelector('#verdict').textContent", seconds=60)
        full, sparse = (browser.text(f"#{panel}-panel .text") for panel in ("full", "caprese"))
        assert full.endswith(f"#### {asked[0].answer}")
        assert "####" in sparse
        layers = len(read_config(ADAPTERS["griffin"]).layers)
        assert browser.script("const c = document.querySelector('canvas'); return [c.width, c.height]") == [128, layers]
        assert not browser.console()


def test_a_core_shows_its_misfit_on_metrics(tmp_path: Path, asked: list[Problem]) -> None:
    """Two gauges, refreshed by every scrape, and the share in GET /caprese; a server without a core has neither."""
    selection = {"score": "weighted", "prior": 0.5, "core": 1.0}
    adapter = make_adapter(MODEL, tmp_path / "core.safetensors", "griffin", rank=0, selection=selection)
    flags = (*FLAGS, *CPU, "--caprese-weights", str(adapter))
    with VllmServer(MODEL, *flags, log=tmp_path / "log", env=ENV, console=QUIET) as running:
        names = [f"caprese:prompt_mass_outside_core_{part}" for part in ("sum", "count")]
        assert [scrape(running)[name] for name in names] == [0.0, 0.0]
        ask(running, SERVED_NAME, asked[:3], concurrency=3)
        found, report = scrape(running), running.get("/caprese")
    assert found["caprese:neurons_core_total"] == found["caprese:neurons_kept_total"] > 0, (
        "core 1: nothing but the core"
    )
    assert [found[name] for name in names] == report["prompt_mass"]
    assert found[names[1]] > 30
    assert report["prompt_mass_outside_core"] == found[names[0]] / found[names[1]]
    assert 0.1 < report["prompt_mass_outside_core"] < 0.9


def test_without_a_core_there_is_no_misfit(server: VllmServer) -> None:
    assert not [name for name in scrape(server) if "core_" in name]
    assert server.get("/caprese")["prompt_mass_outside_core"] is None


def test_metrics_are_the_reports(server: VllmServer, asked: list[Problem]) -> None:
    """Each of them, also what a client switches off; kept neurons and needed bytes as the adapter says."""
    ask(server, SERVED_NAME, asked[:3], concurrency=3)
    body = {"model": SERVED_NAME, "prompt": "1", "max_tokens": 5, "vllm_xargs": {"caprese": "off"}, "ignore_eos": True}
    before = scrape(server)
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60, trust_env=False).status_code == 200
    found, report, adapter = scrape(server), server.get("/caprese"), read_config(ADAPTERS["griffin"])
    sparse, off = (f'caprese:generated_tokens_total{{path="{path}"}}' for path in ("sparse", "off"))
    assert found[off] - before[off] == 4, "the first of five tokens comes of the prompt"
    assert found[sparse] == before[sparse] == report["generated_tokens"] > 0
    neurons = found["caprese:neurons_total"]
    assert neurons == found[sparse] * len(adapter.layers) * adapter.base_model.intermediate_size
    assert found["caprese:neurons_kept_total"] == neurons / 2
    depth, size = adapter.base_model.hidden_size, 4
    assert found["caprese:ff_bytes_dense_total"] == 3 * depth * size * neurons
    low_rank = 2 * adapter.rank * depth * size * found[sparse] * len(adapter.layers)
    assert found["caprese:ff_bytes_needed_total"] == 3 * depth * size * neurons / 2 + low_rank
    assert found["caprese:statistics_pages"] > 0
    assert found["caprese:statistics_pages_written_total"] == report["pages_written"]
    (info,) = (name for name in found if name.startswith("caprese:info"))
    for label in ('adapter="griffin.safetensors"', 'method="griffin"', 'density="0.5"', 'layers="0-1"', 'rank="48"'):
        assert label in info


def test_the_dashboard_asks_for_metrics_that_exist(server: VllmServer, asked: list[Problem]) -> None:
    ask(server, SERVED_NAME, asked[:1], concurrency=1)
    scraped = {name.partition("{")[0] for name in scrape(server)}
    wanted = metrics_of(DASHBOARD)
    assert wanted >= {f"caprese:{metric.name}" for metric in METRICS if not metric.core}
    of_a_core = {f"caprese:{metric.name}" for metric in METRICS if metric.core}
    assert wanted - scraped <= of_a_core


def test_a_wrong_adapter_ends_in_one_line(tmp_path: Path) -> None:
    """An adapter of another model: the started process reports it within seconds, and so does VllmServer."""
    adapters = Adapters.load(ADAPTERS["griffin"])
    base = adapters.config.base_model.model_copy(update={"intermediate_size": 4096})
    adapters.config = adapters.config.model_copy(update={"base_model": base})
    bad = tmp_path / "bad.safetensors"
    adapters.save(bad)
    command = [vllm_program(), "serve", str(MODEL), *CPU, "--caprese-weights", str(bad)]
    # Importing vLLM is all that takes time: ten seconds, more where the machine is busy.
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    said = (done.stdout + done.stderr).splitlines()
    assert not any("Traceback" in line for line in said)
    (line,) = (line for line in said if line.startswith("caprese: "))
    assert "expected intermediate_size 4096" in line


def test_the_launcher_reports_an_absent_adapter(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.safetensors")
    server = VllmServer(MODEL, *CPU, "--caprese-weights", absent, log=tmp_path / "log", env=ENV, console=QUIET)
    with pytest.raises(CapreseError, match=r"exit code 1 .*: caprese: adapter weights: .*absent\.safetensors"), server:
        pass
