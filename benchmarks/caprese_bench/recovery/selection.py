"""`caprese bench selection`: what a selection costs without L, R, over score, prior, core, density, layers and domains.

Each row compares the sparse model's next-token distribution with the original's on given responses, teacher-forced:
KL(original || sparse) in nats and the share of tokens whose most likely successor stays the same, means over samples
with their standard errors. Priors come from other samples of one domain, or from the same number of each (mixture).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from caprese_kernels.config import DEFAULT_DENSITY, Method
from caprese_kernels.errors import CapreseError
from caprese_serve.provenance import provenance

from ..results.lists import names, numbers
from ..results.plots import Plot
from ..results.recording import Recording, check_writable, progress, recording
from ..results.report import Columns, Result, Row, show
from ..results.settings import ResumableSettings, options_of
from ..results.stats import mean, standard_error
from .domains import domain_rows

if TYPE_CHECKING:
    from torch import Tensor, nn

    from caprese_distill.data.samples import Sample
    from caprese_kernels.config import BaseModelInfo

KEYS = ["section", "density", "score", "prior", "core", "prior_data", "data"]
MEASURES = ["kl", "agreement"]
MIXTURE = "mixture"
SECTIONS = {"first-half": "first half of the layers sparse", "all": "all layers sparse"}
AT_ONCE = 8  # selections measured beside one pass of the original model, whose logits they share


@dataclass(frozen=True)
class Case:
    """A selection, and where its prior comes from; None: it has no prior."""

    layers: str
    density: float
    score: str
    prior: float
    core: float
    prior_data: str | None

    def key(self, data: str) -> Row:
        """The columns that name its row on `data`."""
        found = {"section": SECTIONS[self.layers], "density": self.density, "score": self.score}
        return found | {"prior": self.prior, "core": self.core, "prior_data": self.prior_data, "data": data}

    def method(self, num_layers: int) -> Method:
        """GRIFFIN with these settings, without L, R, for a model of `num_layers` layers."""
        sparse = range(num_layers if self.layers == "all" else num_layers // 2)
        score: Any = self.score
        return Method("griffin", self.density, tuple(sparse), 0, score, self.prior, self.core)


@dataclass(frozen=True, kw_only=True)
class SelectionSettings(ResumableSettings):
    """Options of `caprese bench selection`."""

    model: Annotated[str, typer.Option(help="Model directory or Hub id.")]
    data: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=SOURCE",
            help="A domain: a file or dataset, as for `caprese distill`; code and prose need no source. May be "
            "repeated.",
        ),
    ]
    samples: Annotated[int, typer.Option(min=1, help="Samples of each domain that are measured.")] = 8
    prior_samples: Annotated[int, typer.Option(min=1, help="Other samples of each domain, for its prior.")] = 16
    max_length: Annotated[int, typer.Option(min=16, help="Longer samples are left out.")] = 512
    layers: Annotated[str, typer.Option(help="Comma-separated, of first-half and all.")] = "first-half,all"
    densities: Annotated[str, typer.Option(help="Comma-separated shares of neurons kept.")] = f"{DEFAULT_DENSITY:g}"
    priors: Annotated[str, typer.Option(help="Comma-separated weights lambda of the prior.")] = "0,0.5,0.75"
    cores: Annotated[str, typer.Option(help="Comma-separated shares kappa of the core.")] = "0,0.5,0.8,1"
    seed: Annotated[int, typer.Option(help="Seed of the drawn samples.")] = 0


@options_of(SelectionSettings)
def selection(settings: SelectionSettings) -> None:
    """What a selection costs without L, R: KL and agreement over score, prior, core, density, layers and domains."""
    from caprese_distill.blocks import find_blocks

    check_writable(settings.out)
    sources = dict(_source(text) for text in settings.data)
    layers = names("--layers", settings.layers, SECTIONS)
    densities = numbers("--densities", settings.densities, 0.001, 1)
    priors, cores = numbers("--priors", settings.priors, 0, 1), numbers("--cores", settings.cores, 0, 1)
    loaded = _load(settings, sources)
    model, info, held = loaded.model, loaded.info, loaded.held
    blocks = find_blocks(model, info, tuple(range(info.num_hidden_layers)))
    asked = {
        "model": Path(settings.model).name,
        "model_identity": loaded.identity,
        "data": {name: Path(source).name or "built in" for name, source in sources.items()},
        "data_sha256": loaded.data,
        "samples": settings.samples,
        "prior_samples": settings.prior_samples,
        "max_length": settings.max_length,
        "seed": settings.seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }
    result = Result("selection", provenance() | {"settings": asked}, KEYS, MEASURES)
    cases = list(_cases(layers, densities, priors, cores, list(sources)))
    with recording(result, settings.out, PLOTS, settings.resume, COLUMNS) as record, progress() as bar:
        todo = {name: [case for case in cases if not record.has(case.key(name))] for name in sources}
        if any(todo.values()):
            measurement = Measurement(model, blocks, _priors(model, info, loaded.fit, bar))
            line = bar.add_task("selections", total=sum(map(len, todo.values())))
            for name, missing in todo.items():
                for part in _parts(missing):
                    measurement.add_rows(record, name, held[name], part)
                    bar.advance(line, len(part))
    show(result, COLUMNS, settings.as_json)


def _source(text: str) -> tuple[str, str]:
    name, _, source = text.partition("=")
    if not name or name == MIXTURE:
        raise CapreseError(
            "--data", expected=f"NAME=SOURCE, NAME other than {MIXTURE}", found=repr(text), fix="correct the option"
        )
    return name, source


def _cases(
    layers: Sequence[str], densities: Sequence[float], priors: Sequence[float], cores: Sequence[float],
    domains: Sequence[str],
) -> Iterator[Case]:  # fmt: skip
    """The paper's selection, the weighted one, and those with a prior or a core from each source of priors.

    A core of all neurons leaves nothing to blend, so lambda has no effect there, and it stands once.
    """
    origins = [MIXTURE, *domains] if len(domains) > 1 else list(domains)
    for part, density in product(layers, densities):
        yield Case(part, density, "paper", 0.0, 0.0, None)
        yield Case(part, density, "weighted", 0.0, 0.0, None)
        for prior, core in product(priors, cores):
            if not prior and not core:
                continue
            if core == 1 and prior != priors[-1]:
                continue
            for origin in origins if core in (cores[0], cores[-1]) else origins[:1]:
                yield Case(part, density, "weighted", prior, core, origin)


def _parts(cases: Sequence[Case]) -> Iterator[list[Case]]:
    remaining = iter(cases)
    while part := list(islice(remaining, AT_ONCE)):
        yield part


@dataclass(frozen=True)
class Loaded:
    """The model in float32, its dimensions, each domain's samples, and what identifies model and data."""

    model: Any
    info: BaseModelInfo
    identity: str
    fit: dict[str, list[Sample]]  # for its prior
    held: dict[str, list[Sample]]  # to be measured
    data: dict[str, str]  # a digest of provenance and rows


