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
    """Raises InputError for what is no file of `faconv embed`, or holds what no network says."""
    if not path.exists():
        raise InputError(f"{path} does not exist. Make it with `faconv embed MODEL --output {path}`.")
    try:
        with xr.open_dataset(path, engine="h5netcdf", decode_times=False, driver_kwds={"locking": False}) as data:
            said = data.attrs[EMBEDDINGS.request]
            contract = Contract.model_validate_json(data.attrs[CONTRACT])
            z_TE, seconds = data["embedding"].values.astype(np.float64), data["time"].values.astype(np.int64)
            sequences = (data[SEQUENCE].values, json.loads(data[SEQUENCE].attrs[NAMES])) if SEQUENCE in data else None
            window, title = int(data.attrs[WINDOW]), str(data.attrs.get("title", OTHER_TITLE))
    except (OSError, KeyError, ValueError) as error:
        check_in_reach(path, error)
        raise InputError(
            f"{path} is no file of embeddings ({_first_line(error)}). Give one that `faconv embed` has written."
        ) from None
    if z_TE.ndim != 2 or len(z_TE) != seconds.size or len(z_TE) < 3:
        raise InputError(
            f"{path} holds {len(z_TE)} embedding(s) at {seconds.size} time(s), regimes need 3 times at least. Embed "
            f"more: `faconv embed` takes all times of its data without --times."
        )
    bad: NDArray[np.bool_] = np.asarray(~np.isfinite(z_TE).all(1))
    beginnings, names = (0,), ()
    if sequences is not None:
        beginnings, names = tuple(np.unique(sequences[0], return_index=True)[1].tolist()), tuple(sequences[1])
    axis = TimeAxis(seconds, contract.calendar, beginnings, names)
    if bad.any():
        raise InputError(
            f"{path} has embeddings that are no finite numbers, {int(bad.sum())} of {len(bad)}, the first of "
            f"{axis.date(int(bad.argmax()))}: the network or the data are damaged. Look at both (`faconv checkpoint "
            f"verify`, `faconv data verify`), then embed again with --overwrite."
        )
    return EmbeddingFile(path, z_TE, axis, contract, title, window, json.loads(said))


def _first_line(error: Exception) -> str:
    missing = f"it has no {error}" if isinstance(error, KeyError) else str(error)
    return missing.splitlines()[0]
