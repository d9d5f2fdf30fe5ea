"""Problems of lm-eval tasks: its data, prompts, filters and metrics, for answers that this package collects."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from caprese_kernels.errors import CapreseError

from .questions import Question, hub, read_jsonl
from .tasks import LmEval


class LmEvalProblems:
    """The problems of zero-shot lm-eval tasks; a limit is divided evenly between the tasks.

    Requests are lm-eval's own (`Task.build_all_requests`), and its filters and `process_results` score the answers.
    """

    def __init__(self, settings: LmEval, data: Path | None, limit: int | None):
        self.settings = settings
        self.metric = settings.metric + (f", {settings.filter}" if settings.filter != "none" else "")
        if data is not None:
            self.tasks = _local(settings, data)
        else:
            self.tasks = hub(settings.tasks[0], lambda _: _load(settings, settings.tasks[:limit], None))
        count = len(self.tasks)
        for number, task in enumerate(self.tasks):
            share = None if limit is None else (limit + count - 1 - number) // count
            with redirect_stderr(StringIO()):  # hides its progress bars
                task.build_all_requests(limit=share)
        self.instances = [each for task in self.tasks for each in task.instances]
        self.questions = [
            Question(f"{each.task_name} {each.doc_id}", each.args[0], stop=tuple(each.args[1]["until"]))
            for each in self.instances
        ]

    def score(self, texts: Sequence[str]) -> list[float]:
        """The metric of each answer, from one text for each question."""
        for instance, text in zip(self.instances, texts, strict=True):
            instance.resps, instance.filtered_resps = [text], {}
        scores = []
        for task in self.tasks:
            task.apply_filters()
            for instance in task.instances:
                filtered = instance.filtered_resps[self.settings.filter]
                scores.append(float(task.process_results(instance.doc, [filtered])[self.settings.metric]))
        return scores


def _local(settings: LmEval, data: Path) -> list[Any]:
    """The first task with the rows of a file: tasks of a group differ only in which part of the data set they use.

    Raises CapreseError for a file that lm-eval cannot read as that data set.
    """
    import jinja2

    if not read_jsonl(data):
        raise CapreseError(f"--data {data}", expected="problems", found="none", fix="give another file")
    try:
        return _load(settings, settings.tasks[:1], data)
    except (KeyError, jinja2.UndefinedError, TypeError) as error:  # lm-eval tries the first row
        raise CapreseError(
            f"--data {data}",
            expected=f"the columns of {settings.tasks[0]}'s data set",
            found=f"{type(error).__name__}: {error}",
            fix="correct the file",
        ) from None


def _load(settings: LmEval, names: Sequence[str], data: Path | None) -> list[Any]:
    import lm_eval.tasks

    logging.getLogger("lm_eval").setLevel(
        logging.ERROR
    )  # hides warnings about few-shot examples, of which none are used
    changes: dict[str, Any] = {"num_fewshot": 0}
    if settings.dataset_kwargs:
        changes["dataset_kwargs"] = settings.dataset_kwargs
    if data is not None:
        files = {settings.split: str(data.resolve())}
        changes |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        # The file has no other split, but lm-eval looks for few-shot examples in these even if it uses none.
        changes |= {"training_split": None, "fewshot_split": None}
    folder = Path(lm_eval.tasks.__file__).parent / settings.folder
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    group = {"group": "caprese", "task": [{"task": name} | changes for name in names]}
    return list(manager.load([group])["tasks"].values())
