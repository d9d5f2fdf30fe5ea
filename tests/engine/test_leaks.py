"""Ten thousand requests, ending in every way that requests end, leave nothing behind."""

import ctypes
import gc
import os
import random
from collections import Counter
from collections.abc import Iterator

import pytest
from vllm import LLM, SamplingParams

import caprese_vllm.enable
from tests.support.engine import engine, leaks, scheduler
from tests.support.models import VOCABULARY, make_adapter, make_model

REQUESTS = int(os.environ.get("CAPRESE_REQUESTS", "10000"))
WARM_UP = 2000  # allocators and vLLM's own tables have their size by then
MAX_NUM_SEQS = 64
PAGES = 16
# Plain vLLM's process grew by 2.6 KiB a request in this very load, with Caprese by 1.4 KiB: 2 KiB leaves room for that.
# A slot kept with its statistics (97 neurons, 2 layers, tensors and dictionaries) is more than the rest of it, and
# what Caprese's own tables hold is also counted one by one.
LEAK = 2048 * (REQUESTS - WARM_UP)


@pytest.fixture(scope="module", params=["griffin", "cats"])
def llm(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("leaks")
    model = make_model("llama", folder / "model", num_hidden_layers=2)
    weights = make_adapter(model, folder / "adapter.safetensors", request.param, layers=[0, 1])
    caprese = {"weights": str(weights), "layers": [0, 1], "statistics_page": 32, "statistics_mib": 1024}
    options = {
        "max_num_seqs": MAX_NUM_SEQS,
        "max_model_len": 64,
        "max_num_batched_tokens": 128,
        "num_gpu_blocks_override": 160,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caprese_vllm.enable, "MAX_PAGES", PAGES)
        with engine(model, caprese, **options) as llm:
            yield llm


def random_request(chance: random.Random) -> tuple[list[int], SamplingParams, bool]:
    """Prompt, parameters, and whether its client goes away. Most are tiny; some fill blocks, and pages with them."""
    length = chance.choice([1, 1, 2, 2, 3, 3, 3, 3, 3, 33, 40])
    leaves = chance.random() < 0.1
    params = SamplingParams(
        n=1 if leaves else chance.choice([1] * 9 + [3]),  # vLLM itself keeps the parent of samples that were aborted
        max_tokens=chance.randint(1, 6),
        ignore_eos=chance.random() < 0.5,
        stop=chance.choice([None, None, ["e", "a"]]),
        stop_token_ids=chance.choice([None, None, list(range(0, VOCABULARY, 3))]),
        extra_args=chance.choice([None, None, None, {"caprese": "off"}]),
    )
    return [chance.randrange(4, VOCABULARY) for _ in range(length)], params, leaves


def serve(llm: LLM, chance: random.Random, first: int, last: int) -> Counter[str]:
    """Requests `first` to `last`, never more than twice as many at once as the engine has places."""
    core, live, ended = llm.llm_engine, 0, Counter()
    leaving: list[tuple[int, str]] = []  # step, request
    step = first
    while first < last or core.has_unfinished_requests():
        while first < last and live < 2 * MAX_NUM_SEQS:
            prompt, params, leaves = random_request(chance)
            core.add_request(str(first), {"prompt_token_ids": prompt}, params)
            if leaves:
                leaving.append((step + chance.randint(0, 4), str(first)))
            first += 1
            live += 1
        gone = [name for at, name in leaving if at <= step]
        leaving = [(at, name) for at, name in leaving if at > step]
        core.abort_request(gone)
        ended["aborted or done"] += len(gone)
        for output in core.step():
            for sample in output.outputs:
                if sample.finish_reason is not None:
                    how = type(sample.stop_reason).__name__ if sample.finish_reason == "stop" else ""
                    ended[f"{sample.finish_reason} {how}".strip()] += 1
        live = core.get_num_unfinished_requests()
        step += 1
    core.step()  # the next step tells the workers which requests have finished
    return ended


def resident() -> int:
    """Bytes of this process in memory, without what the allocator keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_requests_leave_nothing(llm: LLM) -> None:
    chance = random.Random(0)
    ended = serve(llm, chance, 0, WARM_UP)
    before = resident()
    ended += serve(llm, chance, WARM_UP, REQUESTS)
    grown = resident() - before
    print(f"\n{REQUESTS} requests: {dict(ended)}, memory grew {grown / 2**20:.1f} MiB")
    assert all(ended[way] > REQUESTS / 100 for way in ("length", "stop int", "stop str", "aborted or done")), ended
    assert not leaks(llm)
    report = llm.collective_rpc("caprese_report")[0]
    assert report["live_requests"] == 0
    assert slots(llm) <= MAX_NUM_SEQS
    assert len(scheduler(llm).pages) == PAGES, "pages must be used, and given away"
    assert grown < LEAK


def slots(llm: LLM) -> int:
    """Slots ever used."""
    state = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model.caprese
    return state.requests.num_slots
