"""`caprese bench residual`: how much of a sparse FF block's error a low-rank correction removes (figure 2).

The error of generated tokens is ||FF(X) - FF_sparse(X) - C||_F / ||FF(X)||_F over all held-out tokens of a layer, then
the mean over layers. The correction C of rank r is

- oracle: the best rank-r approximation of the error matrix E of these very tokens, as in figure 2: a bound for any
  correction of that rank;
- trained: X L R by the closed form of eq. 7, fitted on other samples (with the best of its nine ridges on these): what
  a linear function of the block's input reaches.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from caprese_serve.demo import MODEL
from caprese_serve.provenance import provenance

from ..results.lists import numbers
from ..results.plots import Plot
from ..results.recording import check_writable, progress, recording
from ..results.report import Columns, Result, Row, show
from ..results.settings import ResumableSettings, options_of
from .samples import load_model_with_samples

if TYPE_CHECKING:
    from .error_moments import Case, CaseMethod, CaseSums

KEYS = ["section", "correction", "density", "rank"]
MEASURES = ["error"]
DENSITIES, QUICK_DENSITIES = "0.05,0.1,0.2,0.3,0.5,0.7,0.9", "0.1,0.5"
CORRECTIONS = ("oracle", "trained")
SECTIONS: dict[CaseMethod, str] = {"top-k": "oracle top-k of |z|", "griffin": "GRIFFIN", "cats": "CATS"}


@dataclass(frozen=True, kw_only=True)
class ResidualSettings(ResumableSettings):
    """Options of `caprese bench residual`."""

    model: Annotated[str, typer.Option(help="Model directory or Hub id.")] = str(MODEL)
    data: Annotated[
        str | None, typer.Option(help="File or dataset, as for `caprese distill`. Default: the demo's problems.")
    ] = None
    samples: Annotated[int, typer.Option(min=2, help="Samples; a tenth is held out and measured.")] = 2000
    densities: Annotated[str, typer.Option(help="Comma-separated shares of neurons kept.")] = DENSITIES
    ranks: Annotated[str | None, typer.Option(help="Comma-separated. Default: 0 and the powers of two up to D.")] = None
    layers: Annotated[
        str | None, typer.Option(help="Indices, for example 0,1,2. Default: all; use a few at a time for large models.")
    ] = None
    quick: Annotated[bool, typer.Option("--quick", help="200 samples, two densities.")] = False


@options_of(ResidualSettings)
def residual(settings: ResidualSettings) -> None:
    """Relative FF output error over density and rank: oracle top-k, GRIFFIN and CATS, with oracle and trained L, R."""
    from caprese_distill.blocks import find_blocks

    from .error_moments import Case, run_cases

    check_writable(settings.out)
    data = settings.data
    count = min(settings.samples, 200) if settings.quick else settings.samples
    subject = load_model_with_samples(settings.model, data, count)
    depth, last = subject.info.hidden_size, subject.info.num_hidden_layers - 1
    ranks = (
        [int(rank) for rank in numbers("--ranks", settings.ranks, 0, depth)] if settings.ranks else default_ranks(depth)
    )
    densities = numbers("--densities", QUICK_DENSITIES if settings.quick else settings.densities, 0.001, 1)
    layers = [int(i) for i in numbers("--layers", settings.layers, 0, last)] if settings.layers else range(last + 1)
    blocks = find_blocks(subject.model, subject.info, layers)
    recorded = {
        "model": subject.info.name_or_path,
        "data": Path(data).name if data and Path(data).exists() else data,
        "samples": len(subject.samples),
        "layers": list(blocks),
    }
    result = Result("residual", provenance() | {"settings": recorded}, KEYS, MEASURES)
    cases = [Case(method, density) for method in SECTIONS for density in densities]
    with recording(result, settings.out, PLOTS, settings.resume, COLUMNS) as record, progress() as bar:
        todo = [case for case in cases if not all(map(record.has, keys(case, ranks)))]
        if todo:
            line = bar.add_task("tokens", total=subject.tokens)
            sums = run_cases(subject.model, blocks, subject.samples, todo, True, lambda n: bar.advance(line, n))
            held_out = next(iter(sums[layers[0]].values())).held_out  # the same tokens for every layer and case
            result.provenance["tokens_held_out"] = int(held_out.rows)
        line = bar.add_task("solutions", total=len(todo))
        for case in todo:
            record.add(*rows(case, [by_case[case] for by_case in sums.values()], ranks))
            bar.advance(line)
    show(result, COLUMNS, settings.as_json)


def default_ranks(depth: int) -> list[int]:
    """0 and the powers of two up to D."""
    return [0, *(2**i for i in range(depth.bit_length()) if 2**i <= depth)]


def keys(case: Case, ranks: list[int]) -> list[Row]:
    """The columns that name the case's rows."""
    section, density = SECTIONS[case.method], case.density
    return [
        {"section": section, "correction": correction, "density": density, "rank": rank}
        for correction in CORRECTIONS
        for rank in ranks
    ]


def rows(case: Case, layers: list[CaseSums], ranks: list[int]) -> list[Row]:
    """A row for each correction and rank, from the sums of each layer."""
    from .error_moments import fit_ranks

    errors: dict[tuple[str, int], list[float]] = {}
    for sums in layers:
        spectrum = sums.spectrum()
        fitted = fit_ranks(sums.fit, sums.held_out, ranks)
        for rank in ranks:
            for correction, error in zip(CORRECTIONS, (float(spectrum[rank:].sum()), fitted[rank].error), strict=True):
                errors.setdefault((correction, rank), []).append(sqrt(error / float(sums.held_out.yy)))
    made = []
    for key in keys(case, ranks):
        found = errors[key["correction"], key["rank"]]
        made.append(
            key
            | {
                "error": sum(found) / len(found),
                "error_best_layer": min(found),
                "error_worst_layer": max(found),
            }
        )
    return made


COLUMNS: Columns = {
    "correction": ("correction", str),
    "density": ("density", "{:g}".format),
    "rank": ("rank", str),
    "error": ("error", "{:.1%}".format),
    "best layer": ("error_best_layer", "{:.1%}".format),
    "worst layer": ("error_worst_layer", "{:.1%}".format),
}
PLOTS = [
    Plot(section, "density", "error", ("rank",), "density", "relative FF output error", "correction", percent=True)
    for section in SECTIONS.values()
]