def _load(settings: SelectionSettings, sources: Mapping[str, str]) -> Loaded:
    from caprese_distill.data.chat import ChatRenderer
    from caprese_distill.data.responses import model_identity
    from caprese_distill.data.samples import encode
    from caprese_distill.data.templates import stop_ids
    from caprese_distill.loading import find_device, load_model_on, load_small_parts
    from caprese_kernels.config import BaseModelInfo

    config, tokenizer = load_small_parts(settings.model)
    wanted = settings.samples + settings.prior_samples
    renderer = ChatRenderer(tokenizer, stop_ids=stop_ids(settings.model, config))
    fit, held, data = {}, {}, {}
    for name, source in sources.items():
        rows, read = domain_rows(name, source, 2 * wanted, settings.seed)
        text = json.dumps([read, [asdict(row) for row in rows]], sort_keys=True, default=str)
        data[name] = hashlib.sha256(text.encode()).hexdigest()
        found, skipped = encode(renderer, rows, settings.max_length)
        if len(found) < wanted:
            raise CapreseError(
                f"samples of {name}",
                expected=f"{wanted} of at most {settings.max_length} tokens",
                found=f"{len(found)} ({dict(skipped)})",
                fix="give more data, fewer samples, or a higher --max-length",
            )
        fit[name], held[name] = found[: settings.prior_samples], found[settings.prior_samples : wanted]
    info = BaseModelInfo.from_hf(config, Path(settings.model).name)
    model = load_model_on(settings.model, "float32", find_device("auto"))
    return Loaded(model, info, model_identity(settings.model, config), fit, held, data)


def _priors(
    model: Any, info: BaseModelInfo, fit: Mapping[str, Sequence[Sample]], bar: Any
) -> dict[str, dict[int, Tensor]]:
    """Priors of the weighted score by where they come from: each domain, and the mean of all."""
    import torch

    from caprese_distill.prior import collect_priors

    found = {}
    line = bar.add_task("priors", total=len(fit))
    method = Method("griffin", DEFAULT_DENSITY, tuple(range(info.num_hidden_layers)), 0, "weighted", 0.5)
    for name, samples in fit.items():
        found[name] = collect_priors(model, samples, info, method)
        bar.advance(line)
    return found | {MIXTURE: {i: torch.stack([own[i] for own in found.values()]).mean(dim=0) for i in method.layers}}


@dataclass(frozen=True)
class Measurement:
    """Measures cases on one model."""

    model: Any
    blocks: Mapping[int, nn.Module]
    priors: Mapping[str, Mapping[int, Tensor]]

    def add_rows(self, record: Recording, data: str, samples: Sequence[Sample], cases: Sequence[Case]) -> None:
        """Measure the cases on the samples of a domain, and record a row for each."""
        from caprese_distill.quality import SparseLayers, measure
        from caprese_distill.selection import selectors_of

        variants = {}
        for number, case in enumerate(cases):
            own = self.priors.get(case.prior_data or "", {})
            variants[str(number)] = SparseLayers(selectors_of(self.blocks, case.method(len(self.blocks)), own))
        # Sample by sample, for the standard error.
        found = [measure(self.model, self.blocks, [sample], variants) for sample in samples]
        for number, case in enumerate(cases):
            each = [by_case[str(number)] for by_case in found]
            kls, agreed = [quality.kl for quality in each], [quality.agreement for quality in each]
            figures = {"kl": mean(kls), "kl_stderr": standard_error(kls)}
            figures |= {"agreement": mean(agreed), "agreement_stderr": standard_error(agreed)}
            figures |= {"tokens": sum(quality.tokens for quality in each), "samples": len(each)}
            record.add(case.key(data) | figures)


COLUMNS: Columns = {
    "asked about": ("data", str),
    "prior of": ("prior_data", str),
    "density": ("density", "{:g}".format),
    "score": ("score", str),
    "lambda": ("prior", "{:g}".format),
    "kappa": ("core", "{:g}".format),
    "KL": ("kl", "{:.3f}".format),
    "±": ("kl_stderr", "{:.3f}".format),
    "agreement": ("agreement", "{:.1%}".format),
    "± ": ("agreement_stderr", "{:.1%}".format),
}
PLOTS = [
    Plot(section, "core", "kl", ("data", "prior"), "share of the core", "KL (nats)", "asked about, lambda")
    for section in SECTIONS.values()
]
