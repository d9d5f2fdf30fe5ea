"""What is compared, and the servers for it: each method with and without its adapter, and Full on any of them."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from caprese_kernels.adapters import find_adapter, read_config
from caprese_kernels.config import BaseModelInfo, CapreseConfig, Method, resolve
from caprese_kernels.errors import CapreseError
from caprese_serve.demo import run as demo
from caprese_serve.demo.results import Served
from caprese_serve.environment import versions
from caprese_serve.provenance import hardware_slug, source_digest
from caprese_serve.server import VllmServer, get_json

from ..paper.families import model_config

LABELS = {"griffin": "GRIFFIN", "cats": "CATS"}
OFF = {"vllm_xargs": {"caprese": "off"}}


@dataclass(frozen=True)
class Variant:
    """A method, or none: the original model, on a Caprese server that is told so with each request."""

    id: str
    label: str
    method: Method | None = None
    adapter: Path | None = None
    stage: str | None = None  # of the adapter's training

    @property
    def published(self) -> str:
        """The row of the paper's tables."""
        return f"{self.stage} caprese-{self.method.name}" if self.method and self.method.rank else self.id

    def flags(self) -> tuple[str, ...]:
        """What it adds to `vllm serve`."""
        if self.method is None:
            return ()
        if self.adapter is not None:
            return ("--caprese-weights", str(self.adapter))
        settings = {"method": self.method.name, "density": self.method.density, "layers": list(self.method.layers)}
        return ("--caprese-config", json.dumps(settings))


FULL = Variant("full", "Full")


@dataclass(frozen=True)
class Endpoint:
    """A server that runs, the name of its model, and where to look if it fails."""

    url: str
    model: str
    log: str

    def served(self) -> Served:
        return Served.model_validate(get_json(self.url, "/caprese", self.log))


@dataclass
class Bench:
    """A model and its variants, served by vLLM here, one server for each method and adapter, or elsewhere at `url`."""

    name: str
    model: str
    available: list[Variant]
    chosen: list[Variant]
    url: str | None = None
    flags: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)

    def identity(self, variant: Variant) -> dict[str, Any]:
        """All that the variant's answers depend on, beside prompt and sampling."""
        caprese: dict[str, Any] | str = "off"
        if (method := variant.method) is not None:
            caprese = {"method": method.name, "density": method.density, "layers": list(method.layers)}
            adapter = None if variant.adapter is None else hashlib.sha256(variant.adapter.read_bytes()).hexdigest()
            caprese |= {"rank": method.rank, "adapter": adapter}
        return {
            "model": self.name, "weights": _fingerprint(self.model), "flags": list(self.flags), "caprese": caprese,
            "source": source_digest(), "vllm": versions().get("vllm"), "hardware": hardware_slug(),
        }  # fmt: skip

    def servers(self) -> list[tuple[Variant, list[Variant]]]:
        """Each server's own variant, and all that it is asked: Full goes to the first one that is needed anyway."""
        sparse = [variant for variant in self.chosen if variant.method]
        plan = [(variant, [variant]) for variant in sparse] or [(self.available[-1], list[Variant]())]
        if FULL in self.chosen:
            plan[0][1].insert(0, FULL)
        return plan

    @contextmanager
    def serving(self, host: Variant, log: Path, seeded: bool, console: Console) -> Iterator[Endpoint]:
        """A server of this variant. `seeded`: requests will have seeds."""
        import torch

        if self.url is not None:
            yield Endpoint(self.url, _served_name(self.url), f"the log of {self.url}")
            return
        flags = self.flags
        if seeded and not torch.cuda.is_available():
            flags += ("--no-enable-chunked-prefill",)  # vLLM's CPU runner cannot wind a seeded generator back
        console.print(f"[bold]{host.label}[/bold]  [dim]{shlex.join(host.flags())}[/dim]", highlight=False)
        with VllmServer(self.model, *flags, *host.flags(), log=log, env=self.env, console=console) as server:
            yield Endpoint(server.url, _served_name(server.url), f"see {log}")


