"""`caprese bench ablation`: accuracy of the demo model over density and rank (the paper's figure 5).

Every cell has adapters of its own: by the closed form of eq. 7, all from the sums of one pass over the training
problems, and with `--stage end-to-end` then trained by eq. 8. transformers decodes the answers
(hugging_face/decoding.py), which are the engine's. Rank 0 is the plain method. Accuracies are on held-out problems; +-
is one standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from caprese_kernels.config import DEFAULT_LAYERS, AdapterConfig, Method, MethodName, resolve_layers
from caprese_serve.demo import MODEL
from caprese_serve.provenance import provenance

from ..results.lists import names, numbers, one_name
from ..results.plots import Plot
from ..results.recording import Recording, check_writable, progress, recording
from ..results.report import Columns, Result, Row, show
from ..results.settings import ResumableSettings, options_of
from .samples import ModelWithSamples, load_model_with_samples

if TYPE_CHECKING:
    from rich.progress import Progress

    from caprese_distill.end_to_end.train import Recipe
    from caprese_kernels.adapters import Adapters
    from caprese_serve.demo.problems import Problem, Task

    from .error_moments import Case, CaseSums, Sums

KEYS = ["section", "stage", "density", "rank"]
MEASURES = ["math", "reading"]
STAGES = ("layer-wise", "end-to-end")
# From where the demo model loses nearly all accuracy to where it loses hardly any; CATS needs far fewer neurons.
DENSITIES: dict[MethodName, str] = {"griffin": "0.4,0.5,0.6,0.75", "cats": "0.02,0.05,0.1,0.25"}
QUICK: dict[MethodName, str] = {"griffin": "0.5,0.75", "cats": "0.05,0.25"}
TITLES: dict[MethodName, str] = {"griffin": "GRIFFIN", "cats": "CATS"}
FULL = "Full"


@dataclass(frozen=True, kw_only=True)
class AblationSettings(ResumableSettings):
    """Options of `caprese bench ablation`."""

    model: Annotated[str, typer.Option(help="Directory of a model that answers the demo's problems.")] = str(MODEL)
    methods: Annotated[str, typer.Option(help="Comma-separated, of griffin and cats.")] = "griffin,cats"
    densities: Annotated[
        str | None, typer.Option(help=f"Comma-separated. Default: {DENSITIES['griffin']} and {DENSITIES['cats']}.")
    ] = None
    ranks: Annotated[str, typer.Option(help="Comma-separated; 0 is the plain method.")] = "0,8,32,128"
    stage: Annotated[str, typer.Option(help="layer-wise or end-to-end.")] = "layer-wise"
    learning_rate: Annotated[
        float | None, typer.Option(help="Of the end-to-end stage. Default: as for `caprese distill`.")
    ] = None
    epochs: Annotated[int, typer.Option(min=1, help="Of the end-to-end stage.")] = 3
    samples: Annotated[int, typer.Option(min=20, help="Training problems.")] = 2000
    math: Annotated[int, typer.Option(min=1, help="Held-out word problems.")] = 1000
    reading: Annotated[int, typer.Option(min=1, help="Held-out reading questions.")] = 500
    quick: Annotated[bool, typer.Option("--quick", help="Two densities and ranks, few problems.")] = False


@options_of(AblationSettings)
def ablation(settings: AblationSettings) -> None:
    """Accuracy over density and rank, GRIFFIN and CATS, each cell with adapters of its own."""
    from caprese_distill.end_to_end.train import Recipe, default_learning_rate
    from caprese_serve.demo.problems import problems

    check_writable(settings.out)
    methods = cast("list[MethodName]", names("--methods", settings.methods, DENSITIES))
    one_name("--stage", settings.stage, STAGES)
    if settings.quick:
        settings = replace(settings, ranks="0,32", samples=min(settings.samples, 400), math=40, reading=20)
    subject = load_model_with_samples(settings.model, None, settings.samples)
    asked: dict[Task, list[Problem]] = {
        "math": list(problems("math", "test", settings.math)),
        "reading": list(problems("reading", "test", settings.reading)),
    }
    rate = settings.learning_rate or default_learning_rate(subject.info.hidden_size)
    default = QUICK if settings.quick else DENSITIES
    end_to_end = settings.stage == "end-to-end"
    grid = Grid(
        {name: numbers("--densities", settings.densities or default[name], 0.001, 1) for name in methods},
        [int(rank) for rank in numbers("--ranks", settings.ranks, 0, subject.info.hidden_size)],
        Recipe(rate, epochs=settings.epochs, gradient_checkpointing=False) if end_to_end else None,
    )
    recorded: dict[str, Any] = {
        "model": subject.info.name_or_path,
        "samples": settings.samples,
        "stage": settings.stage,
    }
    recorded |= {task: len(part) for task, part in asked.items()}
    if grid.recipe:
        recorded |= {"learning_rate": rate, "epochs": settings.epochs}
    result = Result("ablation", provenance() | {"settings": recorded}, KEYS, MEASURES)
    with recording(result, settings.out, plots, settings.resume, COLUMNS) as record, progress() as bar:
        measure(subject, grid, asked, record, bar)
    show(result, COLUMNS, settings.as_json)


@dataclass(frozen=True)
class Grid:
    """The cells: each method's densities times the ranks. `recipe` is that of the end-to-end stage, if it runs."""

    densities: dict[MethodName, list[float]]
    ranks: list[int]
    recipe: Recipe | None

    @property
    def stage(self) -> str:
        """The last stage of the adapters."""
        return "end-to-end" if self.recipe else "layer-wise"

    def cells(self) -> list[tuple[Case, int]]:
        """All pairs of a case (method and density) and a rank."""
        from .error_moments import Case

        cases = [Case(name, density) for name, densities in self.densities.items() for density in densities]
        return [(case, rank) for case in cases for rank in self.ranks]

    def key(self, case: Case, rank: int) -> Row:
        """The columns that name a cell's row."""
        name: MethodName = case.method  # type: ignore[assignment]
        return {"section": TITLES[name], "stage": self.stage, "density": case.density, "rank": rank}


