"""Tasks and their graders: every file follows the schema, gold answers score 1, other problems' answers 0."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from caprese_bench.evaluation.lm_eval_problems import LmEvalProblems
from caprese_bench.evaluation.problem_sets import ends_in_number, load_problems, verified
from caprese_bench.evaluation.tasks import GROUPS, chosen, load, names, parse
from caprese_kernels.errors import CapreseError
from caprese_serve.cli import main

# A folder with gsm8k/test.jsonl of github.com/openai/grade-school-math.
DATA = Path(os.environ.get("CAPRESE_DATA", Path(__file__).parents[3] / "shared/data"))
needs_gsm8k = pytest.mark.skipif(
    not (DATA / "gsm8k/test.jsonl").is_file(), reason="CAPRESE_DATA names no folder with gsm8k/test.jsonl"
)
DEMO = (Path(__file__).parents[2] / "benchmarks/caprese_bench/paper/tasks/demo-math.yaml").read_text()


def rotated(texts: list[str]) -> list[str]:
    return texts[1:] + texts[:1]


def mean(scores: list[float]) -> float:
    return sum(scores) / len(scores)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_task_is_valid_and_published() -> None:
    tasks = {name: load(name) for name in names()}
    assert {task.group for task in tasks.values()} == set(GROUPS)
    assert [task.name for task in chosen("table2, demo-math,demo")] == [
        "aime24", "amc23", "brumo25", "math500", "demo-math", "demo-reading",
    ]  # fmt: skip
    # Seven rows for each of Table 1's five models and Table 2's three; Table 5 adds LoRA's two for three models.
    for task in tasks.values():
        rows = [len(rows) for rows in task.published.values()]
        assert sorted(rows) == {"table1": [7, 7, 9, 9, 9], "table2": [7, 7, 7], "demo": [], "other": []}[task.group]
        assert task.runs == (4 if task.name in ("aime24", "amc23", "brumo25") else 1)
    amc = tasks["amc23"].publication("/models/DeepSeek-R1-Distill-Qwen-7B")
    assert amc["full"] == (0.75, 0.0408)
    assert amc["end-to-end caprese-cats"] == (0.7813, 0.0515)
    assert tasks["gsm8k"].publication("google/gemma-2-2b-it")["cats"] == (0.3442, None)
    assert tasks["gsm8k"].publication("caprese-demo") == {}
    assert tasks["aime24"].template.endswith("Think step by step before answering.\n\n{problem}")
    assert r"'Therefore, the final answer is: $\boxed{ANSWER}$. I hope it is correct'" in tasks["aime24"].template
    assert tasks["aime24"].sampling.model_dump() == {"temperature": 0.6, "top_p": 0.95, "max_tokens": 32768}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("grader:", "graders:", "graders: expected no such key"),
        ("grader: marked", "", "a grader with source"),
        (
            "generator: math",
            "generator: maths",
            "source.generator: expected input should be 'math' or",
        ),
        ("generator: math", "generator: math, hub: a/b", "either hub or generator"),
        ("max_tokens: 160", "max_tokens: 160, top_k: 3", "sampling.top_k: expected no such key; found 3"),
        ("title:", "prompt: open-r2\ntitle:", "a prompt with {problem} in it, or one of open-r1"),
        ("title:", "runs: 4\ntitle:", "one run where the temperature is 0"),
        ("title:", "published: {a/b: {fool: 3}}\ntitle:", "published.a/b.fool.[key]: "),
        ("group: demo", "group: [demo", "task demo-math: expected YAML"),
    ],
)
def test_mistakes_in_a_task(old: str, new: str, message: str) -> None:
    assert old in DEMO
    with pytest.raises(CapreseError) as error:
        parse("demo-math", DEMO.replace(old, new))
    assert message in str(error.value)


def test_an_unknown_task() -> None:
    with pytest.raises(
        CapreseError, match=r"--tasks: expected some of table1, table2, demo, other, aime24, .* found 'gsm'"
    ):
        chosen("demo,gsm")


@needs_gsm8k
def test_gsm8k_through_lm_eval() -> None:
    """Gold solutions score 1, those of the next problem what equal answers give; and lm-eval's own loop agrees."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.dummy import DummyLM

    problems = load_problems(load("gsm8k"), DATA / "gsm8k/test.jsonl", None)
    assert isinstance(problems, LmEvalProblems)
    assert len(problems.questions) == 1319
    assert problems.questions[0].prompt.startswith("Q: Janet")
    assert problems.questions[0].prompt.endswith("\nA: Let's think step by step.")
    assert problems.questions[0].stop == ("Q:", "</s>", "<|im_end|>")
    gold = [instance.doc["answer"] for instance in problems.instances]
    assert mean(problems.score(gold)) == 1.0
    wrong = problems.score(rotated(gold))
    assert mean(wrong) == 15 / 1319  # neighbours with the same answer

    class Answered(DummyLM):
        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [rotated(gold)[request.doc_id] for request in requests]

    (task,) = problems.tasks
    found = evaluate(Answered(), {"gsm8k_cot_zeroshot": task}, bootstrap_iters=0, log_samples=False)
    assert found is not None
    assert found["results"]["gsm8k_cot_zeroshot"]["exact_match,flexible-extract"] == pytest.approx(mean(wrong))


