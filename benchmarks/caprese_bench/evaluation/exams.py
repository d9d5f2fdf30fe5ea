"""A task's problems, and how answers to them are scored."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from caprese_kernels.errors import CapreseError
from caprese_serve.demo.problems import Problem, grade, problems

from .questions import Question, hub, read_jsonl
from .tasks import Source, Task

GENERATED = 1000  # problems of a generator, where no limit says how many


class Exam(Protocol):
    questions: list[Question]
    metric: str  # what a score is

    def score(self, texts: Sequence[str]) -> list[float]:
        """From 0 to 1, of one text for each question."""


def exam_of(task: Task, data: Path | None, limit: int | None) -> Exam:
    """The task's first `limit` problems, from its own source or from the JSONL file `data`.

    CapreseError for what cannot be read. Downloads from the Hub unless it is cached.
    """
    if task.lm_eval is not None:
        from .harness import Harness

        return Harness(task.lm_eval, data, limit)
    return Graded(task, data, limit)


class Graded:
    """Problems with a gold answer, and a grader of this module."""

    def __init__(self, task: Task, data: Path | None, limit: int | None):
        if task.grader == "math-verify":
            import math_verify  # noqa: F401 - if it is missing, that is told before the questions are asked
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
                    told = ", ".join(row)
                    raise CapreseError(where.format(line, column), expected="a value", found=told, fix="correct it")
                found[name] = None if column is None else str(row[column])
            prompt = task.template.replace("{problem}", found["problem"] or "")
            self.questions.append(Question(found["id"] or str(line), prompt, found["difficulty"]))
            self.answers.append(found["answer"] or "")
        _check_ids(self.questions, str(data or task.name))
        self.metric, self._correct = GRADERS[task.grader]

    def score(self, texts: Sequence[str]) -> list[float]:
        return [float(self._correct(text, gold)) for text, gold in zip(texts, self.answers, strict=True)]


def _check_ids(questions: Sequence[Question], where: str) -> None:
    ids = [question.id for question in questions]
    if twice := sorted({id for id in ids if ids.count(id) > 1})[:1]:
        raise CapreseError(where, expected="a name for each problem", found=f"{twice[0]!r} twice", fix="correct it")
    if not ids:
        raise CapreseError(where, expected="problems", found="none", fix="give another file or limit")


def _rows(source: Source, limit: int | None) -> list[dict[str, Any]]:
    if source.generator is not None:
        made = problems(source.generator, "test", limit or GENERATED)
        return [{"problem": each.prompt, "answer": each.answer, **_difficulty(each)} for each in made]
    assert source.hub is not None
    return hub(source.hub, lambda datasets: list(datasets.load_dataset(source.hub, split=source.split)))[:limit]


def _difficulty(problem: Problem) -> dict[str, int]:
    if problem.task == "math":
        return {"steps": len(re.findall(r"\d+ [-+*] \d+ = \d+", problem.response))}
    return {"facts": problem.prompt.count(".") - 1}  # "Read this." comes first


def verified(text: str, answer: str) -> bool:
    """Whether the response's last answer equals the gold one, as math-verify sees it: boxed first, else the last value.

    Of a thinking model's response only what follows its thoughts counts, if they end. Each step may take 5 s, by an
    alarm signal: only in the main thread.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    said = parse(
        text.rpartition("</think>")[2], [ExprExtractionConfig(), LatexExtractionConfig(boxed_match_priority=0)]
    )
    return verify(parse(f"${answer}$"), said)


GRADERS: dict[str, tuple[str, Callable[[str, str], bool]]] = {
    "marked": ("the answer after ####", grade),
    "math-verify": ("math-verify", verified),
}
