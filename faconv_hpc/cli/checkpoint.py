"""``faconv checkpoint``: list, verify, export."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import EXIT_FAILED, EXIT_OK
from .options import AsJson, Verb, Verbs
from .tables import table_of

checkpoint_app = typer.Typer(cls=Verbs, help="List, verify and export the checkpoints of a run.", no_args_is_help=True)

Where = Annotated[Path, typer.Argument(help="The run_dir of a run, or the directory of one checkpoint.")]


@checkpoint_app.command("list", cls=Verb)
def list_command(where: Where, as_json: AsJson = False) -> None:
    """Lists the checkpoints with their sizes and where they come from; reads the manifests only.

    Example: faconv checkpoint list runs/quickstart_era5
    """
    from ..training.export import summary
    from ..training.shards import checkpoints_at

    rows = [summary(one) for one in checkpoints_at(where)]
    if as_json:
        print(json.dumps(rows))
        return
    columns = ("step", "size [MB]", "files", "mesh", "ZeRO", "torch", "manifest")
    table = table_of(*columns, text=columns[-1:], title=f"checkpoints of {where}")
    for row in rows:
        if row["problem"]:
            table.add_row(str(row["step"]), "", "", "", "", "", row["problem"])
        else:
            numbers = (f"{row['bytes'] / 1e6:.2f}", str(row["files"]), row["mesh"], str(row["zero_stage"]))
            best = "as written, the best" if Path(row["path"]).name == "best" else "as written"
            table.add_row(str(row["step"]), *numbers, row["versions"].get("torch", ""), best)
    Console().print(table)


@checkpoint_app.command("verify", cls=Verb)
def verify_command(where: Where, as_json: AsJson = False) -> None:
    """Reads every byte and compares it with what was written. Exit code 1 if anything is damaged.

    Example: faconv checkpoint verify runs/quickstart_era5/checkpoints/step-00000120
    """
    from ..training.shards import checkpoints_at

    found = [(one, one.problem()) for one in checkpoints_at(where)]
    if as_json:
        print(json.dumps([{"path": str(one.path), "step": one.step, "problem": problem} for one, problem in found]))
    else:
        for one, problem in found:
            print(f"{one.path}: {problem or 'whole'}")
    raise typer.Exit(EXIT_FAILED if any(problem for _, problem in found) else EXIT_OK)


@checkpoint_app.command("export", cls=Verb)
def export_command(
    where: Where,
    output: Annotated[Path, typer.Option(help="File to write: .safetensors, or .pt for torch.load.")],
    as_json: AsJson = False,
) -> None:
    """Writes one plain state dict, for inference on one device, from the newest whole checkpoint.

    A .safetensors file also holds the arguments of the network and its contract: variables, statistics, grid.

    Example: faconv checkpoint export runs/quickstart_era5 --output forecast.safetensors
    """
    from ..training.export import export
    from ..training.shards import newest_at

    whole = newest_at(where)
    answer: dict[str, Any] = export(whole, output)
    if as_json:
        print(json.dumps(answer))
    else:
        print(f"{output}: {answer['tensors']} tensors, {answer['values']} values, of step {whole.step} of {whole.path}")