def measure(
    subject: ModelWithSamples, grid: Grid, asked: Mapping[Task, list[Problem]], record: Recording, bar: Progress
) -> None:
    """Measure the original model and every cell that the record lacks."""
    from caprese_distill.blocks import find_blocks

    from .error_moments import run_cases

    def grade(ff: dict[int, Any]) -> Row:
        return grade_all(subject, asked, ff, bar)

    cells = grid.cells()
    todo = [cell for cell in cells if not record.has(grid.key(*cell))]
    if not record.has({"section": FULL}):
        record.add({"section": FULL} | grade({}))
    sums: Sums = {}
    cases = list(dict.fromkeys(case for case, rank in todo if rank))
    if cases:
        last = max(max(layers_of(case, subject)) for case in cases)
        blocks = find_blocks(subject.model, subject.info, range(last + 1))
        line = bar.add_task("moments, tokens", total=subject.tokens)
        sums = run_cases(subject.model, blocks, subject.samples, cases, False, lambda n: bar.advance(line, n))
    line = bar.add_task("cells", total=len(cells), completed=len(cells) - len(todo))
    for case, rank in todo:
        by_layer = {i: sums[i][case] for i in layers_of(case, subject)} if rank else {}
        method = Method(case.method, case.density, layers_of(case, subject), rank)  # type: ignore[arg-type]
        cell = _cell(subject, method, by_layer, grid.recipe, record.path.parent / "ablation", grade)
        record.add(grid.key(case, rank) | cell)
        bar.advance(line)
    order = [FULL, *TITLES.values()]  # a resumed run may have added densities and ranks
    record.result.rows.sort(key=lambda row: (order.index(row["section"]), row.get("density", 0), row.get("rank", 0)))


def layers_of(case: Case, subject: ModelWithSamples) -> tuple[int, ...]:
    """The layers that the case's method makes sparse."""
    return resolve_layers(DEFAULT_LAYERS[case.method], subject.info.num_hidden_layers)


