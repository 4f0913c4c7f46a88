"""What verbs that use a trained network share: its argument, the data, the ranks, the progress."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..config import MeshConfig
from ..errors import InputError
from ..files import check_can_write
from .ranks import check_ranks, job_ranks, joined, run_ranks, starts_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..spatial.mesh import ProcessMesh

PROGRESS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A run_dir, the directory of one checkpoint, or an exported file.")
]
Mesh = Annotated[
    str | None,
    typer.Option("--mesh", metavar="[Rx]LATxLON", help="How ranks share dates and the globe. Default: as the run's."),
]
OfSequence = Annotated[str | None, typer.Option(help="Which sequence of the store to take, if it has several.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")]


class Summary(Protocol):
    """What was made."""

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""


class Asked(Protocol):
    """What the user asks for, but for the ranks."""

    @property
    def verb(self) -> str: ...

    @property
    def arguments(self) -> list[str]:
        """To hand on to ranks, MODEL first."""

    def check(self) -> None:
        """Raises InputError for what can be told without weights."""

    def make(self, mesh: "ProcessMesh", kernels: str | None, progress: Callable[[int, int], None]) -> Any:
        """On all ranks; a `Summary`."""


@dataclass(frozen=True)
class Where:
    """On which ranks, as the options say."""

    ranks: int | None
    mesh: str | None
    device: str | None
    kernels: str | None


def carry_out(
    asked: Asked,
    networks: Sequence[Mapping[str, str]],
    where: Where,
    counted: str,
    report: Callable[[Any], None],
    *,
    as_json: bool,
) -> None:
    """Starts ranks that do it, or does it as one of them.

    Args:
        networks: what is said of each, without its weights; of a file of forecasts nothing.
        counted: what the progress counts.
        report: tells the user of the summary.
    """
    from ..spatial.device import check_device
    from ..spatial.mesh import TIMEOUT_S
    from ..training.loading import check_tiles

    starting, device = starts_ranks(where.ranks), where.device or "auto"
    ranks = where.ranks if starting and where.ranks else job_ranks()
    trained_on = next((about["mesh"] for about in networks if "mesh" in about), "1x1")
    sizes = mesh_of(where.mesh, trained_on, ranks)
    if starting:
        for about in networks:
            check_tiles(about, sizes)
        asked.check()  # or says why not, before any rank is started
        check_device(device)
        given = {"--mesh": sizes, "--kernels": where.kernels, "--device": where.device}
        again = [asked.verb, *asked.arguments, *as_arguments((), given), *["--json"] * as_json]
        raise typer.Exit(run_ranks(again, ranks))
    with joined(sizes, TIMEOUT_S, device) as mesh:
        with shown_progress(counted, disable=mesh.rank > 0) as progress:
            summary = asked.make(mesh, where.kernels, progress)
        if mesh.rank == 0:
            print(json.dumps(summary.as_dict(), indent=2)) if as_json else report(summary)


@contextmanager
def shown_progress(counted: str, *, disable: bool = False) -> "Iterator[Callable[[int, int], None]]":
    """A bar on stderr while the block lasts; what it gives is called with what is done and what there is."""
    with Progress(*PROGRESS, console=Console(stderr=True), transient=True, disable=disable) as shown:
        task = shown.add_task(counted, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


@contextmanager
def shown_stages() -> "Iterator[Callable[[str], Callable[[int, int], None]]]":
    """The same for work of several stages, each with a bar of its own; what it gives is called with a stage's name."""
    with Progress(*PROGRESS, console=Console(stderr=True), transient=True) as shown:

        def begin(what: str) -> Callable[[int, int], None]:
            task = shown.add_task(what, total=None)
            return lambda done, total: shown.update(task, completed=done, total=total)

        yield begin


def as_arguments(several: Iterable[tuple[str, Sequence[Any]]], given: Mapping[str, Any]) -> list[str]:
    """Options that may be repeated, and others that are left out where they are None, to hand on to ranks."""
    pairs = [(option, value) for option, values in several for value in values]
    pairs += [(option, value) for option, value in given.items() if value is not None]
    return [str(part) for pair in pairs for part in pair]


def check_is_no_data(output: Path, data: Sequence[Path]) -> None:
    """Raises InputError for an output that would replace data."""
    if output.absolute() in [path.absolute() for path in data]:
        raise InputError(f"--output {output} is the data, which it would replace. Give another --output.")


def check_directory(output: Path, data: Sequence[Path]) -> None:
    """Raises InputError for an output that is no place for several files, or cannot be written."""
    check_is_no_data(output, data)
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file. Give a directory.")
    check_can_write("--output", output)


def mesh_of(text: str | None, trained: str, ranks: int) -> MeshConfig:
    """What is asked for; or the run's tiles, and as many replicas as there are ranks for. One rank has all."""
    if text is not None:
        mesh = MeshConfig.parse(text)
    elif ranks == 1:
        return MeshConfig()
    else:
        tiles = MeshConfig.parse(trained)
        mesh = tiles.model_copy(update={"replicas": max(ranks // (tiles.lat * tiles.lon), 1)})
    check_ranks(mesh, ranks, "say with --mesh how they share dates and the globe")
    return mesh


def paths_of(data: Sequence[str] | None, abouts: Sequence[Mapping[str, str]], models: Sequence[Path]) -> list[Path]:
    """The data that are named, patterns resolved; or the store of the first run. See `about_network`."""
    from ..training.loading import store_of

    return paths_in(data) if data else [store_of(abouts, models)]


def paths_in(data: Sequence[str], option: str = "--data") -> list[Path]:
    """What an option names, patterns resolved."""
    found: list[Path] = []
    for text in data:
        path = Path(text)
        matching = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor)))) if "*" in text else [path]
        if not matching:
            raise InputError(f"{option} {text} matches no file. Give a store, or NetCDF, zarr or GRIB data.")
        found += matching
    return found
