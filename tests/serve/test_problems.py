"""The demo's problem generators: deterministic, disjoint splits, right answers, exact grading."""

import ast
import hashlib
import operator
import re
from itertools import pairwise

import pytest

from caprese_serve.demo.problems import TASKS, Task, chat, grade, parse_answer, problem, problems, split_of

MANY = 4000
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def evaluate(expression: str) -> int:
    """The value of ``a op b``, by Python's own parser."""
    node = ast.parse(expression, mode="eval").body
    assert isinstance(node, ast.BinOp)
    assert isinstance(node.left, ast.Constant)
    assert isinstance(node.right, ast.Constant)
    return OPERATORS[type(node.op)](node.left.value, node.right.value)


@pytest.mark.parametrize("task", TASKS)
def test_deterministic_and_seeded(task: Task) -> None:
    first = list(problems(task, "train", 50, seed=3))
    assert first == list(problems(task, "train", 50, seed=3))
    assert first != list(problems(task, "train", 50, seed=4))
    assert problem(task, "test", 7) == problem(task, "test", 7)


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_disjoint(task: Task) -> None:
    train = list(problems(task, "train", MANY))
    test = list(problems(task, "test", MANY, seed=1))
    assert {split_of(item.key) for item in train} == {"train"}
    assert {split_of(item.key) for item in test} == {"test"}
    assert not {item.key for item in train} & {item.key for item in test}
    assert not {item.prompt for item in train} & {item.prompt for item in test}
    assert len({item.key for item in test}) == MANY


def test_split_is_one_key_in_five_by_sha256() -> None:
    keys = [f"key {index}" for index in range(MANY)]
    expected = [int(hashlib.sha256(key.encode()).hexdigest()[:16], 16) % 5 == 0 for key in keys]
    assert [split_of(key) == "test" for key in keys] == expected
    assert sum(expected) == pytest.approx(MANY / 5, rel=0.1)


def test_math_key_ignores_names_and_objects() -> None:
    by_key: dict[str, set[tuple[str, ...]]] = {}
    for index in range(MANY):
        item = problem("math", "train", index)
        by_key.setdefault(item.key, set()).add(tuple(re.findall(r"\d+", item.prompt)))
    assert all(len(numbers) == 1 for numbers in by_key.values())
    assert len(by_key) < MANY


def test_math_steps_are_right() -> None:
    for item in problems("math", "test", MANY):
        steps = re.findall(r"(\d+ [-+*] \d+) = (\d+)", item.response)
        assert 1 <= len(steps) <= 3
        for expression, result in steps:
            assert evaluate(expression) == int(result)
        assert item.answer == steps[-1][1]


def test_reading_quotes_the_fact() -> None:
    for item in problems("reading", "test", MANY):
        _, *facts, question = re.split(r"(?<=\.) ", item.prompt)
        quote, _, answer = item.response.removeprefix("It says: ").rpartition(" #### ")
        asked = [word for word in re.findall(r"\w+", question) if any(word in fact.split() for fact in facts)]
        assert 3 <= len(facts) <= 6
        assert facts.count(quote) == 1
        assert quote.rstrip(".").split()[-1] == answer == item.answer
        assert set(asked) - {"is", "the"} <= set(quote.split())


@pytest.mark.parametrize("task", TASKS)
def test_grade(task: Task) -> None:
    items = list(problems(task, "test", 200))
    assert all(grade(item.response, item.answer) for item in items)
    for item, other in pairwise(items):
        assert grade(other.response, item.answer) == (other.answer == item.answer)
        shuffled = " ".join(reversed(item.response.split()))
        assert not grade(shuffled, item.answer)
    assert parse_answer("no mark") is None
    assert not grade("12", "12")
    assert grade("1 #### 3 #### 12 \n", "12")
    assert not grade("#### 12.", "12")


def test_chat_is_one_user_message() -> None:
    item = problem("math", "train", 0)
    assert chat(item.prompt) == [{"role": "user", "content": item.prompt}]
