"""The tasks: a YAML file each in paper/tasks, checked against this schema.

A task either names tasks of lm-eval, which supplies prompts, filters and metric, or its own data, prompt and grader.
The name of a new file is at once an argument of `--tasks`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from caprese_kernels.errors import CapreseError

from ..results.parsing import parse as parse_schema

FOLDER = Path(__file__).parents[1] / "paper/tasks"
GROUPS = {
    "table1": "Table 1: instruct models, zero-shot",
    "table2": "Table 2: thinking models, zero-shot",
    "demo": "the demo's tasks",
    "other": "other tasks",
}
# The prompt of Open R1, which section 4.3 of the paper names: github.com/huggingface/open-r1, src/open_r1/evaluate.py
# at commit eeca246 (February 2025). Since April 2025 Open R1 uses the same prompt from lighteval, default_prompts.py.
OPEN_R1 = (
    "Solve the following math problem efficiently and clearly.  The last line of your response should be of the "
    "following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' (without quotes) "
    "where ANSWER is just the final number or expression that solves the problem. Think step by step before answering."
    "\n\n{problem}"
)
PROMPTS = {"open-r1": OPEN_R1}
Percent = Annotated[float, Field(ge=0, le=100)]
# Rows of the paper's tables 1, 2 and 5 (LoRA: 5 only).
PublishedRow = Literal[
    "full", "griffin", "layer-wise caprese-griffin", "end-to-end caprese-griffin", "cats", "layer-wise caprese-cats",
    "end-to-end caprese-cats", "layer-wise lora-griffin", "end-to-end lora-griffin",
]  # fmt: skip


class Strict(BaseModel):
    """Refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(Strict):
    """Where the rows come from, and what their columns hold. `--data` gives a local file with the same columns."""

    hub: str | None = Field(None, description="data set on the Hub")
    config: str | None = Field(None, description="the data set's configuration on the Hub, if it has several")
    split: str = "test"
    generator: Literal["math", "reading"] | None = Field(None, description="a task of caprese_serve.demo.problems")
    problem: str = Field("problem", description="column of the question")
    answer: str = Field("answer", description="column of the gold answer")
    id: str | None = Field(None, description="column with a problem's name; default: its line, from 0")
    difficulty: str | None = Field(None, description="column by which the length benchmark groups responses")

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if (self.hub is None) == (self.generator is None):
            raise ValueError("either hub or generator")
        return self


class LmEval(Strict):
    """Tasks of lm-eval, zero-shot, which count as one task here."""

    folder: str = Field(description="folder of lm_eval/tasks that defines them; no other is searched")
    tasks: list[str] = Field(min_length=1)
    split: str = Field(description="the split that lm-eval evaluates on, which a file given by --data replaces")
    metric: str
    filter: str = "none"
    dataset_kwargs: dict[str, Any] | None = Field(None, description="replaces lm-eval's own")


class Sampling(Strict):
    """Sampling of responses; temperature 0 is greedy."""

    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(ge=1, description="of a response")


class Task(Strict):
    """One YAML file; `name` is its name."""

    name: str
    title: str
    group: Literal["table1", "table2", "demo", "other"]
    lm_eval: LmEval | None = None
    source: Source | None = None
    prompt: str = Field("{problem}", description="text that contains {problem}, or a name of PROMPTS")
    grader: Literal["marked", "math-verify", "last-number"] | None = None
    chat: bool = Field(True, description="whether the prompt is a user's message, or else text to continue")
    sampling: Sampling
    runs: int = Field(1, ge=1, description="how often every problem is asked, each time with another seed")
    published: dict[str, dict[PublishedRow, Percent | tuple[Percent, Percent]]] = Field(
        default_factory=dict,
        description="the paper's figures in percent, alone or with their standard deviation, by Hub id",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Task:
        if (self.lm_eval is None) == (self.source is None):
            raise ValueError("either lm_eval or source")
        if (self.source is None) != (self.grader is None):
            raise ValueError("a grader with source, none with lm_eval")
        if "{problem}" not in self.template:
            raise ValueError(f"a prompt with {{problem}} in it, or one of {', '.join(PROMPTS)}")
        if self.runs > 1 and self.sampling.temperature == 0:
            raise ValueError("one run where the temperature is 0: all would be the same")
        return self

    @property
    def template(self) -> str:
        """The prompt with {problem} in it."""
        return PROMPTS.get(self.prompt, self.prompt)

    def publication(self, model: str) -> dict[PublishedRow, tuple[float, float | None]]:
        """The paper's figures for a model, known by the last part of its name, as shares with their deviation."""
        found = {name.rpartition("/")[2].lower(): rows for name, rows in self.published.items()}
        rows = found.get(Path(model).name.lower(), {})
        pairs = {row: each if isinstance(each, tuple) else (each, None) for row, each in rows.items()}
        return {row: (round(mean / 100, 6), std and round(std / 100, 6)) for row, (mean, std) in pairs.items()}


def names() -> list[str]:
    """The names of all tasks."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Task:
    """The task of tasks/NAME.yaml. Raises CapreseError if there is none, or if it breaks the schema."""
    if name not in names():
        known = ", ".join((*GROUPS, *names()))
        raise CapreseError("--tasks", expected=f"some of {known}", found=repr(name), fix="correct the list")
    return parse(name, (FOLDER / f"{name}.yaml").read_text())


def parse(name: str, text: str) -> Task:
    """The task in a file's text. Raises CapreseError for text that is not YAML or breaks the schema."""
    import yaml

    where, fix = f"task {name}", f"correct {FOLDER / name}.yaml"
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CapreseError(where, expected="YAML", found=str(error), fix=fix) from None
    return parse_schema(Task, found | {"name": name} if isinstance(found, dict) else found, where, fix)


def chosen(text: str) -> list[Task]:
    """The tasks in a comma-separated list of names and groups, each once, in that order."""
    every = {name: load(name) for name in names()}
    wanted: dict[str, Task] = {}
    for part in (part.strip() for part in text.split(",")):
        if part in GROUPS:
            wanted |= {name: task for name, task in every.items() if task.group == part}
        else:
            wanted[part] = load(part)
    return list(wanted.values())