@needs_gsm8k
def test_gsm8k_through_math_verify() -> None:
    rows = [json.loads(line) for line in (DATA / "gsm8k/test.jsonl").read_text().splitlines()]
    gold = [row["answer"].partition("#### ")[2] for row in rows]
    answered = [f"It is {row['answer']}.\nTherefore, the final answer is: $\\boxed{{{answer}}}$. I hope it is correct."
            for row, answer in zip(rows, gold, strict=True)]  # fmt: skip
    assert all(map(verified, answered, gold))
    assert (
        mean([float(verified(text, answer)) for text, answer in zip(rotated(answered), gold, strict=True)]) == 15 / 1319
    )


@needs_gsm8k
def test_gsm8k_as_a_chat() -> None:
    problems = load_problems(load("gsm8k-chat"), DATA / "gsm8k/test.jsonl", None)
    assert problems.questions[0].prompt.startswith("Janet")
    rows = [json.loads(line) for line in (DATA / "gsm8k/test.jsonl").read_text().splitlines()]
    gold = [row["answer"] for row in rows]
    assert mean(problems.score(gold)) == 1.0
    assert mean(problems.score(rotated(gold))) == 15 / 1319  # neighbours with the same answer


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("So 2 + 3 = 5.", "2+3=5\n#### 5", True),
        ("It makes $1,234.50 in 3 days: \\boxed{1234.5}", "#### 1,234.5", True),
        ("10-5", "#### 5", True),
        ("The change is -5", "#### -5", True),
        ("The change is -5", "#### 5", False),
        ("<think>5</think> I do not know", "#### 5", False),
        ("18 dollars, or 20", "#### 18", False),
        ("", "#### 18", False),
    ],
)
def test_the_last_number(text: str, answer: str, right: bool) -> None:
    assert ends_in_number(text, answer) is right


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (r"so it is $\boxed{\left(3,\frac{\pi}{2}\right)}$.", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"\boxed{0.5}", r"\frac{1}{2}", True),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True),
        (r"\boxed{\text{Evelyn}}", r"\text{Debra}", False),
        (r"\boxed{27}", "27.0", True),
        ("The answer is 204.", "204", True),
        (r"<think>It may be \boxed{12}. No, 204. \boxed{12}</think> Therefore \boxed{204}", "204", True),
        (r"<think>It may be \boxed{204}.</think> Therefore \boxed{12}", "204", False),
        ("<think>I never come to an end, and 7", "204", False),
        ("", "204", False),
    ],
)
def test_math_verify(text: str, answer: str, right: bool) -> None:
    assert verified(text, answer) is right


