"""The variants of a model and servers for them: each method with and without its adapter, and Full on any server."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.text import Text

from caprese_kernels import terminal
from caprese_kernels.adapters import find_adapter, read_config
from caprese_kernels.config import BaseModelInfo, CapreseConfig, Method, resolve
from caprese_serve.demo import run as demo
from caprese_serve.demo.results import Served
from caprese_serve.environment import versions
from caprese_serve.provenance import hardware_slug, source_digest
from caprese_serve.server import VllmServer, get_json

from ..paper.families import model_config
from ..results.configured import check_new, parse_config
from ..results.lists import names

LABELS = {"griffin": "GRIFFIN", "cats": "CATS"}
OFF = {"vllm_xargs": {"caprese": "off"}}
METHOD_KEYS = ("density", "rank", "score", "prior", "core")  # of a Method, as GET /caprese names them


@dataclass(frozen=True)
class ServedVariant:
    """A method with or without an adapter; or Full, no method: a Caprese server with the request option `off`."""

    id: str
    label: str
    method: Method | None = None
    adapter: Path | None = None
    stage: str | None = None  # the last stage of the adapter's training
    settings: str = ""  # the keys of --caprese-config beside an adapter's own, as JSON

    @property
    def published(self) -> str | None:
        """The key of its row in the paper's tables, which know neither weighted scores nor priors."""
        if self.method is None:
            return self.id
        if self.method.weighted or self.method.needs_prior:
            return None
        return f"{self.stage} caprese-{self.method.name}" if self.method.rank else self.method.name

    @property
    def reselect_interval(self) -> int:
        """rho; 0 without reselection."""
        return (json.loads(self.settings).get("reselect_interval") or 0) if self.settings else 0

    def flags(self) -> tuple[str, ...]:
        """Its flags for `vllm serve`."""
        if self.method is None:
            return ()
        if self.adapter is not None:
            more = ("--caprese-config", self.settings) if self.settings else ()
            return ("--caprese-weights", str(self.adapter), *more)
        method = self.method
        settings = {"method": method.name, "density": method.density, "layers": list(method.layers)}
        return ("--caprese-config", json.dumps(settings | (json.loads(self.settings) if self.settings else {})))


FULL = ServedVariant("full", "Full")


@dataclass(frozen=True)
class Endpoint:
    """A running server, the name of its model, and where to look if it fails."""

    url: str
    model: str
    log: str
    api_key: str | None = field(default=None, repr=False)

    def served(self) -> Served:
        """What GET /caprese reports."""
        return Served.model_validate(get_json(self.url, "/caprese", self.log, self.api_key))


@dataclass(frozen=True)
class RemoteServer:
    """A running server that was given, and the key that it asks for."""

    url: str
    api_key: str | None = field(default=None, repr=False)

    def get(self, path: str, fix: str) -> dict[str, Any]:
        """The JSON that it returns at `path`."""
        return get_json(self.url, path, fix, self.api_key)


@dataclass
class ServedModel:
    """A model and its variants: one vLLM server for each method and adapter, started here, or the server `remote`."""

    name: str
    model: str
    available: list[ServedVariant]
    chosen: list[ServedVariant]
    remote: RemoteServer | None = None
    flags: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)

    def identity(self, variant: ServedVariant) -> dict[str, Any]:
        """Everything that the variant's answers depend on, besides prompt and sampling."""
        caprese: dict[str, Any] | str = "off"
        if (method := variant.method) is not None:
            caprese = {key: getattr(method, key) for key in METHOD_KEYS}
            adapter = None if variant.adapter is None else hashlib.sha256(variant.adapter.read_bytes()).hexdigest()
            caprese |= {"method": method.name, "layers": list(method.layers), "adapter": adapter}
            if variant.settings:
                caprese["settings"] = json.loads(variant.settings)
        return {
            "model": self.name, "weights": _fingerprint(self.model), "flags": list(self.flags), "caprese": caprese,
            "source": source_digest(), "vllm": versions().get("vllm"), "hardware": hardware_slug(),
        }  # fmt: skip

    def servers(self) -> list[tuple[ServedVariant, list[ServedVariant]]]:
        """(The variant that a server runs, the variants asked of it) for each server; Full is asked of the first."""
        sparse = [variant for variant in self.chosen if variant.method]
        plan = [(variant, [variant]) for variant in sparse] or [(self.available[-1], list[ServedVariant]())]
        if FULL in self.chosen:
            plan[0][1].insert(0, FULL)
        return plan

    @contextmanager
    def serving(self, host: ServedVariant, log: Path, seeded: bool) -> Iterator[Endpoint]:
        """A server that runs `host`. `seeded` says whether requests will have seeds."""
        import torch

        if (remote := self.remote) is not None:
            yield Endpoint(remote.url, _served_model(remote)["id"], f"the log of {remote.url}", remote.api_key)
            return
        flags = self.flags
        if seeded and not torch.cuda.is_available():
            flags += ("--no-enable-chunked-prefill",)  # vLLM's CPU runner cannot rewind a seeded generator
        console = terminal.notes()
        console.print(Text.assemble((host.label, "bold"), "  ", (shlex.join(host.flags()), "dim")))
        with VllmServer(self.model, *flags, *host.flags(), log=log, env=self.env, console=console) as server:
            here = RemoteServer(server.url, server.api_key)
            yield Endpoint(server.url, _served_model(here)["id"], f"see {log}", server.api_key)


