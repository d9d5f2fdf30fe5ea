"""RequestTable under random schedules: every token takes the path that its index in its request decides."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caprese_vllm.requests import RequestTable, Scheduled, Step

CPU = torch.device("cpu")


def begin(table: RequestTable, *scheduled: tuple[str, int, int, int]) -> Step:
    return table.begin(Scheduled(*one) for one in scheduled)


def test_prompt_rows_are_dense_and_generated_rows_sparse() -> None:
    table = RequestTable(CPU, 8)
    step = begin(table, ("a", 3, 0, 3), ("b", 5, 0, 2))
    assert step.dense_rows.tolist() == [0, 1, 2, 3, 4]
    assert [(c.first, c.last) for c in step.chunks] == [(True, True), (True, False)]
    step = begin(table, ("a", 3, 3, 1), ("b", 5, 2, 3))
    assert step.sparse_rows.tolist() == [0]
    assert step.dense_rows.tolist() == [1, 2, 3]
    chunk = step.chunks[0]
    assert (chunk.begin, chunk.end, chunk.first, chunk.last) == (0, 3, False, True)


def test_a_request_with_caprese_off_takes_no_part() -> None:
    """Its prompt runs as prompts do, its generated tokens are a group of their own, whoever else runs."""
    table = RequestTable(CPU, 8)
    step = table.begin([Scheduled("off", 3, 0, 5, dense=True), Scheduled("on", 2, 0, 2)])
    assert step.dense_rows.tolist() == [0, 1, 2, 5, 6]
    assert step.off_rows.tolist() == [3, 4]
    assert [(c.begin, c.end) for c in step.chunks] == [(3, 5)], "only the other's tokens are observed"
    assert len(table) == 1


def test_a_preempted_request_keeps_its_selection_and_recomputes_both_kinds_in_one_chunk() -> None:
    table = RequestTable(CPU, 8)
    begin(table, ("a", 4, 0, 4))
    slot = begin(table, ("a", 4, 4, 1)).sparse_slots.tolist()
    step = begin(table, ("a", 4, 0, 6))  # preempted, then prompt and two generated tokens again
    assert step.chunks == []
    assert step.dense_rows.tolist() == [0, 1, 2, 3]
    assert step.sparse_rows.tolist() == [4, 5]
    assert step.sparse_slots.tolist() == slot * 2


def test_a_request_preempted_in_mid_prompt_begins_its_statistic_again() -> None:
    table = RequestTable(CPU, 8)
    begin(table, ("a", 10, 0, 4))
    (chunk,) = begin(table, ("a", 10, 0, 7)).chunks
    assert chunk.first
    (chunk,) = begin(table, ("a", 10, 7, 3)).chunks
    assert not chunk.first
    assert chunk.last


def test_a_round_counts_what_ran_sparse_once() -> None:
    """Cut, then preempted, then computed from the start: only what the statistic lacks is a chunk."""
    table = RequestTable(CPU, 8)
    begin(table, ("a", 3, 0, 3))
    slot = begin(table, ("a", 3, 3, 1)).sparse_slots.item()
    begin(table, ("a", 3, 4, 1))
    table.begin_round("a", 6)
    step = begin(table, ("b", 1, 0, 1), ("a", 3, 3, 2))
    assert step.dense_rows.tolist() == [0, 1, 2]
    chunk = step.chunks[1]
    assert (chunk.begin, chunk.end, chunk.slot, chunk.length) == (1, 3, slot, 6)
    assert (chunk.round, chunk.first, chunk.last) == (True, False, False)
    step = begin(table, ("a", 3, 0, 4))
    assert (step.chunks, step.dense_rows.tolist()) == ([], [0, 1, 2, 3])
    (chunk,) = begin(table, ("a", 3, 4, 2)).chunks
    assert (chunk.begin, chunk.end, chunk.slot, chunk.last) == (1, 2, slot, True)
    assert begin(table, ("a", 3, 6, 1)).decode
    assert table.dense_length("a", 3) == 6
    table.begin_round("a", 8)
    with pytest.raises(RuntimeError, match="tokens 6 to 7 were skipped"):
        begin(table, ("a", 3, 7, 1))


def test_an_identifier_used_again_is_another_request() -> None:
    table = RequestTable(CPU, 8)
    begin(table, ("a", 2, 0, 2))
    assert table.finish("a") is not None
    (chunk,) = begin(table, ("a", 3, 0, 3)).chunks
    assert chunk.first
    assert chunk.last
    assert table.finish("never seen") is None


@pytest.mark.parametrize("wrong", [("a", 8, 4, 2), ("a", 8, 9, 1)])
def test_prompt_tokens_that_were_skipped_are_an_error(wrong: tuple[str, int, int, int]) -> None:
    # Tokens from a prefix cache would leave the statistic incomplete: never silently.
    with pytest.raises(RuntimeError, match="request a"):
        begin(RequestTable(CPU, 8), wrong)


def test_a_parked_selection_comes_back_when_its_request_does() -> None:
    """Two slots, three requests with selections: the one that is not in the batch gives its slot up."""
    table = RequestTable(CPU, 2)
    begin(table, ("a", 2, 0, 2), ("b", 2, 0, 2))
    step = begin(table, ("b", 2, 2, 1), ("c", 2, 0, 2))  # a was preempted
    assert [slot for _, slot in step.parked] == [step.chunks[0].slot]
    assert step.restored == []
    parked = step.parked[0][0]
    step = begin(table, ("c", 2, 2, 1), ("a", 2, 0, 1))  # a's prompt again: that needs no selection
    assert step.parked == step.restored == []
    step = begin(table, ("c", 2, 3, 1), ("a", 2, 1, 2))
    assert len(step.parked) == 1  # b's
    assert step.restored == [(parked, step.sparse_slots[1].item())]
    table.finish("b")  # while parked
    assert len(table) == 2


def test_a_batch_of_more_requests_than_slots_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="more than 2 requests"):
        begin(RequestTable(CPU, 2), ("a", 1, 0, 1), ("b", 1, 0, 1), ("c", 1, 0, 1))


@dataclass
class Simulated:
    prompt_len: int
    computed: int = 0
    length: int = 0  # tokens that exist
    exact: int = 0  # tokens that run dense: the prompt, and those of rounds
    seen: list[int] = field(default_factory=list)  # prompt indices in the statistic, in order


@dataclass
class Memory:
    """Which slot holds whose selection; moved as State.begin and SparseFF move them."""

    table: dict[int, str] = field(default_factory=dict)
    parked: dict[int, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)  # of keys

    def move(self, step: Step) -> None:
        for key, slot in step.parked:
            self.parked[key] = self.table.pop(slot)
        for key, slot in step.restored:
            self.table[slot] = self.parked.pop(key)


def check(
    step: Step, batch: Sequence[tuple[str, int]], live: dict[str, Simulated], memory: Memory, num_slots: int
) -> None:
    slot_of = dict(zip(step.sparse_rows.tolist(), step.sparse_slots.tolist(), strict=True))
    dense = step.dense_rows.tolist()
    assert not len(step.off_rows)
    memory.move(step)
    owner = {}  # entry of dense_rows -> (request, index in it)
    row = 0
    for name, count in batch:
        request = live[name]
        for index in range(request.computed, request.computed + count):
            if index < request.exact:
                owner[dense.index(row)] = (name, index)
                assert row not in slot_of
            else:
                assert row not in dense
                assert memory.table[slot_of[row]] == name, "a row reads another request's selection"
            row += 1
    assert step.num_rows == row == len(dense) + len(slot_of)
    assert step.decode == (not dense)
    for chunk in step.chunks:
        names = {owner[entry][0] for entry in range(chunk.begin, chunk.end)}
        assert len(names) == 1
        name = names.pop()
        request = live[name]
        assert memory.names.setdefault(chunk.key, name) == name, "a key is of one request for ever"
        request.seen = [] if chunk.first else request.seen
        request.seen += [owner[entry][1] for entry in range(chunk.begin, chunk.end)]
        assert request.seen == list(range(len(request.seen))), "a token was left out, or counted twice"
        assert chunk.last == (len(request.seen) == request.exact)
        assert chunk.round == (chunk.length > request.prompt_len)
        assert (chunk.slot >= 0) == (chunk.last or chunk.round)
        if chunk.round:
            assert memory.table[chunk.slot] == name, "a round goes on from another request's statistic"
        elif chunk.last:
            assert memory.table.get(chunk.slot) not in live, "a selection of a live request is overwritten"
            memory.table[chunk.slot] = name
    assert all(0 <= slot < num_slots for slot in memory.table)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_schedules(data: st.DataObject) -> None:
    """Storms of preemptions and rounds, with up to fifty live requests on one to four slots."""
    num_slots = data.draw(st.integers(1, 4))
    table, live, memory, made = RequestTable(CPU, num_slots), {}, Memory(), 0
    for _ in range(data.draw(st.integers(1, 25))):
        for _ in range(data.draw(st.integers(0, 2))):
            live[f"r{made}"] = Simulated(
                prompt_len := data.draw(st.integers(1, 12)), length=prompt_len, exact=prompt_len
            )
            made += 1
        for name in list(live):
            fate = data.draw(st.sampled_from(["run"] * 8 + ["abort", "preempt", "round", "round"]))
            if fate == "abort":
                key = table.finish(name)
                memory.parked.pop(key, None)
                del live[name]
            elif fate == "preempt":
                live[name].computed = 0
            elif fate == "round" and (one := live[name]).length > one.exact == len(one.seen) <= one.computed:
                one.computed, one.exact = one.exact, one.length
                table.begin_round(name, one.exact)
        order = data.draw(st.permutations(list(live)))
        running = order[: data.draw(st.integers(0, num_slots))]
        batch = [(name, data.draw(st.integers(1, live[name].length - live[name].computed))) for name in running]
        step = table.begin(Scheduled(n, live[n].prompt_len, live[n].computed, count) for n, count in batch)
        check(step, batch, live, memory, num_slots)
        for name, count in batch:
            request = live[name]
            request.computed += count
            if request.computed == request.length:
                request.length += 1  # a token was sampled
    for name in live:
        memory.parked.pop(table.finish(name), None)
    assert len(table) == len(memory.parked) == 0
