"""``faconv data``: prepare, inspect, verify; synth and sample, which need no source, are in made.py."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..data.chunks import parse_mesh
from ..errors import EXIT_FAILED, EXIT_OK, InputError
from .options import AsJson, Verb, Verbs
from .tables import table_of

if TYPE_CHECKING:
    from ..prepare.comm import Comm
    from ..prepare.preparation import PrepareSummary
    from ..prepare.writer import Progress

data_app = typer.Typer(cls=Verbs, help="From files to a store, and what is in one.", no_args_is_help=True)

POOR_RATIO = 1.1  # above it, tiles read each other's bytes

Mesh = Annotated[str, typer.Option(help="Tiles LATxLON that shall read no other tile's bytes.")]
Output = Annotated[Path, typer.Option(help="Directory of the store.")]
FramesPerFile = Annotated[int | None, typer.Option(help="Frames in one file. Default: 256 MiB of them, at least 16.")]
Compression = Annotated[int | None, typer.Option(help="gzip level 1 to 9. Default: none, which reads fastest.")]
DropRepeatedColumn = Annotated[
    bool, typer.Option("--drop-repeated-column", help="Leave out a last column that repeats the first.")
]
FillAbsentChunks = Annotated[
    bool, typer.Option("--fill-absent-chunks", help="Take chunks that a zarr source lacks as filled. Default: refuse.")
]
Select = Annotated[
    list[str] | None,
    typer.Option("--select", metavar="DIM=VALUE", help="Take one member, height or GRIB key. May be repeated."),
]
SequenceDim = Annotated[
    str | None, typer.Option(metavar="DIM", help="Its values are sequences beside each other, such as members.")
]
Sequences = Annotated[bool, typer.Option("--sequences", help="Each source is a sequence, called as its file is.")]
Rename = Annotated[
    list[str] | None,
    typer.Option("--rename", metavar="OLD=NEW", help="Another name in the store. May be repeated."),
]
MissingValue = Annotated[
    list[str] | None,
    typer.Option("--missing-value", metavar="NAME=VALUE", help="Marks missing data. Without a name: of all variables."),
]
Accept = Annotated[
    list[str] | None,
    typer.Option("--accept", metavar="NAME", help="Take a variable as it is, whatever it looks like."),
]
Static = Annotated[
    list[str] | None,
    typer.Option("--static", metavar="NAME", help="Has times, but does not change: take its first. May be repeated."),
]
From = Annotated[str | None, typer.Option("--from", metavar="DATE", help="First date, such as 1990 or 1990-03-01.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished store.")]
Extend = Annotated[
    bool, typer.Option("--extend", help="Add to a finished store: later times, or variables at its times.")
]
KEPT = (
    "--extend adds files like those that the store has. Leave out --mesh, --frames-per-file, --compression and "
    "--overwrite; or prepare all of it anew, with the store as a source."
)


@data_app.command("prepare", cls=Verb)
def prepare_command(
    sources: Annotated[list[Path], typer.Argument(help="NetCDF, zarr, GRIB, plain HDF5, or stores.")],
    output: Output,
    variables: Annotated[str | None, typer.Option(help="Names, such as t2m,z500. Default: all.")] = None,
    mesh: Mesh = "1x1",
    frames_per_file: FramesPerFile = None,
    compression: Compression = None,
    time_coordinate: Annotated[str | None, typer.Option(help="Name of the time dim, where it is not found.")] = None,
    time_units: Annotated[str | None, typer.Option(help='Such as "hours since 1940-01-01".')] = None,
    calendar: Annotated[str | None, typer.Option(help="Such as standard, noleap, 360_day.")] = None,
    drop_repeated_column: DropRepeatedColumn = False,
    fill_absent_chunks: FillAbsentChunks = False,
    select: Select = None,
    sequence_dim: SequenceDim = None,
    sequences: Sequences = False,
    rename: Rename = None,
    static: Static = None,
    missing_value: MissingValue = None,
    accept: Accept = None,
    from_: From = None,
    to: Annotated[str | None, typer.Option(metavar="DATE", help="Last date, itself included.")] = None,
    every: Annotated[int, typer.Option(help="Take one frame of so many.")] = 1,
    overwrite: Overwrite = False,
    extend: Extend = False,
    as_json: AsJson = False,
) -> None:
    """Turns any source that xarray reads into a store; goes on where it was killed.

    Example: mpiexec -n 8 faconv data prepare era5/*.nc --output era5-store --variables t2m,z500 --mesh 2x4
    """
    from ..prepare.comm import mpi_comm
    from ..prepare.extension import extend as extend_store
    from ..prepare.preparation import PrepareSummary, prepare
    from ..prepare.selection import Period

    files: dict[str, Any] = {"frames_per_file": frames_per_file, "compression": compression, "overwrite": overwrite}
    if extend and (any(files.values()) or mesh != "1x1"):
        raise InputError(KEPT)
    comm = mpi_comm()
    taken: dict[str, Any] = {
        "variables": [name.strip() for name in variables.split(",")] if variables else None,
        "time_coordinate": time_coordinate,
        "time_units": time_units,
        "calendar": calendar,
        "drop_repeated_column": drop_repeated_column,
        "fill_absent_chunks": fill_absent_chunks,
        "select": _pairs(select, "--select number=0"),
        "sequence_dim": sequence_dim,
        "sequences": sequences,
        "rename": _pairs(rename, "--rename t=temperature"),
        "static": static,
        "missing_values": [_mark(text) for text in missing_value or ()],
        "accept": accept,
        "period": Period(from_, to, every),
    } | {"comm": comm, "progress": progress_of(comm), "command": " ".join(sys.argv)}
    make: Callable[..., PrepareSummary] = partial(prepare, mesh=parse_mesh(mesh), **files)
    summary = (extend_store if extend else make)(list(sources), output, **taken)
    report(summary, comm, as_json)


def _mark(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        return name, float(value)
    except ValueError:
        raise InputError(
            f"--missing-value takes a number, or NAME=NUMBER, got {text}. Write for example t=-999."
        ) from None


def _pairs(texts: list[str] | None, example: str) -> dict[str, str]:
    pairs = dict(text.partition("=")[::2] for text in texts or ())
    if len(pairs) < len(texts or ()) or not all(name and value for name, value in pairs.items()):
        raise InputError(
            f"{example.split()[0]} takes NAME=VALUE, each name once, got {', '.join(texts or ())}. Write for "
            f"example {example}."
        )
    return pairs


@data_app.command("inspect", cls=Verb)
def inspect_command(
    store: Annotated[Path, typer.Argument(help="Directory of the store.")],
    mesh: Annotated[str | None, typer.Option(help="Tiles LATxLON. Default: those the store was made for.")] = None,
    window: Annotated[int | None, typer.Option(help="Count bytes per sample of so many input frames.")] = None,
    as_json: AsJson = False,
) -> None:
    """Shows what is in a store, and what every tile of a mesh would read of it.

    Example: faconv data inspect era5-store --mesh 2x2 --window 8
    """
    from ..data.inspection import describe_reading, describe_store
    from ..data.store import Store

    if window is not None and window < 1:
        raise InputError(f"a window has at least 1 input frame, got {window}. Use --window 1 or more.")
    with Store.open(store) as opened:
        opened.check_files()
        description = describe_store(opened)
        description["reading"] = describe_reading(opened, parse_mesh(mesh) if mesh else opened.layout.mesh, window)
    if as_json:
        print(json.dumps(description, indent=2))
    else:
        _show(description, Console())


@data_app.command("verify", cls=Verb)
def verify_command(
    store: Annotated[Path, typer.Argument(help="Directory of the store.")], as_json: AsJson = False
) -> None:
    """Reads every byte of a store and compares it with its checksums. Exit code 1 if a file is damaged.

    Example: mpiexec -n 4 faconv data verify era5-store
    """
    from ..data.store import Store
    from ..data.verification import verify_files, verify_static
    from ..prepare.comm import guarded, mpi_comm

    comm = mpi_comm()
    with guarded(comm), Store.open(store) as opened:
        mine = range(comm.rank, len(opened.files), comm.size)
        here = [(entry.name, problem) for entry, problem in verify_files(opened, mine)]
        if opened.static_file is not None and comm.rank == 0:
            here.append((opened.static_file.name, verify_static(opened)))
        found = sorted(one for part in comm.allgather(here) for one in part)
    damaged = [problem for _, problem in found if problem]
    if comm.rank == 0 and as_json:
        print(json.dumps([{"file": name, "problem": problem} for name, problem in found]))
    elif comm.rank == 0:
        print("\n".join(damaged) or f"{store}: whole, {len(found)} file(s), {_size(opened.size_bytes)}")
    raise typer.Exit(EXIT_FAILED if damaged else EXIT_OK)


def progress_of(comm: "Comm") -> "Progress | None":
    """Says on a terminal how far the first rank is; the others have as much to do."""
    if comm.rank != 0 or not sys.stderr.isatty():
        return None
    console = Console(stderr=True)
    return lambda done, total: console.print(f"file {done} of {total} on this rank", highlight=False)


def report(summary: "PrepareSummary", comm: "Comm", as_json: bool) -> None:
    """Tells of a store that was made, on the first rank."""
    if comm.rank != 0:
        return
    if as_json:
        print(json.dumps(summary.as_dict(), indent=2))
        return
    for note in summary.notes:
        print(f"note: {note}")
    rows, columns = summary.grid_shape
    kept = f", {summary.kept_files} of them from an earlier run" if summary.kept_files else ""
    static = f"{len(summary.static)} without time ({', '.join(summary.static)}), " if summary.static else ""
    missing = "with missing data" if summary.has_missing else "nothing missing"
    print(
        f"{summary.path}: {summary.frames} frames of {len(summary.channels)} channels on {rows} x {columns} cells, "
        f"{static}{missing}; {_size(summary.size_bytes)} in {summary.files} file(s){kept}; {summary.seconds:.1f} s"
    )


def _show(description: dict[str, Any], console: Console) -> None:
    grid, time = description["grid"], description["time"]
    (north, south), (west, east) = grid["latitude_deg"], grid["longitude_deg"]
    smallest, largest = time["step_hours"]
    steps = f"every {smallest:g} h" if time["regular"] else f"irregular, every {smallest:g} to {largest:g} h"
    console.print(f"[bold]{description['path']}[/bold]")
    console.print(
        f"grid   {grid['nlat']} x {grid['nlon']}, latitude {north:g} to {south:g}, longitude {west:g} to {east:g}"
    )
    sequences = f" in {len(time['sequences'])} sequences" if time["sequences"] else ""
    console.print(
        f"time   {time['frames']} frames{sequences}, {time['first']} to {time['last']} ({time['calendar']}), {steps}"
    )
    console.print(
        f"files  {description['files']}, {_size(description['size_bytes'])}, chunks {description['chunk_shape']} "
        f"for mesh {'x'.join(map(str, description['intended_mesh']))}"
    )
    console.print(_channel_table(description["channels"] + description["static"]))
    _show_reading(description["reading"], console)


def _channel_table(channels: list[dict[str, Any]]) -> Table:
    columns = ("channel", "units", "mean", "std", "tendency std", "missing", "long name")
    table = table_of(*columns, text=("channel", "units", "long name"))
    for channel in channels:
        numbers = [f"{channel[key]:.5g}" for key in ("mean", "std")]
        changes = "tendency_std" in channel
        numbers.append(f"{channel['tendency_std']:.5g}" if changes else "static")
        missing = f"{100 * channel['missing_share']:.1f} %" if changes else ""
        table.add_row(channel["name"], channel["units"], *numbers, missing, channel["long_name"])
    return table


def _show_reading(reading: dict[str, Any], console: Console) -> None:
    mesh = "x".join(map(str, reading["mesh"]))
    title = f"mesh {mesh}, {reading['frames']} frame(s)"
    table = table_of("tile", "rows", "columns", "needs", "reads", "ratio", title=title)
    for tile in reading["tiles"]:
        spans = [f"{first}..{stop}" for first, stop in (tile["rows"], tile["columns"])]
        sizes = [_size(tile[key]) for key in ("bytes_needed", "bytes_read")]
        table.add_row(str(tile["tile"]), *spans, *sizes, f"{tile['ratio']:.3f}")
    console.print(table)
    console.print(
        f"all tiles: need {_size(reading['bytes_needed'])}, read {_size(reading['bytes_read'])}, "
        f"ratio {reading['ratio']:.3f} (before compression)"
    )
    if reading["ratio"] > POOR_RATIO:
        console.print(f"Tiles read each other's bytes. For this mesh, prepare the store with --mesh {mesh}.")


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