def load_served_model(
    model: str | None,
    weights: Sequence[str],
    remote: RemoteServer | None,
    serve_args: str,
    variants: str | None,
    configs: Sequence[str] = (),
) -> ServedModel:
    """The demo's model with its two adapters, or `model` with the adapters `weights`; with `remote` what it serves.

    Variants are Full, the plain methods, the adapters, and each NAME=JSON of `configs`; without `weights` the plain
    methods only if `configs` is empty. `variants` is a comma-separated choice of them. Raises CapreseError for an
    unknown variant, and for an adapter of another model.
    """
    extra = tuple(shlex.split(serve_args))
    if remote is not None:
        served = _remote(remote, model, weights)
    elif model is None:
        import torch

        device = () if torch.cuda.is_available() else ("--dtype", "float32")
        found = _variants(str(demo.MODEL), list(weights) or list(map(str, demo.ADAPTERS.values())), configs)
        flags = (*demo.FLAGS, *device, *extra)
        served = ServedModel(demo.SERVED_NAME, str(demo.MODEL), found, found, None, flags, demo.ENV)
    else:
        found = _variants(model, weights, configs)
        served = ServedModel(model, model, found, found, None, extra)
    if variants is not None:
        known = {variant.id: variant for variant in served.available}
        ids = names("--variants", variants, known, "correct the list, or give the adapter with --weights")
        served.chosen = [variant for id, variant in known.items() if id in ids]
    return served


def _variants(model: str, weights: Sequence[str], configs: Sequence[str]) -> list[ServedVariant]:
    info = BaseModelInfo.from_hf(model_config(model), model)
    found = [FULL]
    if weights or not configs:
        found += _of_methods([Path(find_adapter(path)) for path in weights], info)
    for text in configs:
        variant = _of_config(text, info)
        check_new(variant.id, [other.id for other in found])
        found.append(variant)
    return found


def _of_methods(adapters: Sequence[Path], info: BaseModelInfo) -> list[ServedVariant]:
    """Each method plain, with the density and layers of its first adapter; and each adapter."""
    configs, found = {path: read_config(path) for path in adapters}, []
    for name, label in LABELS.items():
        own = [path for path in adapters if configs[path].method == name]
        if adapters and not own:
            continue
        settings: dict[str, Any] = {"method": name}
        if own:
            settings |= {"density": configs[own[0]].density, "layers": configs[own[0]].layers}
        found.append(ServedVariant(name, label, resolve(CapreseConfig.model_validate(settings), None, info)[0]))
        stages = [str(configs[path].training.get("stage")) for path in own]
        stems, numbers = [path.stem for path in own], [str(number) for number in range(1, len(own) + 1)]
        different = next(texts for texts in (stages, stems, numbers) if len(set(texts)) == len(own))
        for path, stage, text in zip(own, stages, different, strict=True):
            method, _ = resolve(CapreseConfig.model_validate({"weights": str(path)}), configs[path], info)
            more = "" if len(own) == 1 else text
            id, title = f"caprese-{name}" + (f"-{more}" if more else ""), f"Caprese ({label})"
            found.append(ServedVariant(id, title + (f", {more}" if more else ""), method, path, stage))
    return found


def _of_config(text: str, info: BaseModelInfo) -> ServedVariant:
    """The variant of a NAME=JSON."""
    given = parse_config(text, info)
    stage = None if given.adapter_config is None else str(given.adapter_config.training.get("stage"))
    settings = json.dumps(given.settings) if given.settings else ""
    return ServedVariant(given.name, given.name, given.method, given.adapter, stage, settings)


def _remote(remote: RemoteServer, model: str | None, weights: Sequence[str]) -> ServedModel:
    """Full and what GET /caprese reports. An adapter's file, if given, only identifies its responses."""
    served = Served.model_validate(remote.get("/caprese", "start it with Caprese enabled"))
    assert served.method is not None
    more = {key: getattr(served, key) for key in METHOD_KEYS}
    method = Method(name=served.method, layers=tuple(served.layers), **more)  # type: ignore[arg-type]
    label, adapter, stage = LABELS[method.name], None, None
    if method.rank or method.needs_prior:
        adapter = Path(find_adapter(weights[0])) if weights else None
        stage = str(read_config(adapter).training.get("stage")) if adapter else None
        variant = ServedVariant(f"caprese-{method.name}", f"Caprese ({label})", method, adapter, stage)
    else:
        variant = ServedVariant(method.name, label, method)
    name = model or _served_model(remote)["root"]
    return ServedModel(name, name, [FULL, variant], [FULL, variant], remote)


def _served_model(remote: RemoteServer) -> dict[str, Any]:
    return remote.get("/v1/models", "start it as an OpenAI server")["data"][0]


def _fingerprint(model: str) -> str | None:
    """A digest of a local directory's weights, from sizes and first MiB of their files; None for a Hub id."""
    if not Path(model).is_dir():
        return None
    found = hashlib.sha256()
    for path in sorted(Path(model).glob("*.safetensors")) + sorted(Path(model).glob("config.json")):
        with path.open("rb") as file:
            found.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(2**20))
    return found.hexdigest()
