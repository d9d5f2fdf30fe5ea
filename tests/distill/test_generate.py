"""Responses made by vLLM: a real engine in a child process, killed and resumed; and an error for every failure."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import caprese_distill.data.generate as module
from caprese_distill.config import INSTRUCTION
from caprese_distill.data.chat import ChatRenderer
from caprese_distill.data.generate import (
    Generation,
    generate_samples,
    sampling_parameters,
)
from caprese_distill.data.responses import cache_path, model_identity, responses_path, resume
from caprese_distill.data.rows import Row
from caprese_distill.data.samples import encode
from caprese_distill.data.sources import read_source
from caprese_kernels.adapters import Adapters
from caprese_kernels.errors import CapreseError
from tests.support.distill import ModelDir, make_rows, run_distill
from tests.support.models import EOS, make_model, make_tokenizer

ENGINE = {"enforce_eager": True, "max_num_seqs": 4}


def prompts(count: int) -> list[Row]:
    return [Row(line, row["prompt"], "") for line, row in enumerate(make_rows(count), start=1)]


@pytest.fixture
def ask(model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch) -> Callable[..., module.Generated]:
    """generate_samples() with the tiny model, and what its engine needs on a small machine."""
    for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "CHUNK", 2)

    def run(output: Path, rows: list[Row], max_length: int = 150, **settings: Any) -> module.Generated:
        model = str(model_dir("llama"))
        chosen = Generation(max_length, **{"temperature": 0.8, "engine": ENGINE} | settings)
        config = AutoConfig.from_pretrained(model)
        return generate_samples(rows, ChatRenderer(make_tokenizer()), model, config, output, chosen)

    return run


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[str]]]:
    """The child processes that are started."""
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def start(*args: Any, **kwargs: Any) -> subprocess.Popen[str]:
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(module.subprocess, "Popen", start)
    yield started
    assert all(process.poll() is not None for process in started)


def test_a_killed_engine_continues_to_the_same_rows(
    ask: Callable[..., module.Generated], children: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    rows, tokenizer = prompts(24), make_tokenizer()
    whole = ask(tmp_path / "whole.safetensors", rows)
    assert [s.line for s in whole.samples] == list(range(1, 25))
    assert len(children) == 1
    for sample, row in zip(whole.samples, rows, strict=True):
        response = whole.responses[row.line]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row.prompt}], add_generation_prompt=True, return_dict=False
        )
        assert sample.ids.tolist() == prompt + response.ids[:-1].tolist()
        assert sample.prompt_length == len(prompt)
        assert response.cut == (tokenizer.eos_token_id not in response.ids) == (len(prompt) + len(response.ids) == 150)
    cut = sum(r.cut for r in whole.responses.values())
    assert 0 < cut < 24  # both ends were seen
    assert whole.provenance == {
        "sampling": {"temperature": 0.8},
        "seed": 0,
        "responses": 24,
        "cut": cut,
        "tokens": sum(len(r.ids) for r in whole.responses.values()),
    }

    output = tmp_path / "parts.safetensors"
    cache = cache_path(output)

    def kill() -> None:
        while not cache.exists() or cache.read_bytes().count(b"\n") < 6:
            time.sleep(0.002)
        os.kill(children[-1].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(CapreseError, match=r"found exit code -9: .*continues from the \d+ responses made so far"):
        ask(output, rows)
    killer.join()
    there = cache.read_text().count("\n") - 1
    assert 5 <= there < 24
    with cache.open("a") as file:
        file.write('{"row": 24, "ids": [1, 2')
    with pytest.raises(CapreseError, match=rf"{there} responses in .*found those of a run with other sampling, seed;"):
        ask(output, rows, temperature=0.7, seed=1)
    parts = ask(output, rows)
    assert len(children) == 3
    assert parts.responses == whole.responses
    assert [s.ids.tolist() for s in parts.samples] == [s.ids.tolist() for s in whole.samples]
    assert cache.read_text().count("\n") == 25  # none was made twice
    assert ask(output, rows).responses == whole.responses
    assert len(children) == 3  # nor was anything started for nothing

    kept = parts.keep()
    assert kept == responses_path(output) == tmp_path / "parts.responses.jsonl"
    assert not [p.name for p in tmp_path.glob(".parts*")]
    read = read_source(kept).rows
    assert [row.prompt for row in read] == [row.prompt for row in rows]
    assert not any(row.response.endswith(EOS) for row in read)
    for sample, again in zip(parts.samples, encode(ChatRenderer(tokenizer), read, 10_000)[0], strict=True):
        text = tokenizer.decode(again.ids)
        assert text.startswith(tokenizer.decode(sample.ids))  # a cut response is fed to its last token


def test_a_cpu_samples_from_prompts_longer_than_its_batches(
    ask: Callable[..., module.Generated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM would cut them into chunks, after which its CPU runner cannot draw by a seed."""
    shown: list[str] = []
    pace = module._pace
    monkeypatch.setattr(module, "_pace", lambda *words: shown.append(pace(*words)) or shown[-1])
    monkeypatch.setattr(module, "CHUNK", 64)
    rows = [Row(line, " ".join([row["prompt"]] * 14), "") for line, row in enumerate(make_rows(40), start=1)]
    made = ask(tmp_path / "a.safetensors", rows, 400, engine={"enforce_eager": True}, max_new_tokens=40)
    prompt_tokens = sum(sample.prompt_length for sample in made.samples)
    assert prompt_tokens > 4096  # more than a step takes
    assert len(made.samples) == 40
    assert made.provenance["sampling"] == {"temperature": 0.8}
    tokens = made.provenance["tokens"]
    assert shown[0] == "responses (0 tokens)"
    assert re.fullmatch(rf"responses \({tokens:,} tokens, [\d,]+ tok/s\)", shown[-1])


