"""The playground in a headless browser, before a stand-in for the model's server."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from caprese_serve.playground import cli
from caprese_serve.playground.app import MAX_BODY, PAGE, Playground
from tests.support.browser import MISSING, Browser, browsing
from tests.support.fake_openai import FakeServer, running, serving

Caprese = Callable[..., int]
Captured = pytest.CaptureFixture[str]
in_browser = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
KEY = "key-of-the-server"
HOSTILE = '<img src=x onerror="document.title=1"> </script><script>document.title=2</script> <b>bold</b>'
BINS = [[1.0, 0.5, 0.0, 0.5], [0.25, 0.75, 0.5, 0.5]]
SELECTION = {
    "method": "griffin",
    "layers": [{"layer": i, "neurons": 16, "core": [0.0] * 4, "tail": tail} for i, tail in enumerate(BINS)],
}


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    """Repeats the prompt, and says where that came from; four words at least."""
    with running(FakeServer(answer=lambda prompt, _: f"You said: {prompt} END", selection=SELECTION, key=KEY)) as fake:
        yield fake


@pytest.fixture
def playground(fake: FakeServer) -> TestClient:
    """The application alone, without a browser."""
    with TestClient(Playground(fake.url, KEY, "secret", ["1 + 1?"]).app) as client:
        yield client


@pytest.fixture
def address(fake: FakeServer) -> Iterator[str]:
    """The page's address, where `caprese playground` serves it."""
    app = Playground(fake.url, KEY, "secret", [HOSTILE, "one two three"]).app
    with serving(lambda: app) as url:
        yield f"{url}/secret/"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser, address: str) -> Iterator[Browser]:
    """The open page, with its first example; at the end nothing may be on its console."""
    chromium.open(address)
    chromium.wait("document.getElementById('prompt').value")
    yield chromium
    assert not chromium.console()


def answers(browser: Browser) -> list[str]:
    return [browser.text(f"#{panel}-panel .text") for panel in ("full", "caprese")]


def wait_until_done(browser: Browser) -> None:
    browser.wait("!document.getElementById('run').disabled && document.querySelector('#status').textContent")


# -- the application ---------------------------------------------------------------------------------------------------


def test_everything_is_below_the_secret_path(playground: TestClient) -> None:
    for path in ("/", "/about", "/chat", "/other/", "/selections/chatcmpl-1", "/secret2/about"):
        assert playground.get(path).status_code == 404
        assert playground.post(path).status_code == 404
    assert playground.get("/secret/").status_code == 200


def test_the_key_stays_in_the_process(playground: TestClient) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 9, "stream": True}
    shown = [playground.get("/secret/"), playground.get("/secret/about"), playground.post("/secret/chat", json=body)]
    assert [each.status_code for each in shown] == [200] * 3
    assert not any(KEY in each.text + str(each.headers) for each in shown)
    assert " hello" in shown[2].text


def test_about(playground: TestClient, fake: FakeServer) -> None:
    about = playground.get("/secret/about").json()
    assert (about["model"], about["url"], about["examples"]) == ("fake", fake.url, ["1 + 1?"])
    assert about["caprese"]["method"] == "griffin"


