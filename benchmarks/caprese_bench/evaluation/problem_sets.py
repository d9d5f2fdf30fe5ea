"""The problems of a task, and scoring the answers to them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

from caprese_kernels.errors import CapreseError
from caprese_serve.demo.problems import Problem, grade, problems

from .questions import Question, hub, read_jsonl
from .tasks import Source, Task

GENERATED = 1000  # problems from a generator, if there is no limit
_NUMBER = re.compile(r"(?<!\d)-?\d[\d,]*(?:\.\d+)?|-?\.\d+", re.ASCII)


class ProblemSet(Protocol):
    """The problems of a task, and a grader for the answers."""

    questions: list[Question]
    metric: str  # name of the score

    def score(self, texts: Sequence[str]) -> list[float]:
        """Scores from 0 to 1, of one answer to each question."""


def load_problems(task: Task, data: Path | None, limit: int | None) -> ProblemSet:
    """The task's first `limit` problems, from its own source or from the JSONL file `data`.

    Downloads from the Hub what is not cached. Raises CapreseError for data that cannot be read.
    """
    if task.lm_eval is not None:
        from .lm_eval_problems import LmEvalProblems

        return LmEvalProblems(task.lm_eval, data, limit)
    return GradedProblems(task, data, limit)


class GradedProblems:
    """Problems with a gold answer, and one of GRADERS."""

    def __init__(self, task: Task, data: Path | None, limit: int | None):
        if task.grader == "math-verify":
            import math_verify  # noqa: F401 - fails here if it is not installed, before any question is asked
        source = task.source
        assert source is not None
        assert task.grader is not None
        rows = read_jsonl(data)[:limit] if data else _rows(source, limit)
        where = f"{data or task.name}, row {{}}: column {{!r}}"
        self.questions, self.answers = [], []
        for line, row in enumerate(rows):
            found = {}
            for name in ("problem", "answer", "id", "difficulty"):
                column = getattr(source, name)
                if column is not None and row.get(column) is None:
                    raise CapreseError(
                        where.format(line, column),
                        expected="a value",
                        found=f"the columns {', '.join(row)}",
                        fix="add the column to every row",
                    )
                found[name] = None if column is None else str(row[column])
            prompt = task.template.replace("{problem}", found["problem"] or "")
            self.questions.append(Question(found["id"] or str(line), prompt, found["difficulty"]))
            self.answers.append(found["answer"] or "")
        _check_ids(self.questions, str(data or task.name))
        self.metric, self._correct = GRADERS[task.grader]

    def score(self, texts: Sequence[str]) -> list[float]:
        """1 for a correct answer, 0 for a wrong one."""
        return [float(self._correct(text, gold)) for text, gold in zip(texts, self.answers, strict=True)]


def _check_ids(questions: Sequence[Question], where: str) -> None:
    ids = [question.id for question in questions]
    if twice := sorted({id for id in ids if ids.count(id) > 1})[:1]:
        raise CapreseError(
            where, expected="a different name for each problem", found=f"{twice[0]!r} twice", fix="rename one of them"
        )
    if not ids:
        raise CapreseError(where, expected="problems", found="none", fix="give another file or limit")


def _rows(source: Source, limit: int | None) -> list[dict[str, Any]]:
    if source.generator is not None:
        made = problems(source.generator, "test", limit or GENERATED)
        return [{"problem": each.prompt, "answer": each.answer, **_difficulty(each)} for each in made]
    assert source.hub is not None
    where, split = (source.hub, source.config), source.split
    return hub(source.hub, lambda datasets: list(datasets.load_dataset(*where, split=split)))[:limit]


def _difficulty(problem: Problem) -> dict[str, int]:
    if problem.task == "math":
        return {"steps": len(re.findall(r"\d+ [-+*] \d+ = \d+", problem.response))}
    return {"facts": problem.prompt.count(".") - 1}  # without the leading "Read this."


def verified(text: str, answer: str) -> bool:
    """Whether math-verify finds the response's final answer equal to the gold one: a boxed one, or the last value.

    Of a thinking model's response only the text after its thoughts counts, if they end. math-verify limits each step to
    5 s by an alarm signal, so this works only in the main thread.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    answered = parse(
        text.rpartition("</think>")[2], [ExprExtractionConfig(), LatexExtractionConfig(boxed_match_priority=0)]
    )
    return verify(parse(f"${answer}$"), answered)


def ends_in_number(text: str, answer: str) -> bool:
    """Whether the last number of the response, after its thoughts, is the last number of the gold answer."""
    found, gold = (_last_number(each) for each in (text.rpartition("</think>")[2], answer))
    return found is not None and found == gold


def _last_number(text: str) -> Decimal | None:
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


GRADERS: dict[str, tuple[str, Callable[[str, str], bool]]] = {
    "marked": ("the answer after ####", grade),
    "math-verify": ("math-verify", verified),
    "last-number": ("the last number", ends_in_number),
}