def _cell(
    subject: ModelWithSamples,
    method: Method,
    sums: dict[int, CaseSums],
    recipe: Recipe | None,
    unfinished: Path,
    grade: Callable[[dict[int, Any]], Row],
) -> Row:
    """Figures of one cell: errors of its adapters, and answers. `unfinished` keeps an interrupted training."""
    from caprese_distill import checkpoint
    from caprese_distill.end_to_end.train import distill_end_to_end

    from ..hugging_face.decoding import SparseFF

    if not method.rank:
        return grade({i: SparseFF(method) for i in method.layers})
    adapters, remaining = layer_wise(subject, method, sums)
    trained: Row = {"remaining": remaining}
    if recipe is not None:
        kept = checkpoint.resume_path(unfinished)
        adapters = distill_end_to_end(subject.model, subject.samples, adapters, recipe, kept)
        checkpoint.remove(kept)
        found = adapters.config.training["end_to_end"]
        errors = found["held_out_errors"]
        trained |= {"hidden_error_before": errors[0], "hidden_error": errors[found["kept_epoch"]]}
    return trained | grade({i: SparseFF(method, adapters.left[i], adapters.right[i]) for i in method.layers})


def layer_wise(subject: ModelWithSamples, method: Method, sums: dict[int, CaseSums]) -> tuple[Adapters, float]:
    """(Adapters by the closed form, in float32; the share of the squared error that they leave, mean over layers)."""
    import torch

    from caprese_distill.layer_wise.solve import balance
    from caprese_kernels.adapters import Adapters

    from .error_moments import fit_ranks

    fitted = {i: fit_ranks(each.fit, each.held_out, [method.rank])[method.rank] for i, each in sums.items()}
    pairs = {i: balance(each.left, each.right) for i, each in fitted.items()}
    config = AdapterConfig(
        base_model=subject.info,
        method=method.name,
        density=method.density,
        rank=method.rank,
        layers=list(method.layers),
        training={"seconds": 0.0},  # the end-to-end stage adds its own
    )
    left, right = ({i: pair[n].to(torch.float32) for i, pair in pairs.items()} for n in (0, 1))
    return Adapters(config, left, right), mean(fitted[i].error / float(sums[i].held_out.ee) for i in sums)


def grade_all(subject: ModelWithSamples, asked: Mapping[Task, list[Problem]], ff: dict[int, Any], bar: Progress) -> Row:
    """Accuracy and standard error of each task, and the mean length of a response in tokens."""
    from ..hugging_face.decoding import decode, score

    row: Row = {}
    line = bar.add_task("problems", total=sum(map(len, asked.values())))
    for task, problems in asked.items():
        answers = decode(subject.model, subject.tokenizer, problems, ff, advance=lambda n: bar.advance(line, n))
        graded = score(subject.tokenizer, problems, answers)
        row |= {task: graded.accuracy, f"{task}_stderr": graded.stderr, f"{task}_tokens": mean(map(len, answers))}
    bar.remove_task(line)
    return row


def plots(result: Result) -> list[Plot]:
    """Accuracy of each task over density, a line for each rank; the level is the original model's accuracy."""
    full = next((row for row in result.rows if row["section"] == FULL), None)
    made = [
        Plot(
            title,
            "density",
            task,
            ("rank",),
            "density",
            f"accuracy, {task}",
            log2_x=True,
            error=f"{task}_stderr",
            percent=True,
        )
        for title in TITLES.values()
        for task in MEASURES
    ]
    return [replace(plot, level=full[plot.y]) for plot in made] if full else made


PERCENT = "{:.1%}".format
COLUMNS: Columns = {
    "density": ("density", "{:g}".format),
    "rank": ("rank", str),
    "error left": ("remaining", PERCENT),
    "hidden before": ("hidden_error_before", PERCENT),
    "hidden after": ("hidden_error", PERCENT),
    "math": ("math", PERCENT),
    "+-": ("math_stderr", PERCENT),
    "tokens": ("math_tokens", "{:.1f}".format),
    "reading": ("reading", PERCENT),
    "+- ": ("reading_stderr", PERCENT),
    "tokens ": ("reading_tokens", "{:.1f}".format),
}
