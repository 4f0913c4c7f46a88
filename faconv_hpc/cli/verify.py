"""``faconv verify``: tiles give the numbers of one tile, for the user's own config and data."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..config import MeshConfig, RunConfig
from ..config_file import load_config
from ..errors import EXIT_FAILED, EXIT_OK
from ..launch.local import inside_a_job, run_and_read
from .options import AsJson, ConfigPath, Overrides, Ranks
from .ranks import joined, set_options, starts_ranks
from .tables import table_of

if TYPE_CHECKING:
    from ..training.parity import ParityRow

LAYOUT_HELP = (
    "A layout to compare, LATxLON or REPLICASxLATxLON. May be repeated; without --ranks, starts as many ranks as "
    "each needs."
)


def verify_command(
    config: ConfigPath,
    ranks: Ranks = None,
    layout: Annotated[
        list[str] | None,
        typer.Option("--layout", metavar="[Rx]LATxLON", help=LAYOUT_HELP),
    ] = None,
    set_: Overrides = None,
    float64: Annotated[
        bool, typer.Option("--float64", help="Compute in float64 and ask for 1e-12 instead of 1e-5.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Prove that tiles give the same numbers as one tile, for your own config and data.

    Runs one tile and every layout asked for on random weights and the first windows of the store, and compares loss,
    output, embedding, the gradients of the input and of every part of the network, and the update by DeepSpeed.
    Without --layout: every arrangement of the ranks. Says PASS, or where the first difference lies. Exit code 0 if
    all agree, 1 if not.

    Example: `faconv verify configs/quickstart_era5.yaml --layout 1x2 --layout 2x2 --layout 2x1x2`
    """
    run = load_config(config, set_ or ())
    layouts = [MeshConfig.parse(text) for text in layout or ()]
    arguments = ["verify", str(config), *set_options(set_), *["--float64"] * float64]
    if starts_ranks(ranks) or (layouts and not inside_a_job()):
        rows = _rows_of_local_ranks(run, arguments, ranks, layouts)
        _show_parity(rows, as_json)
        raise typer.Exit(EXIT_OK if all(row.passed for row in rows) else EXIT_FAILED)
    import torch

    from ..training.parity import verify_parity

    with joined(None, run.training.timeout_s, run.device) as mesh:
        rows = verify_parity(run, mesh, torch.float64 if float64 else torch.float32, layouts or None)
        if mesh.rank == 0:
            _show_parity(rows, as_json)
    raise typer.Exit(EXIT_OK if all(row.passed for row in rows) else EXIT_FAILED)


def _rows_of_local_ranks(
    run: RunConfig, arguments: Sequence[str], ranks: int | None, layouts: Sequence[MeshConfig]
) -> "list[ParityRow]":
    """The layouts' rows, from ranks started here: one start for all layouts of as many ranks."""
    from ..data.store import Store
    from ..training.fit import check_fits, grid_of
    from ..training.parity import ParityRow, check_layout

    one_window = {"micro_batch": 1, "accumulation": 1, "stateful_windows": 0}
    training = run.training.model_copy(update=one_window)
    for mesh in (MeshConfig(), *layouts):
        check_fits(run.model_copy(update={"mesh": mesh, "training": training}))
    grid = grid_of(run, Store.open(run.data.store))
    by_ranks: dict[int, list[MeshConfig]] = {ranks: []} if ranks else {}
    for layout in layouts:
        check_layout(layout, ranks or layout.ranks, grid)
        by_ranks.setdefault(layout.ranks, []).append(layout)
    rows: list[ParityRow] = []
    for started, group in by_ranks.items():
        options = [part for layout in group for part in ("--layout", str(layout))]
        code, printed = run_and_read([*arguments, *options, "--json"], started)
        answer = printed.rpartition('{"passed"')
        if not answer[1] or code not in (EXIT_OK, EXIT_FAILED):  # no verdict: stderr says why
            raise typer.Exit(code or EXIT_FAILED)
        found = json.loads("".join(answer[1:]))["rows"]
        rows += [ParityRow(**{name: row[name] for name in row if name != "passed"}) for row in found]
    return rows


def _show_parity(rows: "Sequence[ParityRow]", as_json: bool) -> None:
    passed = all(row.passed for row in rows)
    if as_json:
        print(json.dumps({"passed": passed, "rows": [asdict(row) | {"passed": row.passed} for row in rows]}))
        return
    layouts = list(dict.fromkeys(row.layout for row in rows))
    table = table_of(
        "quantity",
        *layouts,
        text=["quantity"],
        title="tiles beside one tile: largest difference over largest value",
        caption="layouts: tiles along lat x lon, or replicas x lat x lon",
    )
    by_place = {(row.quantity, row.layout): row for row in rows}
    for quantity in dict.fromkeys(row.quantity for row in rows):
        cells = [by_place[quantity, layout] for layout in layouts]
        table.add_row(quantity, *(f"{row.difference:.1e}{'' if row.passed else '  FAIL'}" for row in cells))
    console = Console()
    console.print(table)
    for row in rows:
        if row.first:
            console.print(f"first difference of the {row.quantity} on {row.layout}: {row.first}")
    worst = max(rows, key=lambda row: row.difference if row.difference == row.difference else float("inf"))
    console.print(
        f"{'PASS' if passed else 'FAIL'}: largest difference {worst.difference:.1e} "
        f"({worst.quantity}, {worst.layout}), tolerance {worst.tolerance:g}"
    )
