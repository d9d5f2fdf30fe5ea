"""Slot tables: their size and place never change, and more requests than slots share them."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from caprese_vllm.requests import Scheduled
from caprese_vllm.state import State
from tests.support.engine import engine, greedy
from tests.support.equality import check, new_case
from tests.support.models import random_prompts

NEW_TOKENS = 24


@pytest.mark.parametrize(("method", "reselect"), [("griffin", None), ("cats", None), ("griffin", 5), ("cats", 5)])
def test_more_requests_with_selections_than_slots(
    model_dir: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    reselect: int | None,
) -> None:
    """The least urgent request is preempted, more urgent ones take both places and slots, then it goes on."""
    case = new_case(model_dir, tmp_path, "llama", method, True, reselect=reselect)
    prompts = random_prompts((20, 21, 18, 40), seed=41)
    parked, restored, sizes = [], [], []
    begin = State.begin

    def spy(self: State, scheduled: Iterable[Scheduled]) -> None:
        begin(self, scheduled)
        assert self.step is not None
        parked.extend(self.step.parked)
        restored.extend(self.step.restored)
        sizes.append(len(self.parked))

    monkeypatch.setattr(State, "begin", spy)
    options = {"max_num_seqs": 2, "num_gpu_blocks_override": 4, "max_model_len": 96}
    with engine(case.model_dir, case.caprese, scheduling_policy="priority", **options) as llm:
        core = llm.llm_engine.engine_core.engine_core
        state = core.model_executor.driver_worker.worker.model_runner.model.caprese
        places = (state.table.data_ptr(), *(block.selections.data_ptr() for block in state.blocks))
        tokens: dict[int, list[int]] = {}
        step = 0
        while step < 2 or llm.llm_engine.has_unfinished_requests():
            for i in {0: [0, 1], 6: [2], 8: [3]}.get(step, []):
                params = greedy(NEW_TOKENS)
                llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompts[i]}, params, priority=-i)
            for output in llm.llm_engine.step():
                tokens[int(output.request_id)] = list(output.outputs[0].token_ids)
            step += 1
        assert places == (state.table.data_ptr(), *(block.selections.data_ptr() for block in state.blocks))
        assert state.table.shape[:2] == (len(state.blocks), 2)
        assert state.parked == {}
    check([tokens[i] for i in range(len(prompts))], case.expected(prompts, NEW_TOKENS), f"{method}, parked {parked}")
    assert max(sizes) > 0
    assert len(parked) == len(restored) > 0


def test_the_tables_are_part_of_the_model_and_their_size_is_logged(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are made while the model is loaded, so that vLLM's memory profile counts them, once for max_num_seqs."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    case = new_case(model_dir, tmp_path, "llama", "griffin", True)
    lines: list[str] = []
    from caprese_vllm import worker  # vLLM imports it as it starts

    # Not by a handler, nor by level: an earlier engine or test of the process may have configured logging anew.
    monkeypatch.setattr(worker.logger, "info", lambda message, *values: lines.append(message % values))
    loaded = []
    load_model = BaseModelLoader.load_model

    def spy(*args: object, **options: object) -> object:
        model = load_model(*args, **options)
        loaded.append(model.caprese.table)
        return model

    monkeypatch.setattr(BaseModelLoader, "load_model", spy)
    with engine(case.model_dir, case.caprese, max_num_seqs=256) as llm:
        core = llm.llm_engine.engine_core.engine_core
        state = core.model_executor.driver_worker.worker.model_runner.model.caprese
        assert state.table is loaded[0]
        neurons = state.blocks[0].num_neurons
        assert state.table.nbytes == 2 * 256 * neurons
    (line,) = (line for line in lines if "FF blocks replaced" in line)
    assert f"slot tables of 256 requests {2 * 256 * neurons / 2**20:.1f} MiB" in line