def test_only_the_pages_own_script_runs(playground: TestClient) -> None:
    policy = playground.get("/secret/").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2
    page = PAGE.read_text()
    assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write|\seval\(| style=| on\w+=", page)


def test_a_large_request_is_refused(playground: TestClient, fake: FakeServer) -> None:
    assert playground.post("/secret/chat", content=b" " * (MAX_BODY + 1)).status_code == 413
    assert playground.post("/secret/chat", content=iter([b"{}"])).status_code == 413, "a length that is not said"
    assert not fake.requests


def test_a_wrong_key_and_an_absent_server(fake: FakeServer) -> None:
    for server, key, message in ((fake.url, "wrong", "--api-key"), ("http://127.0.0.1:9", KEY, "does not answer")):
        with TestClient(Playground(server, key, "s").app) as client:
            found = client.get("/s/about")
            assert found.status_code in (401, 502)
            assert message in found.json()["message"]


# -- the page ----------------------------------------------------------------------------------------------------------


@in_browser
def test_both_answers_side_by_side(browser: Browser, fake: FakeServer) -> None:
    browser.script("document.getElementById('prompt').value = 'three and four'")
    browser.click("#run")
    wait_until_done(browser)
    assert answers(browser) == ["You said: three and four END"] * 2
    assert [len(fake.asked(off)) for off in (True, False)] == [1, 1]
    for request in fake.requests:
        assert (request["max_tokens"], request["temperature"], request["top_p"]) == (512, 0, 1)
        assert "seed" not in request
    facts = browser.script("return [...document.querySelectorAll('[data-fact]')].map((e) => e.textContent)")
    assert [facts[1], facts[5]] == ["6", "6"]
    assert [facts[3], facts[7]] == ["100%", "75.0%"]
    assert browser.text("#verdict").startswith("Both answers are the same. Caprese wrote at ")
    assert "Full model: 6 tokens" in browser.text("#status")
    assert browser.text("#method") == "GRIFFIN, density 0.5, rank 48, 2 sparse layers"
    assert json.loads(browser.text("#full-panel pre"))["vllm_xargs"] == {"caprese": "off"}


@in_browser
def test_settings_are_sent(browser: Browser, fake: FakeServer) -> None:
    values = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    for name, value in values.items():
        browser.script("document.getElementById(arguments[0]).value = arguments[1]", name, str(value))
    browser.click("#in_turn")
    browser.click("#run")
    wait_until_done(browser)
    assert [{name: request[name] for name in values} for request in fake.requests] == [values] * 2
    assert "vllm_xargs" in fake.requests[0], "the full model first"
    browser.script("document.getElementById('top_p').value = 2")
    browser.click("#run")
    assert len(fake.requests) == 2, "a value out of range is not sent"


@in_browser
def test_text_from_outside_is_text(browser: Browser) -> None:
    """The first example is the hostile one, and comes back as the answer."""
    title = browser.script("return document.title")
    browser.click("#run")
    wait_until_done(browser)
    assert answers(browser) == [f"You said: {HOSTILE} END"] * 2
    assert browser.script("return document.title") == title
    assert browser.script("return document.querySelectorAll('img, b, .text script').length") == 0


@in_browser
def test_the_heat_map(browser: Browser) -> None:
    browser.click("#run")
    browser.wait("document.querySelector('canvas')")
    wait_until_done(browser)
    pixels = browser.script(
        "const c = document.querySelector('canvas');"
        "return [c.width, c.height, ...c.getContext('2d').getImageData(0, 0, 4, 2).data]"
    )
    assert pixels[:2] == [4, 2]
    shades = [pixels[2 + 4 * i] + pixels[3 + 4 * i] + pixels[4 + 4 * i] for i in range(8)]
    flat = [share for row in BINS for share in row]
    assert sorted(range(8), key=lambda i: (-shades[i], i)) == sorted(range(8), key=lambda i: (flat[i], i))
    rows = "return [...document.querySelectorAll('#maps tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    assert browser.script(rows) == [["0", "0%", "50.0%"], ["1", "0%", "50.0%"]]
    browser.script("document.querySelector('canvas').focus()")
    browser.press("Right", "Down")
    assert browser.text(".readout") == "layer 1, neurons 4 to 7: 75.0%"


@in_browser
def test_core_and_tail_have_a_map_each(browser: Browser, fake: FakeServer) -> None:
    layers = [{"layer": i, "neurons": 16, "core": [0.5] * 4, "tail": [0.0, 0.25, 0.0, 0.0]} for i in (0, 1)]
    fake.selection = {"method": "griffin", "layers": layers}
    browser.click("#run")
    browser.wait("document.querySelectorAll('canvas').length == 2")
    titles = browser.script("return [...document.querySelectorAll('.map-head > :first-child')].map(e => e.textContent)")
    assert titles == ["Tail: chosen by this prompt", "Core: the same for all requests"]
    wait_until_done(browser)


@in_browser
def test_the_thresholds_of_cats(browser: Browser, fake: FakeServer) -> None:
    fake.served["method"] = "cats"
    fake.selection = {"method": "cats", "layers": [{"layer": 3, "threshold": 0.125}]}
    browser.click("#run")
    wait_until_done(browser)
    assert browser.text("#maps").endswith("30.1250")
    assert browser.text("#neurons-note").startswith("CATS chooses neurons for each token")


@in_browser
def test_stop_ends_both_requests(browser: Browser, fake: FakeServer) -> None:
    fake.answer, fake.delay = lambda prompt, _: "word " * 2000, 0.02
    browser.click("#run")
    browser.wait("document.querySelector('#caprese-panel .text').textContent.length > 20")
    assert fake.streaming == 2
    assert browser.script("return document.querySelector('#full-panel .text').getAttribute('aria-busy')") == "true"
    browser.click("#stop")
    wait_until_done(browser)
    for _ in range(100):
        if not fake.streaming:
            break
        browser.wait("new Promise((done) => setTimeout(() => done(true), 50))")
    assert fake.streaming == 0, "the server goes on generating"


@in_browser
def test_an_error_is_shown(chromium: Browser, fake: FakeServer, address: str) -> None:
    fake.fails = lambda prompt: True
    chromium.open(address)
    chromium.wait("document.getElementById('prompt').value")
    chromium.click("#run")
    wait_until_done(chromium)
    assert chromium.text("#full-panel .wrong") == "out of luck"
    assert all("500" in message for message in chromium.console())


@in_browser
def test_by_keyboard_alone(browser: Browser, fake: FakeServer) -> None:
    """Tab reaches every control in the order of the page; Control and Enter in the text ask."""
    assert browser.script("return document.activeElement.id") == "prompt"
    reached = []
    for _ in range(7):
        browser.press("Tab")
        reached.append(browser.script("return document.activeElement.id"))
    assert reached == ["max_tokens", "temperature", "top_p", "seed", "run", "example", "in_turn"]
    browser.script("document.getElementById('prompt').focus()")
    browser.press("Control+Enter")
    wait_until_done(browser)
    assert len(fake.requests) == 2
    assert browser.script("return document.activeElement.id") in ("run", "prompt")


@in_browser
def test_every_control_has_a_name(browser: Browser) -> None:
    """And what streams is a live region that says when it is busy."""
    unnamed = browser.script(
        "return [...document.querySelectorAll('input, textarea, button, [tabindex], section')].filter((e) => !("
        "e.labels?.length || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || "
        "e.textContent.trim())).map((e) => e.outerHTML)"
    )
    assert unnamed == []
    live = "return document.querySelectorAll('.text[aria-live=polite]').length"
    assert browser.script(live) == 2


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_it_fits_and_can_be_read(chromium: Browser, address: str, width: int, scheme: str) -> None:
    """Nothing is wider than the window, and text has a contrast of 4.5 to 1 (WCAG AA) in both colour schemes."""
    chromium.open(address, width=width, prefers_color_scheme=scheme)
    chromium.wait("document.getElementById('prompt').value")
    chromium.click("#run")
    wait_until_done(chromium)
    assert chromium.script("return document.documentElement.scrollWidth") <= width
    assert chromium.script(CONTRASTS) == []
    wide = chromium.script(
        "return getComputedStyle(document.querySelector('.pair')).gridTemplateColumns.split(' ').length"
    )
    assert wide == (2 if width > 1000 else 1)


# The texts whose contrast with their background is below 4.5; disabled buttons may be.
CONTRASTS = """
const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
const light = (c) => { const [r, g, b] = c.map((v) => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b; };
const ground = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
  if (c.length < 4 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
const low = [];
for (const e of document.querySelectorAll('body *')) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  if (!own || e.disabled || !e.getClientRects().length) continue;
  const [a, b] = [light(rgb(getComputedStyle(e).color).slice(0, 3)), light(ground(e))].sort((x, y) => y - x);
  if ((a + .05) / (b + .05) < 4.5) low.push(e.textContent.trim().slice(0, 40) + ' ' + (a + .05) / (b + .05));
}
return low;
"""


# -- the verb ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `caprese playground` served, in place of serving it until Ctrl-C."""
    found: list[Any] = []

    def run(self: Any, sockets: Any) -> None:
        found.append(self.config.app)

    monkeypatch.setattr("uvicorn.Server.run", run)
    return found


def test_the_verb_prints_a_secret_address(
    caprese: Caprese, capsys: Captured, fake: FakeServer, served: list[Any]
) -> None:
    printed = []
    for _ in range(2):
        words = ("--url", f"{fake.url}/v1/", "--api-key", KEY, "--port", 0, "--no-browser")
        assert caprese("playground", *words) == 0
        printed.append(capsys.readouterr().out.strip())
    secrets = [re.fullmatch(r"http://127\.0\.0\.1:\d+/([\w-]{22})/", line)[1] for line in printed]  # type: ignore[index]
    assert secrets[0] != secrets[1]
    with TestClient(served[1]) as client:
        assert client.get(f"/{secrets[1]}/about").json()["model"] == "fake"
        assert client.get(f"/{secrets[0]}/about").status_code == 404


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model", "--url", "http://127.0.0.1:9"), "expected a model to serve, or --url; found both"),
        (("--url", "http://127.0.0.1:9"), "GET http://127.0.0.1:9/v1/models: expected status 200; found ConnectError"),
    ],
)
def test_what_cannot_work(caprese: Caprese, capsys: Captured, words: tuple[str, ...], message: str) -> None:
    assert caprese("playground", *words, "--port", 0, "--no-browser") == 1
    assert message in capsys.readouterr().err


