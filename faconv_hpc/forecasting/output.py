"""Where forecasts and embeddings go: an output that appears when all is there, and goes on where it was killed."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, is_out_of_reach
from ..files import cannot_write, flush_entries, write_durably
from ..locks import locked_directory
from ..spatial.mesh import ProcessMesh
from . import netcdf, zarr_store
from .layout import ForecastLayout, attributes_of

ATTRIBUTES = {".nc": netcdf.attributes_in, ".zarr": zarr_store.attributes_in}
REQUEST_FILE, LOCK_FILE = "request.json", ".lock"


@dataclass(frozen=True)
class Asked:
    """A part of what was asked for: ``value`` is compared, ``told`` is for people."""

    value: str
    told: str


Request = Mapping[str, Asked]
"""By the argument or option of the command."""


class Sink(Protocol):
    """Takes fields of the whole grid."""

    def write(self, channel: int, lead: int, field_YX: NDArray[np.float32]) -> None:
        """Of one channel, see `Channels.targets`."""


class PartWriter(Protocol):
    """Of a format: an output is made of parts, such as those of each date."""

    def prepare(self) -> None:
        """On the first rank, before anything is written."""

    def is_done(self, part: int) -> bool:
        """Whether all of a part is there."""

    def finish(self, final: Path) -> Iterator[None]:
        """On the first rank, when all parts are done; in steps, so that nobody waits for all of it."""


class Writer(PartWriter, Protocol):
    """Of forecasts, in a format."""

    def tile_of(self, channel: int, tiles: int) -> int:
        """The tile whose rank writes a channel."""

    def writing(self, init: int, first: bool) -> AbstractContextManager[Sink | None]:
        """A date is written by the ranks of a replica, of which this is the first or not; all have written when the
        block ends, and it is done then."""


Layout = TypeVar("Layout")
Written = TypeVar("Written", bound=PartWriter)


@dataclass(frozen=True)
class Product(Generic[Layout, Written]):
    """What a command writes.

    Attributes:
        verb: ``faconv VERB``.
        noun: one of them.
        title: of the file, before the network's name.
        writers: by the suffix of the output's name; they are given a directory for what is done, and the attributes.
    """

    verb: str
    noun: str
    title: str
    writers: Mapping[str, Callable[[Path, Layout, Mapping[str, str]], Written]]

    @property
    def request(self) -> str:
        """The attribute that says of what it was made."""
        return f"faconv_{self.verb}"


FORECASTS: Product[ForecastLayout, Writer] = Product(
    "forecast", "forecast", "Forecasts by", {".nc": netcdf.NetcdfWriter, ".zarr": zarr_store.ZarrWriter}
)


def check_output(path: Path, product: Product[Any, Any], request: Request, *, overwrite: bool) -> bool:
    """Whether all that is asked for is there already.

    Args:
        request: what is known of it, at least.

    Raises:
        InputError: another suffix than the formats have, or what is there was made by another request.
    """
    if path.suffix not in product.writers:
        names = " or ".join(f"NAME{one}" for one in product.writers)
        raise InputError(f"the output is {names}, got {path}. Change its name.")
    if overwrite:
        return False
    finished = path.exists()
    if finished:
        said = ATTRIBUTES[path.suffix](path).get(product.request)
        if said is None:
            raise InputError(
                f"{path} is there, and no output of `faconv {product.verb}`. Give another --output, or --overwrite."
            )
        _check_same(path, json.loads(said), request)
    before = _partial(path) / REQUEST_FILE
    if before.is_file() and not finished:
        _check_same(before.parent, json.loads(before.read_text()), request)
    return finished


def _check_same(path: Path, said: Mapping[str, Any], request: Request) -> None:
    for option in (one for one in request if one in said):
        before, now = Asked(**said[option]), request[option]
        if before.value != now.value:
            raise InputError(
                f"{path} was made with {option} {before.told}, this command says {now.told}. Give another --output, or "
                f"--overwrite."
            )


@contextmanager
def opened_output(
    path: Path,
    product: Product[Layout, Written],
    layout: Layout,
    request: Request,
    mesh: ProcessMesh,
    *,
    overwrite: bool,
) -> Iterator[Written | None]:
    """What writes an output; None where it is finished. Collective. Others are kept from it as long as the block lasts.

    Raises:
        InputError: as `check_output`; or somebody else writes there, or it cannot be written.
    """
    partial = _partial(path)
    writer = product.writers[path.suffix](partial, layout, _attributes(product, request))
    with ExitStack() as stack:
        finished = False
        if mesh.rank == 0:
            stack.enter_context(
                locked_directory(partial / LOCK_FILE, "--output", lambda holder: _held(path, product, holder))
            )
            finished = check_output(path, product, request, overwrite=overwrite)
            with written_to(path):
                if finished:
                    shutil.rmtree(partial)
                else:
                    _begin(partial, request)
                    writer.prepare()
        yield None if mesh.from_first(finished) else writer


def finish_output(writer: PartWriter, path: Path, mesh: ProcessMesh) -> None:
    """Gives the output its name; all parts are done. Collective."""
    mesh.gathered([0.0])  # all have closed their files
    steps, more = writer.finish(path), True
    while more:
        if mesh.rank == 0:
            with written_to(path):
                more = next(steps, 0) is None
        more = mesh.from_first(more)
    if mesh.rank == 0:
        with written_to(path):
            flush_entries(path.absolute().parent)
            shutil.rmtree(_partial(path))


@contextmanager
def written_to(path: Path) -> Iterator[None]:
    """What goes wrong in writing is told to the user."""
    try:
        yield
    except OSError as error:
        if is_out_of_reach(error):
            raise cannot_write("--output", path, error) from None
        raise InputError(
            f"cannot write to {path} ({error.strerror or error}). Check the directory's rights and the space left (df, "
            f"quota), then run the same command again: dates that are done are kept."
        ) from None


def _begin(partial: Path, request: Request) -> None:
    """Keeps what an earlier start of the same request has left, and nothing else."""
    said = json.dumps({option: asdict(asked) for option, asked in request.items()}, sort_keys=True)
    file = partial / REQUEST_FILE
    keeps = file.is_file() and {key: one["value"] for key, one in json.loads(file.read_text()).items()} == {
        key: one.value for key, one in request.items()
    }
    for entry in partial.iterdir():
        if entry.name == LOCK_FILE or (keeps and not entry.name.startswith(".")):
            continue
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    if not keeps:
        write_durably(file, said)


def _attributes(product: Product[Any, Any], request: Request) -> dict[str, str]:
    """Of every file: CF's, and who made it of what."""
    said = {option: asdict(asked) for option, asked in request.items()}
    return {
        **attributes_of(f"{product.title} {request['MODEL'].told}"),
        "network_sha256": request["MODEL"].value,
        product.request: json.dumps(said, sort_keys=True),
    }


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _held(path: Path, product: Product[Any, Any], holder: str) -> InputError:
    return InputError(
        f"another {product.noun} writes to {path}: {holder or 'unknown'}. Wait, or give another --output."
    )
