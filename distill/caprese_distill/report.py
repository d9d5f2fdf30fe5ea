"""What `caprese distill` prints at its end."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from caprese_kernels.adapters import Adapters


def report(adapters: Adapters, output: Path) -> None:
    """Errors of every layer on held-out samples, those of the whole model, and the file."""
    config, training = adapters.config, adapters.config.training
    console = Console()
    table = Table(
        title=f"{config.method}, density {config.density:g}, rank {config.rank}, layer-wise by {training['solver']}, "
        "held-out samples"
    )
    for column in ("layer", "||E||²/||FF||²", "with L R", "remaining", "remaining (fitted)", "ridge"):
        table.add_column(column, justify="right")
    for layer, row in training["errors"].items():
        parts = [f"{row[key]:.1%}" for key in ("error_before", "error_after", "remaining", "remaining_fit")]
        table.add_row(layer, *parts, "-" if row["ridge"] is None else f"{row['ridge']:g}")
    console.print(table)
    if "end_to_end" in training:
        errors = training["end_to_end"]["held_out_errors"]
        told = ", ".join(f"epoch {n}: {error:.2%}" for n, error in enumerate(errors))
        console.print(f"last hidden state, ||M - M_student||²/||M||² on held-out samples: {told}")
        if errors[-1] > errors[0]:
            console.print("end-to-end training made it worse: give a lower --learning-rate, or --stage layer-wise")
    size = output.stat().st_size / 2**20
    tokens = f"{training['samples']} samples, {training['tokens']:,} response tokens, {training['seconds']:g} s"
    console.print(f"wrote {output} ({size:.1f} MiB, {str(adapters.dtype).removeprefix('torch.')}): {tokens}")