def bench_of(
    model: str | None, weights: Sequence[str], url: str | None, serve_args: str, variants: str | None
) -> Bench:
    """The demo's model with its two adapters, or `model` with those in `weights`; with `url`, what is served there.

    Without adapters there are the plain methods. `variants`: only these, comma-separated. CapreseError for an unknown
    one, and for an adapter of another model.
    """
    extra = tuple(shlex.split(serve_args))
    if url is not None:
        bench = _remote(url.rstrip("/"), model, weights)
    elif model is None:
        import torch

        device = () if torch.cuda.is_available() else ("--dtype", "float32")
        files = [Path(find_adapter(path)) for path in weights] or list(demo.ADAPTERS.values())
        found = _variants(str(demo.MODEL), files)
        flags = (*demo.FLAGS, *device, *extra)
        bench = Bench(demo.SERVED_NAME, str(demo.MODEL), found, found, None, flags, demo.ENV)
    else:
        found = _variants(model, [Path(find_adapter(path)) for path in weights])
        bench = Bench(model, model, found, found, None, extra)
    if variants is not None:
        bench.chosen = _chosen(bench.available, variants)
    return bench


def _chosen(available: Sequence[Variant], ids: str) -> list[Variant]:
    known = {variant.id: variant for variant in available}
    wanted = [id.strip() for id in ids.split(",")]
    for id in wanted:
        if id not in known:
            fix = "correct the list, or give the adapter with --weights"
            raise CapreseError("--variants", expected=f"of {','.join(known)}", found=repr(id), fix=fix)
    return [variant for id, variant in known.items() if id in wanted]


def _variants(model: str, adapters: Sequence[Path]) -> list[Variant]:
    """Full; each method plain, with density and layers of its first adapter; each adapter."""
    info = BaseModelInfo.from_hf(model_config(model), model)
    configs = {path: read_config(path) for path in adapters}
    found = [FULL]
    for name, label in LABELS.items():
        mine = [path for path in adapters if configs[path].method == name]
        if adapters and not mine:
            continue
        settings: dict[str, Any] = {"method": name}
        if mine:
            settings |= {"density": configs[mine[0]].density, "layers": configs[mine[0]].layers}
        found.append(Variant(name, label, resolve(CapreseConfig.model_validate(settings), None, info)[0]))
        stages = [str(configs[path].training.get("stage")) for path in mine]
        for number, (path, stage) in enumerate(zip(mine, stages, strict=True), start=1):
            method, _ = resolve(CapreseConfig.model_validate({"weights": str(path)}), configs[path], info)
            more = "" if len(mine) == 1 else stage if len(set(stages)) == len(mine) else str(number)
            id, told = f"caprese-{name}" + (f"-{more}" if more else ""), f"Caprese ({label})"
            found.append(Variant(id, told + (f", {more}" if more else ""), method, path, stage))
    return found


def _remote(url: str, model: str | None, weights: Sequence[str]) -> Bench:
    """Full and what GET /caprese tells; an adapter's file, if given, only to know its responses by."""
    served = Served.model_validate(get_json(url, "/caprese", "start it with Caprese enabled"))
    assert served.method is not None
    method = Method(served.method, served.density, tuple(served.layers), served.rank)  # type: ignore[arg-type]
    label, adapter, stage = LABELS[method.name], None, None
    if method.rank:
        adapter = Path(find_adapter(weights[0])) if weights else None
        stage = str(read_config(adapter).training.get("stage")) if adapter else None
        variant = Variant(f"caprese-{method.name}", f"Caprese ({label})", method, adapter, stage)
    else:
        variant = Variant(method.name, label, method)
    name = model or _served_model(url)["root"]
    return Bench(name, name, [FULL, variant], [FULL, variant], url)


def _served_model(url: str) -> dict[str, Any]:
    return get_json(url, "/v1/models", "start it as an OpenAI server")["data"][0]


def _served_name(url: str) -> str:
    return _served_model(url)["id"]


def _fingerprint(model: str) -> str | None:
    """What a local directory's weights are known by: sizes and first MiB of their files; None for a Hub id."""
    if not Path(model).is_dir():
        return None
    found = hashlib.sha256()
    for path in sorted(Path(model).glob("*.safetensors")) + sorted(Path(model).glob("config.json")):
        with path.open("rb") as file:
            found.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(2**20))
    return found.hexdigest()
