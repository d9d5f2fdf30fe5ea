"""Deterministic generators of the demo model's two tasks: word problems and reading questions.

Every problem has a ``key``, its canonical form. For math this is the sentence templates with their numbers, without
names and objects, which do not change the arithmetic; for reading it is the set of facts and the question. The split
is a function of the key alone: one key in five, by SHA-256, is a test key. Generators draw until the key is in the
wanted split, so training and held-out problems are disjoint for any number of problems and any seed.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Task = Literal["math", "reading"]
Split = Literal["train", "test"]

TASKS: tuple[Task, ...] = ("math", "reading")
ANSWER_MARK = "####"
TEST_KEYS_ONE_IN = 5
LARGEST_RESULT = 200


@dataclass(frozen=True)
class Problem:
    """A question as a client would send it, with a worked response that ends in ``#### answer``."""

    task: Task
    prompt: str
    response: str
    answer: str
    key: str


@dataclass(frozen=True)
class _Sentence:
    """A sentence of a word problem, and the computation that it asks for.

    In ``text`` and ``work``, {n} and {m} are names, {o} objects, {a} and {b} numbers, and {c} the computation. An
    opening computes ``a op b`` (or nothing, where op is empty); a change computes ``total op b``.
    """

    id: str
    op: str
    text: str
    work: str = ""
    factor: int | None = None


_OPENINGS = (
    _Sentence("has", "", "{n} has {b} {o}."),
    _Sentence("found", "", "{n} finds {b} {o} in the park."),
    _Sentence("start", "", "{n} starts the day with {b} {o}."),
    _Sentence("boxes", "*", "{n} has {a} boxes with {b} {o} in each box.", "{n} has {c} {o}."),
    _Sentence("bags", "*", "{n} buys {a} bags of {b} {o}.", "{n} buys {c} {o}."),
    _Sentence("daily", "*", "{n} collects {a} {o} a day for {b} days.", "{n} collects {c} {o}."),
    _Sentence("rows", "*", "{n} sets out {a} rows of {b} {o}.", "{n} sets out {c} {o}."),
    _Sentence("colours", "+", "{n} has {a} red {o} and {b} blue {o}.", "{n} has {c} {o}."),
    _Sentence("days", "+", "{n} gets {a} {o} on Monday and {b} {o} on Tuesday.", "In two days {n} gets {c} {o}."),
    _Sentence("broken", "-", "{n} had {a} {o}, but {b} of them were broken.", "{n} has {c} good {o}."),
    _Sentence("more", "+", "{m} has {a} {o}. {n} has {b} more {o} than {m}.", "{n} has {c} {o}."),
    _Sentence("fewer", "-", "{m} has {a} {o}. {n} has {b} fewer {o} than {m}.", "{n} has {c} {o}."),
    _Sentence("times", "*", "{m} has {a} {o}. {n} has {b} times as many.", "{n} has {c} {o}."),
)
_CHANGES = (
    _Sentence("buy", "+", "{n} buys {b} more {o}.", "After buying {b}, {n} has {c} {o}."),
    _Sentence("gift", "+", "{m} gives {n} {b} more {o}.", "With {b} from {m}, {n} has {c} {o}."),
    _Sentence("find", "+", "Then {n} finds {b} {o}.", "After finding {b}, {n} has {c} {o}."),
    _Sentence("give", "-", "{n} gives {b} {o} to {m}.", "After giving {b} to {m}, {n} has {c} {o}."),
    _Sentence("lose", "-", "{n} loses {b} {o}.", "After losing {b}, {n} has {c} {o}."),
    _Sentence("sell", "-", "{n} sells {b} {o}.", "After selling {b}, {n} has {c} {o}."),
    _Sentence("double", "*", "Then {n} doubles the number of {o}.", "After doubling, {n} has {c} {o}.", factor=2),
    _Sentence("triple", "*", "Then {n} triples the number of {o}.", "After tripling, {n} has {c} {o}.", factor=3),
)
# Changes of two steps: first the content of all boxes is computed, then it is added to or subtracted from the total.
_PARCELS = (
    _Sentence("bring", "+", "{m} brings {a} boxes with {b} {o} in each box.", "{m} brings {c} {o}."),
    _Sentence("ship", "-", "{n} sends off {a} boxes with {b} {o} in each box.", "{n} sends off {c} {o}."),
)
_PRICE = _Sentence("price", "*", "{n} sells all the {o} for {b} dollars each.", "{n} gets {c} dollars.")
_QUESTIONS = (
    "How many {o} does {n} have now?",
    "How many {o} does {n} have in the end?",
    "How many {o} does {n} have?",
)
_PRICE_QUESTION = "How many dollars does {n} get?"

