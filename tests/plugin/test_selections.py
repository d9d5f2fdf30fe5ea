"""Selections as they are shown: whose they are, in bins, merged over ranks, and only to those who may ask."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from caprese_kernels.config import Method
from caprese_vllm.route import MAX_ID, CapreseRoute
from caprese_vllm.selections import BINS, RECENT, RecentSelections, binned, find_named, merge_selections
from caprese_vllm.settings import EngineSettings

ID = "chatcmpl-0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize("engine_id", [ID, f"{ID}-89abcdef", f"0_{ID}-89abcdef"])
def test_a_request_is_found_by_its_whole_name(engine_id: str) -> None:
    others = [f"chatcmpl-{'f' * 32}-00000000", f"1_{ID}-89abcdef", f"{ID}x"]
    assert find_named([*others, engine_id], ID) == engine_id
    for name in ("", "chatcmpl", ID[:-1], ID[1:], f"{ID}-", "chatcmpl-.*", ".*", "(", f"{ID}|.*"):
        assert find_named([*others, engine_id], name) is None, name


def test_the_oldest_selections_are_dropped() -> None:
    recent = RecentSelections()
    for i in range(RECENT + 2):
        recent.add(str(i), torch.tensor([i]))
    assert recent.find("1") is None
    for i in (2, RECENT + 1):
        found = recent.find(str(i))
        assert found is not None
        assert found.item() == i


@pytest.mark.parametrize(("size", "bins"), [(8, 4), (10, 4), (3, 128), (1000, 128), (5, 1), (5, 0)])
def test_bins(size: int, bins: int) -> None:
    """Consecutive parts whose sizes differ by one at most, and the mean over all neurons is the mask's."""
    mask = torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.5
    found = binned(mask, bins)
    assert len(found) == max(1, min(size, bins))
    part = [j * len(found) // size for j in range(size)]
    sizes = [part.count(b) for b in range(len(found))]
    assert max(sizes) - min(sizes) <= 1
    for b, share in enumerate(found):
        inside = [bool(mask[j]) for j in range(size) if part[j] == b]
        assert share == pytest.approx(sum(inside) / len(inside))
    assert BINS == 128


def test_ranks_and_stages_are_merged() -> None:
    def part(rank: int, layer: int, tail: list[float]) -> dict[str, Any]:
        shown = {"neurons": 10, "core": [0.0] * len(tail), "tail": tail}
        return {"rank": rank, "method": "griffin", "layers": {layer: shown}}

    ranks = merge_selections([part(1, 0, [0.5, 1.0]), part(0, 0, [0.0, 0.25])])
    assert ranks == {
        "method": "griffin",
        "layers": [{"layer": 0, "neurons": 20, "core": [0.0] * 4, "tail": [0.0, 0.25, 0.5, 1.0]}],
    }
    stages = merge_selections([part(0, 1, [0.5]), part(0, 0, [0.25])])
    assert stages is not None
    assert [row["layer"] for row in stages["layers"]] == [0, 1]
    cats = [{"rank": rank, "method": "cats", "layers": {0: {"threshold": 0.5}}} for rank in (0, 1)]
    assert merge_selections(list(cats)) == {"method": "cats", "layers": [{"layer": 0, "threshold": 0.5}]}
    assert merge_selections([None, None]) is None


class Engine:
    """Knows one request, and notes what it was asked."""

    def __init__(self, shows: bool) -> None:
        method = Method("griffin", 0.5, (0,), 0)
        settings = EngineSettings(method, None, None, True, "auto", None, 512, 0, shows, None, 0)
        self.vllm_config = Namespace(additional_config={})
        settings.write(self.vllm_config)
        self.asked: list[str] = []

    async def collective_rpc(self, method: str, args: tuple[str, ...]) -> list[Any]:
        assert method == "caprese_selections"
        self.asked += args
        return [{"rank": 0, "method": "griffin", "layers": {}} if args == (ID,) else None]


def ask(engine: Engine, path: str, key: str | None = None, sent: str | None = None) -> httpx.Response:
    app, route = FastAPI(), CapreseRoute()
    route.attach_router(app)
    headers = {} if sent is None else {"Authorization": f"Bearer {sent}"}

    async def send() -> httpx.Response:
        await route.init_state(engine, app.state, Namespace(api_key=[key] if key else None))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(send())


def test_only_those_who_may_ask_get_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    shows, path = Engine(shows=True), f"/caprese/selections/{ID}"
    found = ask(shows, path)
    assert (found.status_code, found.json()) == (200, {"method": "griffin", "layers": []})
    assert ask(shows, path[:-1]).status_code == 404
    assert ask(shows, "/caprese/selections/").status_code == 404
    assert ask(shows, f"/caprese/selections/{'x' * (MAX_ID + 1)}").status_code == 422
    asked = len(shows.asked)
    assert [ask(shows, path, "key", sent).status_code for sent in (None, "wrong")] == [401, 401]
    assert len(shows.asked) == asked
    assert ask(shows, path, "key", "key").status_code == 200
    hides = Engine(shows=False)
    found = ask(hides, path)
    assert found.status_code == 404
    assert "--caprese-config.show_selections true" in found.json()["detail"]
    assert not hides.asked