def test_the_other_tasks_of_lm_eval(tmp_path: Path) -> None:
    """Rows as the Hub's data sets hold them."""
    turns = {"input_text": ["What has Tom?", "Which colour?"]}
    answers = {"input_text": ["a kite", "red"]}
    coqa = load_problems(
        load("coqa"),
        write(tmp_path / "coqa", {"story": "Tom has a red kite.", "questions": turns, "answers": answers}),
        None,
    )
    assert coqa.questions[0].prompt == "Tom has a red kite.\n\nQ: What has Tom?\n\nA: a kite\n\nQ: Which colour?\n\nA:"
    assert [coqa.score([text]) for text in ("red", "The red.\nMore", "blue")] == [[1.0], [1.0], [0.0]]

    def blob(text: str) -> dict[str, Any]:
        return {"unanswerable": False, "yes_no": None, "free_form_answer": text, "extractive_spans": []}

    asked = {"question": ["Which data?"], "answers": [{"answer": [blob("the Penn treebank")]}]}
    qasper = load_problems(
        load("qasper"), write(tmp_path / "qasper", {"title": "T", "abstract": "A", "qas": asked}), None
    )
    assert qasper.questions[0].prompt == "TITLE: T\nABSTRACT: A\n\nQ: Which data?\n\nA:"
    assert qasper.metric == "f1_abstractive"
    # Of "penn bank" one of two words is right, and one of the two gold ones (articles do not count) found.
    assert [qasper.score([text])[0] for text in ("Penn treebank", "Penn bank", "no")] == [1.0, 0.5, 0.0]
    rows = [
        {"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$.", "level": "Level 1", "type": "Algebra"},
        {"problem": "Half of 1?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "level": "Level 2", "type": "Algebra"},
    ]
    math = load_problems(load("math"), write(tmp_path / "math", *rows), None)
    assert [question.prompt for question in math.questions] == [f"Problem:\n{r['problem']}\n\nSolution:" for r in rows]
    assert math.score(["The answer is $2$.", "So we get 0.5"]) == [1.0, 1.0]
    assert math.score(["The answer is $3$.", "So we get $\\frac13$"]) == [0.0, 0.0]
    assert len(load_problems(load("math"), tmp_path / "math", 1).questions) == 1


def test_the_demos_tasks() -> None:
    problems = load_problems(load("demo-math"), None, 50)
    assert {question.difficulty for question in problems.questions} == {"1", "2", "3"}
    steps = [question.prompt.count("box") for question in problems.questions if question.difficulty == "1"]
    assert len(problems.questions) == 50
    assert steps
    reading = load_problems(load("demo-reading"), None, 5)
    for question in reading.questions:
        assert question.difficulty == str(len(question.prompt.split(". ")) - 2)  # "Read this" and the question


def test_local_files(tmp_path: Path) -> None:
    rows = [{"problem": "1 + 1?", "answer": "2", "level": 1, "unique_id": "a"}]
    problems = load_problems(load("math500"), write(tmp_path / "a.jsonl", *rows), None)
    (question,) = problems.questions
    assert (question.id, question.difficulty) == ("a", "1")
    assert question.prompt.endswith("before answering.\n\n1 + 1?")
    assert problems.score(["\\boxed{2}"]) == [1.0]
    for content, message in (
        (
            [{"problem": "x", "answer": "2", "level": 1}],
            "row 0: column 'unique_id': expected a value; found the columns problem,",
        ),
        ([*rows, *rows], "a different name for each problem; found 'a' twice"),
        ([], "expected problems; found none"),
        ([3], "line 1: expected a JSON object; found 3"),
    ):
        with pytest.raises(CapreseError) as error:
            load_problems(load("math500"), write(tmp_path / "b.jsonl", *content), None)
        assert message in str(error.value)
    for task in ("math500", "gsm8k"):
        with pytest.raises(CapreseError, match=r"--data .*/none: expected a JSONL file"):
            load_problems(load(task), tmp_path / "none", None)


@pytest.mark.parametrize("task", ["gsm8k", "coqa", "qasper", "math"])
def test_files_that_lm_eval_cannot_read(task: str, tmp_path: Path) -> None:
    with pytest.raises(CapreseError, match=r"expected the columns of .*'s data set; found (KeyError|UndefinedError): "):
        load_problems(load(task), write(tmp_path / "a", {"colour": "red"}), None)
    with pytest.raises(CapreseError, match="expected problems; found none"):
        load_problems(load(task), write(tmp_path / "b"), None)
    with pytest.raises(CapreseError, match="line 1: expected a JSON object"):
        load_problems(load(task), write(tmp_path / "c", [1]), None)


@pytest.mark.parametrize(("package", "task"), [("lm_eval", "gsm8k"), ("math_verify", "math500")])
def test_a_missing_package_is_reported_with_its_extra(
    package: str, task: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = write(tmp_path / "a", {"question": "1?", "answer": "#### 1"})
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # importing it then fails
    command = ["caprese", "bench", "accuracy", "--tasks", task, "--data", f"{task}={data}", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the tests' own handlers stay
    with pytest.raises(SystemExit):
        main()
    message = capsys.readouterr().err
    assert message.startswith(f"caprese: package {package}")
    assert 'pip install "caprese-vllm[bench]"' in message


def test_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for task in ("amc23", "coqa"):
        with pytest.raises(CapreseError, match=r"ConnectionError: no network; .* --data TASK=FILE"):
            load_problems(load(task), None, 3)
