"""Ray workers that die, with their nodes or alone, in 500 random orders of events: right results, or one line.

Ray is simulated: one event after another, in an order that is drawn. Where Ray would wait without end, the test fails.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from caprese_distill.scale import pool as workers_pool
from caprese_distill.scale.pool import Pool
from caprese_kernels.errors import CapreseError


class RayError(Exception):
    """Ray's word for whatever it does not owe to the function that it runs."""


class RayTaskError(RayError):
    def __init__(self, cause: Exception):
        super().__init__(str(cause))
        self.cause = cause


@dataclass(eq=False)
class Actor:
    """A process that has a place in the cluster or waits for one, and its calls in their order."""

    ray: FakeRay
    placed: bool = False
    dead: bool = False
    calls: list[tuple[object, Callable[[], Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = SimpleNamespace(remote=lambda: self.call(lambda: None))
        self.run = SimpleNamespace(remote=lambda function, job: self.call(lambda: function(None, *job)))

    def call(self, work: Callable[[], Any]) -> object:
        result = object()
        self.calls.append((result, work))
        if self.dead:
            self.die()
        return result

    def die(self) -> None:
        self.dead = True
        for result, _ in self.calls:
            self.ray.done[result] = RayError("The actor died.\nIts node was lost.")
        self.calls.clear()


class FakeRay(ModuleType):
    """`places` processes fit; a call kills its process with probability `deaths`, and its node with `losses`."""

    def __init__(self, draw: random.Random, places: int, deaths: float, losses: float):
        super().__init__("ray")
        self.draw, self.places, self.deaths, self.losses = draw, places, deaths, losses
        self.actors: list[Actor] = []
        self.done: dict[object, Any] = {}
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def remote(self, _: type) -> Any:
        def options(*, max_restarts: int, **__: Any) -> Any:
            assert max_restarts == 0  # Ray's own replacement would wait for a place without end
            return SimpleNamespace(remote=self.make)

        return SimpleNamespace(options=options)

    def make(self, _: object) -> Actor:
        self.actors.append(Actor(self))
        return self.actors[-1]

    def kill(self, actor: Actor) -> None:
        actor.die()

    def get(self, result: object) -> Any:
        value = self.done[result]
        if isinstance(value, Exception):
            raise value
        return value

    def wait(self, results: Sequence[object], num_returns: int, timeout: float | None) -> tuple[list[object], object]:
        while not (found := [result for result in results if result in self.done]):
            if not self.step():
                assert timeout is not None, "it would wait without end"
                return [], results
        return found[:num_returns], None

    def step(self) -> bool:
        """One event; False if none can come."""
        alive = [actor for actor in self.actors if not actor.dead]
        for actor in alive:
            actor.placed = actor.placed or sum(other.placed for other in alive) < self.places
        busy = [actor for actor in alive if actor.placed and actor.calls]
        if not busy:
            return False
        actor = self.draw.choice(busy)
        lost = self.draw.random() < self.losses
        if lost or self.draw.random() < self.deaths:
            self.places -= lost
            actor.die()
            return True
        result, work = actor.calls.pop(0)
        try:
            self.done[result] = work()
        except ValueError as error:
            self.done[result] = RayTaskError(error)
        return True


def square(_: object, number: int) -> int:
    return number * number


def refuse(_: object, number: int) -> int:
    raise ValueError(f"job {number}")


@pytest.mark.parametrize("losses", [0.0, 0.1])
@pytest.mark.parametrize("deaths", [0.0, 0.05, 0.5])
def test_random_orders(monkeypatch: pytest.MonkeyPatch, deaths: float, losses: float) -> None:
    lines: list[str] = []
    ends = {"done": 0, "expected one that": 0, "expected a place": 0}
    for seed in range(500):
        draw = random.Random(seed)
        ray, count, jobs = FakeRay(draw, draw.randint(1, 4), deaths, losses), draw.randint(1, 4), draw.randint(1, 30)
        monkeypatch.setitem(sys.modules, "ray", ray)
        found: list[int] = []
        given = 0

        def numbers(jobs: int = jobs) -> Iterator[tuple[int]]:
            nonlocal given
            for given in range(1, jobs + 1):
                yield (given,)

        pool = Pool(lambda: None, count, {"CPU": 1})
        try:
            for value in pool.map(square, numbers()):
                found.append(value)
                assert given <= len(found) + 2 * count
            assert len(found) == jobs
            ends["done"] += 1
        except CapreseError as error:
            said = str(error)
            (kind,) = (kind for kind in ends if kind in said)
            ends[kind] += 1
            lines.append(said)
        assert found == [n * n for n in range(1, len(found) + 1)]  # in their order, none twice, up to the end
        pool.close()
        assert all(actor.dead for actor in ray.actors)
    assert not [said for said in lines if "\n" in said or "the same command continues from the" not in said]
    assert ends["done"] > 0
    assert (ends["expected one that"] > 0) == (deaths > 0.4)
    assert (ends["expected a place"] > 0) == (losses > 0)


def test_an_error_of_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised as it is, and the workers are there for the next call."""
    monkeypatch.setitem(sys.modules, "ray", FakeRay(random.Random(0), 2, 0.0, 0.0))
    pool = Pool(lambda: None, 2, {"CPU": 1})
    with pytest.raises(ValueError, match=r"^job \d$"):
        list(pool.map(refuse, ((n,) for n in range(5))))
    assert pool.call(square, 3) == 9


def test_a_job_that_kills_every_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay(random.Random(0), 1, 1.0, 0.0))
    attempts = 1 + workers_pool.RETRIES
    with pytest.raises(CapreseError, match=rf"starts in {attempts} attempts; found Its node was lost\."):
        Pool(lambda: None, 1, {"CPU": 1}).call(square, 3)
