"""Forecasts and embeddings of datasets, as datasets."""

from collections.abc import Sequence
from typing import Any

import cftime
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ..data.times import EPOCH_UNITS
from ..errors import InputError
from .dates import Timeline
from .embeddings import EMBEDDING_OF, embedding_attributes
from .forecaster import Forecaster
from .layout import ForecastLayout
from .sources import dataset_frames

EXACT = ("standard", "proleptic_gregorian")


def forecast_of(
    forecaster: Forecaster, dataset: xr.Dataset, steps: int, start: str | Sequence[str] | None
) -> xr.Dataset:
    """See `Forecaster.forecast`."""
    contract, tile = forecaster.contract, forecaster.domain.tile
    if steps < 1:
        raise InputError(f"a forecast has at least one step, got {steps}. Ask for 1 or more.")
    frames = dataset_frames(dataset, contract)
    timeline = Timeline(frames, contract, forecaster.window, steps)
    texts = [start] if isinstance(start, str) else start
    seconds = [timeline.last()] if texts is None else timeline.asked(texts)
    starts = [timeline.start(second) for second in seconds]
    layout = ForecastLayout.of(contract, starts)
    shape = {field.name: layout.shape_of(field)[:-2] + tile.shape for field in layout.fields}
    values = {name: np.empty(size, dtype=np.float32) for name, size in shape.items()}
    for init, one in enumerate(starts):
        for lead, lead_CYX in enumerate(forecaster.leads(frames, one)):
            for channel, field_YX in enumerate(lead_CYX.cpu().numpy()):
                name, place = layout.place_in(channel, init, lead)
                values[name][place] = field_YX
    variables = {field.name: (layout.dims_of(field), values[field.name], field.attributes) for field in layout.fields}
    coordinates = {one.name: (one.name, one.values, one.attributes) for one in layout.coordinates()}
    coordinates["init_time"] = ("init_time", dates_of(layout.seconds, contract.calendar), {})
    coordinates["lead_time"] = ("lead_time", layout.leads_s.astype("timedelta64[s]").astype("timedelta64[ns]"), {})
    for name, span in (("latitude", tile.rows), ("longitude", tile.columns)):
        dim, every, attributes = coordinates[name]
        coordinates[name] = (dim, every[slice(*span)], attributes)
    return xr.Dataset(variables, coordinates)


def embedding_of(forecaster: Forecaster, dataset: xr.Dataset) -> xr.Dataset:
    """See `Forecaster.embed`."""
    frames = dataset_frames(dataset, forecaster.contract)
    timeline = Timeline(frames, forecaster.contract, forecaster.window, steps=1, what=EMBEDDING_OF, goes_on=True)
    seconds = timeline.all()
    z_TE = np.stack([forecaster.embedding(frames, timeline.start(second)) for second in seconds])
    dates = dates_of(np.array(seconds, dtype=np.int64), forecaster.contract.calendar)
    times = ("time", dates, {"standard_name": "time"})
    return xr.Dataset(
        {"embedding": (("time", "component"), z_TE, embedding_attributes(forecaster.window))}, {"time": times}
    )


def dates_of(seconds: NDArray[np.int64], calendar: str) -> NDArray[Any]:
    """datetime64 where the calendar is that of NumPy, or dates as cftime has them."""
    if calendar in EXACT:
        return seconds.astype("datetime64[s]").astype("datetime64[ns]")
    return np.asarray(cftime.num2date(seconds, EPOCH_UNITS, calendar=calendar))