_NAMES = (
    "Mia", "Leo", "Ana", "Ben", "Zoe", "Tom", "Eva", "Sam", "Ivy", "Max", "Lily", "Noah",
    "Emma", "Jack", "Nora", "Hugo", "Ruby", "Omar", "Rosa", "Finn", "Tara", "Alex", "June", "Paul",
)  # fmt: skip
_OBJECTS = (
    "apples", "pears", "coins", "books", "pens", "cards", "shells", "stones", "eggs", "cookies",
    "marbles", "stamps", "buttons", "lemons", "plums", "beads", "nuts", "toys", "cups", "flowers",
)  # fmt: skip
_PLACES = (
    "kitchen", "garden", "garage", "attic", "cellar", "library", "office", "school",
    "park", "market", "museum", "station", "hall", "barn",
)  # fmt: skip
_THINGS = (
    "kite", "lamp", "drum", "ball", "bike", "hat", "clock", "chair", "boat", "tent",
    "coat", "vase", "piano", "ladder", "mirror", "basket",
)  # fmt: skip
_TREATS = ("tea", "jam", "rice", "soup", "bread", "honey", "cheese", "milk", "cake", "pasta")
_GAMES = ("chess", "tennis", "football", "hockey", "golf", "cricket", "poker", "darts")
_COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink", "grey", "purple")
_CITIES = ("Paris", "Rome", "Berlin", "Oslo", "Madrid", "London", "Vienna", "Dublin", "Athens", "Prague")
_PETS = ("cat", "dog", "rabbit", "parrot", "hamster", "turtle", "pony", "goldfish")
_LANGUAGES = ("French", "German", "Spanish", "Greek", "Polish", "Dutch", "Danish", "Turkish")

# Relation: (fact, question, values). The subject of a colour is a thing, of the others a person.
_RELATIONS = {
    "place": ("{s} is in the {v}.", "Where is {s}?", _PLACES),
    "owns": ("{s} owns the {v}.", "What does {s} own?", _THINGS),
    "likes": ("{s} likes {v}.", "What does {s} like?", _TREATS),
    "plays": ("{s} plays {v}.", "What does {s} play?", _GAMES),
    "colour": ("The {s} is {v}.", "What colour is the {s}?", _COLOURS),
    "city": ("{s} lives in {v}.", "Where does {s} live?", _CITIES),
    "pet": ("{s} has a {v}.", "What pet does {s} have?", _PETS),
    "language": ("{s} speaks {v}.", "What does {s} speak?", _LANGUAGES),
}


