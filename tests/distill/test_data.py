"""Rows and their token ids."""

import copy

import pytest
import torch

from caprese_distill.data.chat import ChatRenderer
from caprese_distill.data.rows import Row
from caprese_distill.data.samples import Sample, encode, split
from caprese_kernels.errors import CapreseError
from tests.support.distill import make_samples
from tests.support.models import BOS, EOS, make_tokenizer


def test_tokens_are_those_a_server_would_feed() -> None:
    tokenizer = make_tokenizer()
    (sample,), skipped = encode(ChatRenderer(tokenizer), [Row(1, "one two", "three four")], 100)
    messages = [{"role": "user", "content": "one two"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    response = tokenizer.encode("three four", add_special_tokens=False)
    assert sample.ids.tolist() == prompt + response  # eos was sampled, never fed
    assert sample.prompt_length == len(prompt)
    assert sample.num_rows == len(response)
    assert not skipped


def test_messages_are_rendered_whole() -> None:
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    tokenizer = make_tokenizer()
    (sample,), _ = encode(ChatRenderer(tokenizer), [Row(1, chat, "four")], 100)
    assert (
        tokenizer.decode(sample.ids[: sample.prompt_length])
        == f"{BOS}<|user|>one<|assistant|>two{EOS}<|user|>three<|assistant|>"
    )


def test_an_eos_in_the_response_is_not_doubled() -> None:
    tokenizer = make_tokenizer()
    (plain, ended), _ = encode(ChatRenderer(tokenizer), [Row(1, "one", "two"), Row(2, "one", f"two{EOS}")], 100)
    assert torch.equal(plain.ids, ended.ids)


def test_the_last_token_sampled_is_never_fed() -> None:
    for response in ([7, 8, 1], [7, 8, 9]):  # ended by eos, or cut by length
        sample = Sample.of([4, 5], response, 3)
        assert sample.ids.tolist() == [4, 5, 7, 8]
        assert sample.ids.dtype == torch.int32
        assert (sample.prompt_length, sample.num_rows, sample.line) == (2, 2, 3)


def test_without_a_chat_template_the_prompt_is_plain_text() -> None:
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.chat_template = None
    (sample,), _ = encode(ChatRenderer(tokenizer), [Row(1, "one two", "three")], 100)
    assert tokenizer.decode(sample.ids[: sample.prompt_length]) == "one two"
    with pytest.raises(CapreseError, match=r"line 4: expected a prompt that is text.*no chat template"):
        encode(ChatRenderer(tokenizer), [Row(4, [{"role": "user", "content": "one"}], "two")], 100)


def test_unusable_samples_are_counted() -> None:
    long = "two three four five six seven " * 9
    blank = [{"role": "system", "content": ""}, {"role": "user", "content": " "}]
    rows = [Row(1, "one", long), Row(2, "one", ""), Row(3, "one", "two"), Row(4, " \n", "two"), Row(5, blank, "two")]
    samples, skipped = encode(ChatRenderer(make_tokenizer()), rows, 30)
    assert [s.line for s in samples] == [3]
    assert skipped == {"longer than 30 tokens": 1, "empty response": 1, "empty prompt": 2}


@pytest.mark.parametrize(("count", "held"), [(2, 1), (9, 1), (10, 1), (25, 2)])
def test_a_tenth_is_held_out(count: int, held: int) -> None:
    samples = make_samples(count)
    fit, out = split(samples)
    assert len(out) == held
    assert sorted(samples.index(s) for s in (*fit, *out)) == list(range(count))
    assert [samples.index(s) for s in split(samples)[1]] == [samples.index(s) for s in out]


def test_kinds_of_problems_that_take_turns_are_both_held_out() -> None:
    samples = make_samples(400)
    odd = sum(samples.index(s) % 2 for s in split(samples)[1])
    assert 10 <= odd <= 30  # of 40; a fair draw leaves this once in a thousand, and this draw is fixed


def test_an_error_of_the_template_names_the_line() -> None:
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(CapreseError, match=r"data, line 7: expected messages that.*TemplateError: no system role"):
        encode(ChatRenderer(tokenizer), [Row(7, [{"role": "system", "content": "one"}], "two")], 100)
