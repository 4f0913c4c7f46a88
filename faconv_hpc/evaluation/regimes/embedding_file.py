"""Reads what `faconv embed` has written."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ...data.layout import SEQUENCE
from ...data.times import TimeAxis
from ...errors import InputError
from ...files import check_in_reach
from ...forecasting.embeddings import CONTRACT, EMBEDDINGS, NAMES, WINDOW
from ...training.contract import Contract

OTHER_TITLE = "The embeddings"
HDF5 = b"\x89HDF\r\n\x1a\n"  # such files start with it
GIVE_ONE = "Give one that `faconv embed` has written."
ALIKE = 1e-6  # of the largest value of a component: float32 rounds to a tenth of it


@dataclass(frozen=True, eq=False)
class EmbeddingFile:
    """Embeddings with their times, and of what they were made.

    Attributes:
        z_TE: float64.
        contract: says which fields go with them, and how they are read.
        title: names the network.
        window: how many inputs an embedding is of.
        made_of: of the command's options, what was said of each, and the digests of network and data.
    """

    path: Path
    z_TE: NDArray[np.float64]
    axis: TimeAxis
    contract: Contract
    title: str
    window: int
    made_of: dict[str, dict[str, str]]

    @cached_property
    def months(self) -> NDArray[np.int64]:
        """(time,) 1 to 12."""
        return self.axis.months


def read_embeddings(path: Path) -> EmbeddingFile:
    """Raises InputError for what is no file of `faconv embed`, is damaged, or holds what no network says."""
    _check_is_one(path)
    try:
        with xr.open_dataset(path, engine="h5netcdf", decode_times=False, driver_kwds={"locking": False}) as data:
            made_of = json.loads(data.attrs[EMBEDDINGS.request])
            contract = Contract.model_validate_json(data.attrs[CONTRACT])
            z_TE, seconds = (data.variables[name].values for name in ("embedding", "time"))
            sequences = (data[SEQUENCE].values, json.loads(data[SEQUENCE].attrs[NAMES])) if SEQUENCE in data else None
            window, title = int(data.attrs[WINDOW]), str(data.attrs.get("title", OTHER_TITLE))
    except KeyError as error:
        raise InputError(f"{path} is no file of embeddings (it has no {error}). {GIVE_ONE}") from None
    except (OSError, ValueError) as error:
        check_in_reach(path, error)
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path} is damaged, or of another version ({reason}). Copy it again, or embed again with --overwrite."
        ) from None
    if z_TE.ndim != 2 or len(z_TE) != seconds.size or len(z_TE) < 3:
        raise InputError(
            f"{path} holds {len(z_TE)} embedding(s) at {seconds.size} time(s), regimes need 3 times at least. Embed "
            f"more: `faconv embed` takes all times of its data without --times."
        )
    beginnings, names = (0,), ()
    if sequences is not None:
        beginnings, names = tuple(np.unique(sequences[0], return_index=True)[1].tolist()), tuple(sequences[1])
    axis = TimeAxis(seconds.astype(np.int64), contract.calendar, beginnings, names)
    _check_times(axis, path)
    _check_embeddings(z_TE, axis, path)
    return EmbeddingFile(path, z_TE.astype(np.float64), axis, contract, title, window, made_of)


def _check_is_one(path: Path) -> None:
    """By what it is and how it starts."""
    if not path.exists():
        raise InputError(f"{path} does not exist. Make it with `faconv embed MODEL --output {path}`.")
    if path.is_dir():
        raise InputError(f"{path} is a directory, and embeddings are a file. {GIVE_ONE}")
    try:
        with path.open("rb") as file:
            start = file.read(len(HDF5))
    except OSError as error:
        check_in_reach(path, error)
        raise InputError(f"{path} cannot be read: {error.strerror}. Give a file that you may read.") from None
    if start != HDF5:
        raise InputError(f"{path} is no file of embeddings (it starts with {start!r}, no NetCDF4 does). {GIVE_ONE}")


def _check_times(axis: TimeAxis, path: Path) -> None:
    for own in axis.sequences:
        late = np.flatnonzero(np.diff(axis.seconds[own.start : own.stop]) <= 0)
        if late.size:
            first = own[int(late[0])]
            raise InputError(
                f"embeddings follow each other in time, each later than the one before, and in {path} "
                f"{axis.label(first + 1)} comes after {axis.label(first)}. Embed again with --overwrite: `faconv "
                f"embed` writes each time once, in order."
            )


def _check_embeddings(z_TE: NDArray[np.floating], axis: TimeAxis, path: Path) -> None:
    bad: NDArray[np.bool_] = np.asarray(~np.isfinite(z_TE).all(1))
    if bad.any():
        raise InputError(
            f"{path} has embeddings that are no finite numbers, {int(bad.sum())} of {len(bad)}, the first of "
            f"{axis.date(int(bad.argmax()))}: the network or the data are damaged. Look at both (`faconv checkpoint "
            f"verify`, `faconv data verify`), then embed again with --overwrite."
        )
    if (np.ptp(z_TE, axis=0) <= ALIKE * np.abs(z_TE).max(0)).all():
        raise InputError(
            f"all {len(z_TE)} embeddings of {path} are the same but for rounding: the network has collapsed, and tells "
            f"no time from another. Embed with an earlier checkpoint, or train again, and look at effective_rank of "
            f"the validation period."
        )