def split_of(key: str) -> Split:
    """The split a problem belongs to, from its key alone."""
    digest = hashlib.sha256(key.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % TEST_KEYS_ONE_IN == 0 else "train"


def problem(task: Task, split: Split, index: int, seed: int = 0) -> Problem:
    """The index-th problem of a task and split; the same arguments always give the same problem."""
    rng = random.Random(f"{task} {split} {seed} {index}")
    draw = {"math": _draw_math, "reading": _draw_reading}[task]
    while True:
        drawn = draw(rng)
        if drawn is not None and split_of(drawn.key) == split:
            return drawn


def problems(task: Task, split: Split, count: int, seed: int = 0) -> Iterator[Problem]:
    """``count`` problems with distinct keys."""
    seen: set[str] = set()
    index = 0
    while len(seen) < count:
        drawn = problem(task, split, index, seed)
        index += 1
        if drawn.key not in seen:
            seen.add(drawn.key)
            yield drawn


def chat(prompt: str) -> list[dict[str, str]]:
    """A prompt as the messages of a chat request."""
    return [{"role": "user", "content": prompt}]


def parse_answer(response: str) -> str | None:
    """The text after the last ``####``, or None if there is no such mark."""
    _, mark, answer = response.rpartition(ANSWER_MARK)
    return answer.strip() if mark else None


def grade(response: str, answer: str) -> bool:
    """Whether the response ends in exactly this answer."""
    return parse_answer(response) == answer.strip()


class _Rejected(Exception):
    """A result of the drawn numbers is out of range."""


class _Story:
    """A word problem under construction: its sentences, worked steps, key, and running total."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        name, other = rng.sample(_NAMES, 2)
        self.words = {"n": name, "m": other, "o": rng.choice(_OBJECTS)}
        self.text: list[str] = []
        self.work: list[str] = []
        self.key: list[str] = []
        self.total = 0
        self.steps = 0

    def add_sentence(self, sentence: _Sentence, *numbers: int) -> None:
        """Adds a sentence to the problem; `numbers` are its {b}, or {a} and {b}."""
        a, b = numbers if len(numbers) == 2 else (0, *numbers)
        self.text.append(sentence.text.format(**self.words, a=a, b=b))
        drawn = () if sentence.factor else numbers
        self.key.append(":".join([sentence.id, *map(str, drawn)]))

    def step(self, work: str, a: int, op: str, b: int) -> int:
        """Adds a worked computation to the response and returns its result."""
        result = {"+": a + b, "-": a - b, "*": a * b}[op]
        if not 0 < result <= LARGEST_RESULT:
            raise _Rejected
        self.work.append(work.format(**self.words, b=b, c=f"{a} {op} {b} = {result}"))
        self.steps += 1
        return result

    def open(self, sentence: _Sentence) -> None:
        """Sets the first total."""
        rng = self.rng
        if not sentence.op:
            self.total = rng.randint(3, 30)
            self.add_sentence(sentence, self.total)
            return
        largest = 9 if sentence.op == "*" else 30
        a, b = rng.randint(2, largest), rng.randint(2, min(largest, 20))
        self.add_sentence(sentence, a, b)
        self.total = self.step(sentence.work, a, sentence.op, b)

    def change(self, sentence: _Sentence) -> None:
        """Changes the total in one step."""
        b = sentence.factor or self.rng.randint(2, 20)
        self.add_sentence(sentence, b)
        self.total = self.step(sentence.work, self.total, sentence.op, b)

    def parcels(self, sentence: _Sentence) -> None:
        """Changes the total in two steps."""
        a, b = self.rng.randint(2, 9), self.rng.randint(2, 9)
        self.add_sentence(sentence, a, b)
        content = self.step(sentence.work, a, "*", b)
        self.total = self.step("Now {n} has {c} {o}.", self.total, sentence.op, content)

    def price(self) -> None:
        """Sells everything, which ends the story."""
        b = self.rng.randint(2, 9)
        if self.total > 20:
            raise _Rejected
        self.add_sentence(_PRICE, b)
        self.total = self.step(_PRICE.work, self.total, "*", b)


def _draw_math(rng: random.Random) -> Problem | None:
    """A word problem of one to three steps, or None if a result is out of range."""
    wanted = rng.choice((1, 2, 2, 3, 3))
    story = _Story(rng)
    question = rng.choice(_QUESTIONS)
    try:
        story.open(rng.choice(_OPENINGS))
        while story.steps < wanted:
            if story.steps + 2 <= wanted and rng.random() < 0.25:
                story.parcels(rng.choice(_PARCELS))
            elif story.steps + 1 == wanted and rng.random() < 0.2:
                story.price()
                question = _PRICE_QUESTION
            else:
                story.change(rng.choice(_CHANGES))
    except _Rejected:
        return None
    answer = str(story.total)
    return Problem(
        task="math",
        prompt=" ".join([*story.text, question.format(**story.words)]),
        response=" ".join([*story.work, ANSWER_MARK, answer]),
        answer=answer,
        key="math " + " ".join(story.key),
    )


def _draw_reading(rng: random.Random) -> Problem:
    """A question about one of three to six facts, each of another relation and about one of three subjects or fewer."""
    people = rng.sample(_NAMES, rng.randint(1, 3))
    facts: list[str] = []
    questions: list[str] = []
    values: list[str] = []
    for relation in rng.sample(sorted(_RELATIONS), rng.randint(3, 6)):
        fact, question, choices = _RELATIONS[relation]
        subject = rng.choice(_THINGS if relation == "colour" else people)
        value = rng.choice(choices)
        facts.append(fact.format(s=subject, v=value))
        questions.append(question.format(s=subject))
        values.append(value)
    chosen = rng.randrange(len(facts))
    return Problem(
        task="reading",
        prompt=" ".join(["Read this.", *facts, questions[chosen]]),
        response=f"It says: {facts[chosen]} {ANSWER_MARK} {values[chosen]}",
        answer=values[chosen],
        key=" ".join(["reading", *sorted(facts), questions[chosen]]),
    )
