"""Collecting responses from a stand-in server: stored at once, requested once, proven; and the verbs' rows."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from caprese_bench.evaluation.accuracy import accuracy
from caprese_bench.evaluation.counters import CounterCheck
from caprese_bench.evaluation.coverage import activated, coverage
from caprese_bench.evaluation.length import length
from caprese_bench.evaluation.store import Store
from caprese_bench.evaluation.variants import FULL, RemoteServer, ServedVariant, load_served_model
from caprese_bench.paper.counts import count
from caprese_bench.paper.families import config
from caprese_bench.results import schemas
from caprese_kernels.config import Method
from caprese_kernels.errors import CapreseError
from caprese_serve.demo import ADAPTERS, MODEL
from caprese_serve.demo.problems import problems
from caprese_serve.demo.results import Served
from tests.support.fake_openai import FakeServer, running
from tests.support.models import make_adapter

MATH = {each.prompt: each for each in problems("math", "test", 50)}
CAPRESE = "import sys; sys.argv[0] = 'caprese'; from caprese_serve.cli import main; main()"


def right(prompt: str, sample: int) -> str:
    return MATH[prompt].response


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with running(FakeServer(right)) as server:
        yield server


def ask(fake: FakeServer, out: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """The rows of `caprese bench accuracy`, by variant."""
    accuracy(**({"tasks": "demo-math", "url": fake.url, "limit": 20, "out": out, "concurrency": 4} | options))
    assert schemas.check(out / "accuracy.json") > 0
    return {row["variant"]: row for row in json.loads((out / "accuracy.json").read_text())["rows"]}


def lines(out: Path, variant: str, task: str = "demo-math") -> list[dict[str, Any]]:
    (path,) = out.glob(f"accuracy/{variant}-*/{task}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_full_and_the_served_method(fake: FakeServer, tmp_path: Path) -> None:
    hard = list(MATH)[:5]
    fake.answer = lambda prompt, sample: "no idea" if prompt in hard and len(fake.requests) > 20 else right(prompt, 0)
    rows = ask(fake, tmp_path, concurrency=1)  # Full is asked first
    full, caprese = rows["Full"], rows["Caprese (GRIFFIN)"]
    assert (full["score"], caprese["score"], caprese["difference"]) == (1.0, 0.75, -0.25)
    assert (caprese["won"], caprese["lost"], caprese["mcnemar_p"]) == (0, 5, 2 * 0.5**5)
    assert caprese["difference_low"] < -0.25 < caprese["difference_high"] < 0
    assert "difference" not in full
    asked = {off: [each["prompt"] for each in fake.asked(off)] for off in (True, False)}
    assert asked[True] == asked[False] == list(MATH)[:20]
    assert all((r["temperature"], r["max_tokens"], r["model"]) == (0, 160, "fake") for r in fake.requests)
    assert not any("seed" in request or "n" in request for request in fake.requests), "greedy answers need none"
    assert full["tokens"] == sum(len(right(prompt, 0).split()) for prompt in asked[True]) / 20
    assert (full["sparse_tokens"], full["ff_weights_read"]) == (0, 1.0)
    assert (caprese["sparse_tokens"], caprese["ff_weights_read"]) == (20 * (caprese["tokens"] - 1), 0.75)


def test_what_is_stored(fake: FakeServer, tmp_path: Path) -> None:
    ask(fake, tmp_path, limit=3, weights=[str(ADAPTERS["griffin"])])
    first = lines(tmp_path, "caprese-griffin")[0]
    prompt = list(MATH)[int(first["id"])]
    assert first["texts"] == [right(prompt, 0)]
    assert (first["finish"], first["tokens"]) == (["stop"], len(right(prompt, 0).split()))
    identity = first["identity"]
    assert identity["model"] == "tests/fake"
    assert identity["options"] == {"temperature": 0, "top_p": 1, "max_tokens": 160}
    keys = {"method", "density", "layers", "rank", "score", "prior", "core", "adapter"}
    assert keys == set(identity["caprese"])
    assert len(identity["caprese"]["adapter"]) == len(identity["prompt"]["sha256"]) == 64
    assert lines(tmp_path, "full")[0]["identity"]["caprese"] == "off"


def test_resume_asks_what_is_missing(fake: FakeServer, tmp_path: Path) -> None:
    whole = ask(fake, tmp_path, concurrency=1)
    (path,) = tmp_path.glob("accuracy/caprese-griffin-*/demo-math.jsonl")
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[:12]) + kept[12][:40])  # as a kill may leave it
    fake.requests.clear()
    fake.counted = 7  # another server
    assert ask(fake, tmp_path, resume=True, concurrency=1) == whole
    assert (len(fake.asked(True)), len(fake.asked(False))) == (0, 8)
    fake.requests.clear()
    ask(fake, tmp_path, resume=True)
    length(tasks="demo-math", url=fake.url, limit=20, out=tmp_path)
    assert not fake.requests, "everything is stored, for accuracy and length"
    ask(fake, tmp_path, resume=True, max_tokens=99)
    assert len(fake.requests) == 40, "another sampling is another identity"
    fake.requests.clear()
    ask(fake, tmp_path)
    assert len(fake.requests) == 40, "without --resume everything is requested again"
    assert path.with_suffix(".jsonl.old").exists()


@pytest.mark.parametrize(
    ("signum", "code", "message"),
    [(signal.SIGKILL, -9, ""), (signal.SIGINT, 130, "the same command with --resume continues")],
)
def test_a_stopped_run_goes_on(
    fake: FakeServer, tmp_path: Path, signum: signal.Signals, code: int, message: str
) -> None:
    fake.delay = 0.2
    command = [sys.executable, "-c", CAPRESE, "bench", "accuracy", "--tasks", "demo-math", "--url", fake.url]
    command += ["--limit", "20", "--concurrency", "2", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        deadline = time.monotonic() + 60
        while len(fake.requests) < 8:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        run.send_signal(signum)
        printed, _ = run.communicate(timeout=30)
    assert run.returncode == code
    assert message in " ".join(printed.split())
    stored = len(lines(tmp_path, "full"))
    assert (f"{stored} of 20 responses are in {tmp_path}" in printed) is (signum == signal.SIGINT)
    assert 4 <= stored < 20
    fake.delay = 0.0
    fake.requests.clear()
    rows = ask(fake, tmp_path, resume=True)
    assert len(fake.asked(True)) == 20 - stored
    assert rows["Full"]["score"] == rows["Caprese (GRIFFIN)"]["score"] == 1.0


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (
            {"counts": lambda tokens, off: 0},
            r"variant caprese-griffin: expected \d+ tokens generated by sparse .* found 0",
        ),
        ({"counts": lambda tokens, off: 0 if off else tokens - 1}, "variant caprese-griffin: expected .* by sparse"),
        ({"counts": lambda tokens, off: tokens}, r"variant full: expected no token .* found [1-9]\d*;"),
    ],
)
def test_a_variant_that_ran_another_path_has_no_row(
    fake: FakeServer, tmp_path: Path, server: dict[str, Any], message: str
) -> None:
    for name, value in server.items():
        setattr(fake, name, value)
    with pytest.raises(CapreseError, match=message):
        ask(fake, tmp_path)
    result = json.loads((tmp_path / "accuracy.json").read_text())
    assert result["partial"]
    wrong = "Full" if "variant full" in message else "Caprese (GRIFFIN)"
    assert wrong not in [row["variant"] for row in result["rows"]]
    stored = [line for path in tmp_path.glob(f"accuracy/{message.split()[1][:-1]}-*/*.jsonl") for line in path.open()]
    assert not stored, "it is unknown which response does not fit, so none is kept"


def test_another_configuration_than_was_asked_for(fake: FakeServer, tmp_path: Path) -> None:
    model = load_served_model(None, [str(ADAPTERS["griffin"])], RemoteServer(fake.url), "", None)
    fake.served["rank"] = 0
    now = Served.model_validate(fake.served | {"generated_tokens": 0, "ff_weights_read": None})
    with pytest.raises(CapreseError, match=r"variant caprese-griffin: expected .*, rank 48, .*; found .*, rank 0, "):
        CounterCheck(model.chosen[1], now)


def test_a_failing_request_is_reported_and_the_others_are_kept(fake: FakeServer, tmp_path: Path) -> None:
    fake.fails = lambda prompt: prompt == list(MATH)[9]
    with pytest.raises(
        CapreseError, match=r"Full, word problems, problem 9: expected a response; .* out of luck.*--resume"
    ):
        ask(fake, tmp_path, concurrency=1)
    assert len(lines(tmp_path, "full")) == 9
    fake.fails = lambda prompt: False
    fake.requests.clear()
    assert ask(fake, tmp_path, resume=True)["Full"]["score"] == 1.0
    assert len(fake.asked(True)) == 11


def test_runs_have_their_own_seeds_and_a_deviation(fake: FakeServer, tmp_path: Path) -> None:
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1), "id": str(n)} for n in range(4)]
    data = tmp_path / "amc.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def answer(prompt: str, sample: int) -> str:
        n, seed = int(prompt.rpartition("\n\n")[2].split()[0]), fake.requests[-1]["seed"]
        return f"\\boxed{{{n + 1 if n < seed else 0}}}"  # run r answers r of four problems

    fake.answer = answer
    accuracy(tasks="amc23", url=fake.url, data=[f"amc23={data}"], out=tmp_path, concurrency=1)
    assert [request["seed"] for request in fake.asked(True)] == [run for run in range(4) for _ in range(4)]
    assert {(r["temperature"], r["top_p"], r["max_tokens"], r["n"]) for r in fake.requests} == {(0.6, 0.95, 32768, 1)}
    full, caprese = json.loads((tmp_path / "accuracy.json").read_text())["rows"]
    assert (full["runs"], full["problems"], full["score"]) == (4, 4, pytest.approx(6 / 16))
    assert full["run_std"] == pytest.approx((0.25**2 * (2.25 + 0.25 + 0.25 + 2.25) / 3) ** 0.5)
    assert caprese["difference"] == caprese["difference_low"] == 0.0
    assert "mcnemar_p" not in caprese, "several runs are no single right or wrong"


def test_a_question_with_two_gold_answers_is_asked_once(fake: FakeServer, tmp_path: Path) -> None:
    def blob(text: str) -> dict[str, Any]:
        return {"unanswerable": False, "yes_no": None, "free_form_answer": text, "extractive_spans": []}

    asked = {"question": ["Which?"], "answers": [{"answer": [blob("red"), blob("blue")]}]}
    data = tmp_path / "qasper.jsonl"
    data.write_text(json.dumps({"title": "T", "abstract": "A", "qas": asked}) + "\n")
    fake.answer = lambda prompt, sample: "red"
    row = ask(fake, tmp_path, tasks="qasper", data=[f"qasper={data}"], limit=None)["Full"]
    assert (row["problems"], row["score"], row["metric"]) == (2, 0.5, "f1_abstractive")
    ((request,), (other,)) = fake.asked(True), fake.asked(False)
    assert (request["prompt"], request["stop"]) == ("TITLE: T\nABSTRACT: A\n\nQ: Which?\n\nA:", ["\n"])
    assert "messages" not in request, "bare text, without a chat template"
    assert other["prompt"] == request["prompt"]


def test_coverage(fake: FakeServer, tmp_path: Path) -> None:
    """In every pool the first problem has one right sample of four, the second two, the third none."""
    good = dict(zip(list(MATH)[:3], (1, 2, 0), strict=True))
    fake.answer = lambda prompt, sample: right(prompt, 0) if sample < good[prompt] else "no"
    coverage(url=fake.url, model=str(MODEL), limit=3, samples=4, pools=2, seed=7, out=tmp_path)
    assert schemas.check(tmp_path / "coverage.json") == 8
    rows = {(r["variant"], r["k"]): r for r in json.loads((tmp_path / "coverage.json").read_text())["rows"]}
    expected = [(1 / 4 + 2 / 4) / 3, (1 / 2 + 5 / 6) / 3, (3 / 4 + 1) / 3, 2 / 3]  # 1 - C(4 - c, k) / C(4, k)
    for k, value in enumerate(expected, start=1):
        assert rows["Full", k]["coverage"] == pytest.approx(value)
        assert rows["Full", k]["coverage_std"] == 0.0
        assert (rows["Full", k]["compute"], rows["Full", k]["pools"]) == (k, 2)
    assert sorted({request["seed"] for request in fake.requests}) == [7, 11], "samples of pools have other seeds"
    assert {(r["n"], r["temperature"], r["top_p"]) for r in fake.requests} == {(4, 0.6, 0.95)}
    # Half of two of four FF blocks of 3 x 512 x 128, less L and R of 128 x 48, of 1.16 million parameters.
    share = 1 - 2 * (3 * 512 * 128 / 2 - 2 * 128 * 48) / json.loads((MODEL / "training.json").read_text())["parameters"]
    assert rows["Caprese (GRIFFIN)", 4]["compute"] == pytest.approx(4 * share)


def test_activated_is_the_papers() -> None:
    """Section 4.2: GRIFFIN on Llama 3.2 3B spares 15.8%."""
    counted = count("Llama 3.2 3B", config("Llama 3", "Llama 3.2 3B"))
    variant = ServedVariant("caprese-griffin", "", Method("griffin", 0.5, tuple(range(14)), 256))
    assert activated(counted, variant) == pytest.approx(1 - 0.158, abs=0.0005)
    assert activated(counted, FULL) == 1.0


def test_length(fake: FakeServer, tmp_path: Path) -> None:
    fake.answer = lambda prompt, sample: right(prompt, 0) + (" indeed" if fake.requests[-1].get("vllm_xargs") else "")
    length(tasks="demo-math", url=fake.url, limit=20, out=tmp_path, concurrency=1)
    assert schemas.check(tmp_path / "length.json") == 8
    rows = {(r["variant"], r["difficulty"]): r for r in json.loads((tmp_path / "length.json").read_text())["rows"]}
    counts = [len(MATH[prompt].response.split()) for prompt in list(MATH)[:20]]
    full, caprese = rows["Full", "all"], rows["Caprese (GRIFFIN)", "all"]
    assert (full["tokens"], caprese["tokens"]) == (sum(counts) / 20 + 1, sum(counts) / 20)
    assert caprese["ratio"] == pytest.approx(caprese["tokens"] / full["tokens"])
    steps = [rows["Full", f"steps {n}"] for n in (1, 2, 3)]
    assert sum(row["problems"] for row in steps) == 20
    assert steps[0]["tokens"] < steps[1]["tokens"] < steps[2]["tokens"]
    assert sum(row["problems"] * row["tokens"] for row in steps) == pytest.approx(20 * full["tokens"])


def test_a_damaged_store_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "1"}\n')
    with pytest.raises(CapreseError, match=r"a\.jsonl, line 1: expected a stored response; found Field required"):
        Store(path, keep=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": "full,griffin"}, "--variants: expected some of full, caprese-griffin; found 'griffin'"),
        ({"serve_args": "--seed 1"}, "--url: expected no settings for a running server; found --serve-args"),
        ({"configs": ['a={"method": "griffin"}']}, "no settings for a running server; found --config"),
        ({"data": ["demo-math"]}, "--data: expected TASK=FILE, with one of demo-math"),
        ({"data": ["gsm8k=x"]}, "--data: expected TASK=FILE"),
        ({"url": "http://127.0.0.1:9"}, "GET http://127.0.0.1:9/caprese: expected status 200; found ConnectError"),
    ],
)
def test_mistakes(fake: FakeServer, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CapreseError) as error:
        ask(fake, tmp_path, **options)
    assert message in str(error.value)


def test_lm_eval_is_not_sampled(tmp_path: Path) -> None:
    with pytest.raises(CapreseError, match=r"--tasks: expected tasks with a grader of their own, .* found gsm8k"):
        coverage(tasks="gsm8k", variants="full", out=tmp_path)


def test_variants_and_servers() -> None:
    model = load_served_model(None, [], None, "--seed 3", None)
    assert [each.id for each in model.chosen] == ["full", "griffin", "caprese-griffin", "cats", "caprese-cats"]
    assert [(host.id, [each.id for each in asked]) for host, asked in model.servers()] == [
        ("griffin", ["full", "griffin"]), ("caprese-griffin", ["caprese-griffin"]), ("cats", ["cats"]),
        ("caprese-cats", ["caprese-cats"]),
    ]  # fmt: skip
    assert model.flags[-2:] == ("--seed", "3")
    plain, caprese = model.chosen[1], model.chosen[2]
    assert json.loads(plain.flags()[1]) == {"method": "griffin", "density": 0.5, "layers": [0, 1]}
    assert caprese.flags() == ("--caprese-weights", str(ADAPTERS["griffin"]))
    assert (plain.published, caprese.published) == ("griffin", "end-to-end caprese-griffin")
    only = load_served_model(None, [], None, "", "full")
    ((host, asked),) = only.servers()
    assert (host.id, [each.id for each in asked]) == ("caprese-cats", ["full"])
    identities = [json.dumps(model.identity(each)) for each in model.chosen]
    assert len(set(identities)) == 5
    twice = load_served_model(None, [str(ADAPTERS["cats"])] * 2, None, "", None)
    assert [each.id for each in twice.chosen] == ["full", "cats", "caprese-cats-1", "caprese-cats-2"]


def test_variants_by_configuration(tmp_path: Path) -> None:
    """Two calibrated files of one method are named for their files; --config adds more, with keys of its own."""
    selection = {"score": "weighted", "prior": 0.5, "core": 1.0}
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    files = [make_adapter(MODEL, path, "griffin", rank=0, selection=selection) for path in paths]
    model = load_served_model(None, list(map(str, files)), None, "", None)
    assert [each.id for each in model.chosen] == ["full", "griffin", "caprese-griffin-a", "caprese-griffin-b"]
    assert {each.published for each in model.chosen} == {"full", "griffin", None}
    tail = json.dumps({"weights": str(files[0]), "core": 0.8})
    configs = ['plain={"method": "griffin", "score": "weighted"}', f"tail={tail}"]
    model = load_served_model(None, [], None, "", None, configs)
    assert [each.id for each in model.chosen][-2:] == ["plain", "tail"]
    plain, tailed = model.chosen[-2:]
    assert plain.method == Method("griffin", 0.5, (0, 1), 0, "weighted")
    assert json.loads(plain.flags()[1])["score"] == "weighted"
    assert tailed.method == Method("griffin", 0.5, (0, 1), 0, "weighted", 0.5, 0.8)
    assert tailed.flags() == ("--caprese-weights", str(files[0]), "--caprese-config", '{"core": 0.8}')
    assert model.identity(tailed)["caprese"]["settings"] == {"core": 0.8}
    own = load_served_model(str(MODEL), [], None, "", None, configs)
    assert [each.id for each in own.chosen] == ["full", "plain", "tail"]
    assert len({json.dumps(model.identity(each)) for each in model.chosen}) == len(model.chosen)
    for wrong, message in (
        ("tail", r"--config: expected NAME=JSON, .*; found 'tail'"),
        ("a b={}", "--config: expected NAME=JSON"),
        ("tail={", "--config tail: expected a JSON object"),
        ('tail={"cores": 1}', "cores"),
        ('full={"method": "griffin"}', "--config: expected a new name; found 'full'"),
    ):
        with pytest.raises(CapreseError, match=message):
            load_served_model(str(MODEL), [], None, "", None, [wrong])
