"""`caprese bench residual`: how much of a sparse FF block's error a low-rank correction takes away (figure 2).

The error of generated tokens is ||FF(X) - FF_sparse(X) - C||_F / ||FF(X)||_F, over all held-out tokens of a layer, and
then the mean over layers. The correction C of rank r is

- oracle: the best rank-r approximation of the error matrix E itself, of those very tokens, as in figure 2: what any
  correction of that rank could reach at most;
- trained: X L R by the closed form of eq. 7, fitted on other samples (of its nine ridges the one best here is taken):
  what a linear function of the block's input reaches.
"""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from caprese_serve.demo import MODEL
from caprese_serve.provenance import provenance

from ..results.plots import Plot
from ..results.recording import check_writable, progress, recording
from ..results.report import Columns, Result, Row, table, terminal
from .samples import load, numbers

if TYPE_CHECKING:
    from .error_moments import Case, CaseMethod, CaseSums

KEYS = ["section", "correction", "density", "rank"]
MEASURES = ["error"]
DENSITIES, QUICK_DENSITIES = "0.05,0.1,0.2,0.3,0.5,0.7,0.9", "0.1,0.5"
CORRECTIONS = ("oracle", "trained")
SECTIONS: dict[CaseMethod, str] = {"top-k": "oracle top-k of |z|", "griffin": "GRIFFIN", "cats": "CATS"}


def residual(
    model: Annotated[str, typer.Option(help="Model directory or Hub id.")] = str(MODEL),
    data: Annotated[
        str | None, typer.Option(help="File or dataset, as for `caprese distill`; default the demo's problems.")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Samples; a tenth is held out and measured.")] = 2000,
    densities: Annotated[str, typer.Option(help="Comma-separated shares of neurons kept.")] = DENSITIES,
    ranks: Annotated[str | None, typer.Option(help="Comma-separated; default 0 and powers of two up to D.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Indices as 0,1,2; default all. A few at a time for large models.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="200 samples, two densities.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows that are in --out already.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for residual.json, .csv and .html.")] = Path("out/bench"),
) -> None:
    """Relative FF output error over density and rank: oracle top-k, GRIFFIN and CATS, with oracle and trained L, R."""
    from caprese_distill.blocks import find_blocks

    from .error_moments import Case, run_cases

    check_writable(out)
    subject = load(model, data, min(samples, 200) if quick else samples)
    depth = subject.info.hidden_size
    chosen = [int(rank) for rank in numbers("--ranks", ranks, 0, depth)] if ranks else default_ranks(depth)
    kept = numbers("--densities", QUICK_DENSITIES if quick else densities, 0.001, 1)
    last = subject.info.num_hidden_layers - 1
    wanted = [int(i) for i in numbers("--layers", layers, 0, last)] if layers else range(last + 1)
    blocks = find_blocks(subject.model, subject.info, wanted)
    settings = {
        "model": subject.info.name_or_path,
        "data": Path(data).name if data and Path(data).exists() else data,
        "samples": len(subject.samples),
    }
    result = Result("residual", provenance() | {"settings": settings | {"layers": list(blocks)}}, KEYS, MEASURES)
    console = terminal()
    cases = [Case(method, density) for method in SECTIONS for density in kept]
    with recording(result, out, PLOTS, resume, console, COLUMNS) as record, progress(console) as bar:
        todo = [case for case in cases if not all(map(record.has, names(case, chosen)))]
        if todo:
            line = bar.add_task("tokens", total=subject.tokens)
            sums = run_cases(subject.model, blocks, subject.samples, todo, True, lambda n: bar.advance(line, n))
            held_out = next(iter(sums[wanted[0]].values())).held_out  # every layer and case sees the same tokens
            result.provenance["tokens_held_out"] = int(held_out.rows)
        line = bar.add_task("solutions", total=len(todo))
        for case in todo:
            record.add(*rows(case, [by_case[case] for by_case in sums.values()], chosen))
            bar.advance(line)
    for section, found in result.sections().items():
        console.print(table(section, found, COLUMNS))


def default_ranks(depth: int) -> list[int]:
    """0, and the powers of two up to D."""
    return [0, *(2**i for i in range(depth.bit_length()) if 2**i <= depth)]


def names(case: Case, ranks: list[int]) -> list[Row]:
    """The keys of the case's rows."""
    section, density = SECTIONS[case.method], case.density
    return [
        {"section": section, "correction": correction, "density": density, "rank": rank}
        for correction in CORRECTIONS
        for rank in ranks
    ]


def rows(case: Case, layers: list[CaseSums], ranks: list[int]) -> list[Row]:
    """A row a correction and rank; `layers` are the sums of each layer."""
    from .error_moments import fit_ranks

    errors: dict[tuple[str, int], list[float]] = {}
    for sums in layers:
        spectrum = sums.spectrum()
        fitted = fit_ranks(sums.fit, sums.held_out, ranks)
        for rank in ranks:
            for correction, error in zip(CORRECTIONS, (float(spectrum[rank:].sum()), fitted[rank].error), strict=True):
                errors.setdefault((correction, rank), []).append(sqrt(error / float(sums.held_out.yy)))
    made = []
    for name in names(case, ranks):
        found = errors[name["correction"], name["rank"]]
        made.append(
            name
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