def test_a_port_in_use(caprese: Caprese, capsys: Captured, fake: FakeServer) -> None:
    taken = httpx.URL(fake.url).port
    assert caprese("playground", "--url", fake.url, "--api-key", KEY, "--port", taken, "--no-browser") == 1
    assert f"--port: expected a free port; found {taken}: Address already in use" in capsys.readouterr().err


def test_a_server_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The demo's model by default; a model of one's own with its adapter, or as the plain baseline."""
    started: list[tuple[Any, ...]] = []

    class Server:
        url, api_key = "http://127.0.0.1:9", "none"

        def __init__(self, model: Any, *flags: str, **options: Any) -> None:
            started.append((model, json.loads(flags[flags.index("--caprese-config") + 1]), "--enforce-eager" in flags))

        def __enter__(self) -> "Server":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(cli, "VllmServer", Server)
    for model, weights in ((None, None), ("m", "w"), ("m", None)):
        with cli._server(model, weights, None, None) as (url, key):
            assert (url, key) == (Server.url, "none")
    shows = {"show_selections": True}
    assert started == [
        (cli.MODEL, shows | {"weights": str(cli.ADAPTERS["griffin"])}, True),
        ("m", shows | {"weights": "w"}, False),
        ("m", shows | {"method": "griffin"}, False),
    ]