def fake_child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """A child that runs `code`, with the job as `job`; `send` writes a line of standard output."""
    head = "import json, sys; job = json.load(open(sys.argv[1]))\ndef send(**m): print(json.dumps(m), flush=True)\n"
    popen = subprocess.Popen
    monkeypatch.setattr(
        module.subprocess,
        "Popen",
        lambda words, **kwargs: popen([sys.executable, "-c", head + code, words[-1]], **kwargs),
    )


def test_errors_of_the_child(
    ask: Callable[..., module.Generated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "a.safetensors"
    with monkeypatch.context() as patch:
        fake_child(patch, "send(error={'what': 'disk', 'expected': 'a', 'found': 'b', 'fix': 'c'})")
        with pytest.raises(CapreseError, match=r"^disk: expected a; found b; c$"):
            ask(output, prompts(2))
    with monkeypatch.context() as patch:
        fake_child(patch, "send(done=0, tokens=0)\nprint('one\\ntwo', file=sys.stderr); sys.exit(3)")
        with pytest.raises(CapreseError, match=r"exit code 3: one \| two"):
            ask(output, prompts(2))
    with monkeypatch.context() as patch:
        fake_child(
            patch, "print('x.py:1: UserWarning: w', file=sys.stderr)\nraise ValueError('No memory for the cache.')"
        )
        with pytest.raises(
            CapreseError, match=r"exit code 1: ValueError: No memory for the cache\.; see .*generate.log"
        ):
            ask(output, prompts(2))
    with monkeypatch.context() as patch:
        fake_child(patch, "pass")
        with pytest.raises(CapreseError, match="no response to line 1"):
            ask(output, prompts(2))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CapreseError, match=r'--generate: expected vLLM.*pip install "caprese-vllm\[cuda\]"'):
        ask(output, prompts(2))


def test_an_interrupted_command_ends_its_child(
    ask: Callable[..., module.Generated],
    children: list[subprocess.Popen[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_child(monkeypatch, "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)")
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path / "a.safetensors", prompts(2))
    assert [process.poll() for process in children] == [-signal.SIGKILL]


def test_what_the_child_is_asked(
    ask: Callable[..., module.Generated], model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits by row; one response of one token, which feeds nothing."""
    fake_child(
        monkeypatch,
        "print(*({'row': p['row'], 'ids': [7] * p['max_tokens'], 'finish': 'length'} for p in job['prompts'][:-1]),\n"
        "  {'row': job['prompts'][-1]['row'], 'ids': [1], 'finish': 'stop'}, sep='\\n', file=open('f', 'w'))\n"
        "text = open('f').read().replace(\"'\", '\"'); open(job['output'], 'a').write(text)",
    )
    monkeypatch.chdir(tmp_path)
    rows = [Row(1, "one", ""), Row(2, "", ""), Row(3, "two " * 50, ""), Row(4, "three two", ""), Row(5, "one", "")]
    made = ask(tmp_path / "a.safetensors", rows, 40, max_new_tokens=36, temperature=None)
    job = json.loads((tmp_path / ".a.generate.json").read_text())
    tokenizer = make_tokenizer()
    assert tokenizer.decode(job["prompts"][0]["ids"]) == "<|bos|><|user|>one<|assistant|>"
    lengths = {p["row"]: (len(p["ids"]), p["max_tokens"]) for p in job["prompts"]}
    assert list(lengths) == [1, 4, 5]
    assert all(room == min(36, 40 - length) for length, room in lengths.values())
    assert job["engine"] == {"dtype": "float32", "max_model_len": 40} | ENGINE
    assert job["sampling"] == {"temperature": 0.0}
    assert [s.line for s in made.samples] == [1, 4]
    assert [s.num_rows for s in made.samples] == [lengths[1][1] - 1, lengths[4][1] - 1]
    assert made.skipped == {
        "empty prompt": 1,
        "prompt too long for a response within 40 tokens": 1,
        "empty response": 1,
    }


def test_a_date_differs_only_where_prompts_do(tmp_path: Path) -> None:
    cache = tmp_path / ".a.responses.jsonl"
    unpinned = {"prompts": "p", "date": "2026-03-01"}
    assert resume(cache, unpinned, 2, None) == {}
    with cache.open("a") as file:
        file.write('{"row": 1, "ids": [9, 1], "finish": "stop"}\n')
    assert list(resume(cache, {"prompts": "p"}, 2, None)) == [1]  # --date of that day
    for date in ({}, {"date": "2026-03-02"}):
        with pytest.raises(CapreseError, match="with other prompts; give --date 2026-03-01"):
            resume(cache, {"prompts": "q"} | date, 2, None)


def test_nothing_to_answer_starts_nothing(ask: Callable[..., module.Generated], tmp_path: Path) -> None:
    made = ask(tmp_path / "a.safetensors", prompts(3), 4)
    assert not made.samples
    assert made.skipped == {"prompt too long for a response within 4 tokens": 3}
    assert not (tmp_path / ".a.generate.json").exists()


def test_the_model_bounds_the_length(
    ask: Callable[..., module.Generated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_child(monkeypatch, "sys.exit('stop here')")
    with pytest.raises(CapreseError, match="stop here"):
        ask(tmp_path / "a.safetensors", prompts(2), 2048)
    job = json.loads((tmp_path / ".a.generate.json").read_text())
    assert job["engine"]["max_model_len"] == 512
    assert all(len(p["ids"]) + p["max_tokens"] == 512 for p in job["prompts"])


@pytest.mark.parametrize(
    ("own", "temperature", "expected"),
    [
        (None, None, {"temperature": 0.0}),
        ({}, None, {"temperature": 0.0}),
        ({}, 0.6, {"temperature": 0.6}),
        ({"do_sample": True}, None, {"temperature": 1.0}),
        ({"top_p": 0.9}, None, {"temperature": 1.0, "top_p": 0.9}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95}, None, {"temperature": 0.6, "top_p": 0.95}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95}, 1.0, {"temperature": 1.0, "top_p": 0.95}),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1},
            0.0,
            {"temperature": 0.0, "repetition_penalty": 1.1},
        ),
    ],
)
def test_sampling_is_the_models_own(
    tmp_path: Path, own: dict[str, Any] | None, temperature: float | None, expected: dict[str, float]
) -> None:
    if own is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(own))
    assert sampling_parameters(str(tmp_path), temperature) == expected


def test_models_are_distinguished(tmp_path: Path) -> None:
    first, copy, other = (make_model("llama", tmp_path / n, seed=seed) for n, seed in (("a", 0), ("b", 0), ("c", 1)))
    config = AutoConfig.from_pretrained(first)
    assert model_identity(str(first), config) == model_identity(str(copy), config) != model_identity(str(other), config)
    config._commit_hash = "abc"
    assert model_identity("owner/name", config) == "owner/name@abc"


def test_the_child_ends_with_its_parent() -> None:
    child = "import os, threading; from caprese_vllm.generate import _end_with\nprint(os.getpid(), flush=True)\n"
    child += "_end_with(os.getppid())"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        time.sleep(0.2)
        os.kill(pid, 0)  # there
        process.kill()
        assert process.communicate(timeout=20)[0] == ""  # the pipe ends when the child, which holds it too, does


def test_the_command_learns_from_what_was_generated(
    model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kill after the responses loses none of them; they stay beside the adapter, and --data reads them."""
    fake_child(
        monkeypatch,
        "out = open(job['output'], 'a')\n"
        "for p in job['prompts']:\n"
        "  print(json.dumps({'row': p['row'], 'ids': [9, 8, 7] * 6 + [1], 'finish': 'stop'}), file=out)",
    )
    data, output = tmp_path / "problems.jsonl", tmp_path / "a.safetensors"
    data.write_text("".join(json.dumps({"question": row.prompt}) + "\n" for row in prompts(6)))
    settings: dict[str, Any] = {"rank": 4, "stage": "layer-wise", "device": "cpu", "max_length": 100}

    def run(**more: Any) -> None:
        run_distill(str(model_dir("llama")), str(data), output, generate=True, **settings, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Adapters, "save", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run()
    assert not output.exists()
    assert not responses_path(output).exists()
    fake_child(monkeypatch, "sys.exit('started again')")
    capsys.readouterr()
    run(density=0.25)
    assert "6 of 6 responses were made before" in " ".join(capsys.readouterr().err.split())
    training = Adapters.load(output).config.training
    assert training["data"]["generated"] == {
        "sampling": {"temperature": 0.0},
        "seed": 0,
        "responses": 6,
        "cut": 0,
        "tokens": 6 * 19,
    }
    assert training["tokens"] == 6 * 18
    assert "--generate" in training["command"]
    kept = responses_path(output)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([data.name, output.name, kept.name, "README.md"])
    rows = read_source(kept, instruction=INSTRUCTION).rows
    assert [row.prompt for row in rows] == [f"{INSTRUCTION}\n{row.prompt}" for row in prompts(6)]
    run_distill(str(model_dir("llama")), str(kept), tmp_path / "again.safetensors", **settings)


def test_a_full_disk_keeps_the_cache(
    ask: Callable[..., module.Generated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_child(
        monkeypatch,
        "open(job['output'], 'a').write(json.dumps({'row': 1, 'ids': [9, 8, 1], 'finish': 'stop'}) + chr(10))",
    )
    made = ask(tmp_path / "a.safetensors", prompts(1))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(
        CapreseError, match=r"room for them beside the adapter.*found No space left.*a\.responses\.jsonl"
    ):
        made.keep()
    assert cache_path(made.output).exists()
    assert not responses_path(made.output).exists()


@pytest.mark.parametrize("name", ["new", ".a.generate.json"])  # the staged cache, the job
def test_a_full_disk_before_the_first_response(
    ask: Callable[..., module.Generated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write = Path.write_text

    def full(path: Path, *words: Any, **options: Any) -> int:
        if path.name == name:
            raise OSError(28, "No space left on device")
        return write(path, *words, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CapreseError, match=r"responses, .*expected room for them beside the output; found No space"):
        ask(tmp_path / "a.safetensors", prompts(1))
