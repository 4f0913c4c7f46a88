"""What a network looks at: attention, dilations, and what a region's forecast hangs on; as NetCDF."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from ...data.layout import are_synthetic
from ...data.periods import evenly
from ...errors import InputError
from ...forecasting.campaign import asked_of, open_frames
from ...forecasting.dates import Timeline
from ...forecasting.forecaster import Forecaster
from ...forecasting.layout import attributes_of
from ...model.layer import FAConvLSTM2d
from ..netcdf import grid_coordinates, save_dataset
from ..seasons import SEASONS
from .attention_maps import Looks, looks_of
from .sensitivity import Question, Sensitivity, sensitivity_of

GIB = 2**30
MEMORY_TABLE = Path("/proc/meminfo")
KEPT_PER_STEP = (
    5  # times C_h channels of every cell that backward keeps of a layer's step: h, c, u, and what is made of them
)

Stages = Callable[[str], Callable[[int, int], None]]


@dataclass(frozen=True, eq=False)
class Explanation:
    """What was found.

    Attributes:
        dates: that it is of.
        looks: None where the network has no such layers.
        sensitivity: None where nothing was asked.
        on_earth: False of data that are synthetic.
    """

    title: str
    forecaster: Forecaster
    dates: tuple[str, ...]
    looks: Looks | None
    sensitivity: Sensitivity | None
    on_earth: bool = True

    @property
    def dilations(self) -> tuple[int, ...]:
        """Of the layers' kernels, where they have some."""
        layers = [one for one in self.forecaster.network.layers if isinstance(one, FAConvLSTM2d)]
        return layers[0].dilations if layers else ()


def explain(
    forecaster: Forecaster,
    data: Sequence[Path],
    samples: int,
    question: Question | None,
    sequence: str | None = None,
    stages: Stages = lambda what: lambda done, total: None,
) -> Explanation:
    """Over dates that are spread over what the data allow. Works on one tile, which has the globe.

    Raises:
        InputError: the data do not fit; or memory does not suffice.
    """
    contract, window = forecaster.contract, forecaster.window
    steps = 1 if question is None else question.lead
    check_memory(forecaster, steps)
    frames = open_frames(contract, data, sequence)
    timeline = Timeline(frames, contract, window, steps, what="forecast from")
    seconds = timeline.all()
    starts = [timeline.start(seconds[place]) for place in evenly(len(seconds), samples)]
    looks = looks_of(forecaster, frames, starts, stages("watching attention"))
    answer = None
    if question is not None:
        answer = sensitivity_of(forecaster, frames, starts, question, stages("gradients"))
    title = asked_of(forecaster.trained).told
    return Explanation(title, forecaster, tuple(one.date for one in starts), looks, answer, not are_synthetic(data))


def check_memory(forecaster: Forecaster, steps: int) -> None:
    """Raises InputError where the gradients of a forecast clearly do not fit."""
    (nlat, nlon), width = forecaster.within.tile.shape, 0
    for layer in forecaster.network.layers:
        width += getattr(layer, "hidden_channels", 0)
    needed = nlat * nlon * width * 4 * KEPT_PER_STEP * (forecaster.window + steps)
    if forecaster.device.type == "cuda":
        there = int(torch.cuda.mem_get_info(forecaster.device)[0])
    else:
        there = _available_bytes()
    if needed > there:
        raise InputError(
            f"a network on {nlat} x {nlon} cells that is explained in one piece keeps about {needed / GIB:.1f} GiB for "
            f"{forecaster.window + steps} steps, and {there / GIB:.1f} GiB are free. Take a machine or a GPU with "
            f"more, or a smaller --lead."
        )


def _available_bytes() -> int:
    """Of this machine's memory, with that which only caches files: pages that hold nothing at all are few."""
    try:
        lines = MEMORY_TABLE.read_text().splitlines()
    except OSError:  # another system than Linux, of which all that it has is known
        lines = []
    kib = (int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return 1024 * next(kib, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1024)


def write_netcdf(found: Explanation, path: Path) -> None:
    """All maps; the file appears whole."""
    contract = found.forecaster.contract
    coordinates = grid_coordinates(np.array(contract.latitude_deg), np.array(contract.longitude_deg))
    variables = _of_looks(found.looks) | _of_sensitivity(found.sensitivity)
    if found.looks is not None:
        coordinates |= {"season": ("season", list(SEASONS)), "dilation": ("dilation", list(found.dilations))}
        coordinates["key_latitude"] = ("key_latitude", np.array(contract.latitude_deg))
    if found.sensitivity is not None:
        coordinates["given"] = ("given", [one.name for one in found.sensitivity.variables])
        window = found.sensitivity.mean_TCYX.shape[0]
        coordinates["steps_before_start"] = ("steps_before_start", np.arange(1 - window, 1))
    save_dataset(xr.Dataset(variables, coordinates, attributes_of(f"What {found.title} looks at")), path)


def _of_looks(looks: Looks | None) -> dict[str, Any]:
    if looks is None:
        return {}
    maps = ("layer", "season", "latitude", "longitude")
    preference = {"units": "1", "comment": "1 is no preference"}
    return {
        "row_attention": (maps, looks.row_map_LSYX, preference | {"long_name": "received along latitude circles"}),
        "column_attention": (maps, looks.column_map_LSYX, preference | {"long_name": "received along meridians"}),
        "row_attention_by_offset": (
            ("layer", "season", "latitude", "columns_east"),
            looks.row_offset_LSYX,
            preference | {"long_name": "given to cells so many columns to the east"},
        ),
        "column_attention_by_latitude": (
            ("layer", "season", "latitude", "key_latitude"),
            looks.latitudes_LSYY,
            preference | {"long_name": "given by each latitude to each other one"},
        ),
        "attention_added": (("layer",), looks.added_L, {"long_name": "what attention adds, over what it is added to"}),
        "dilation_share": (("layer", "dilation", "channel"), looks.dilations_LDC, {"units": "1"}),
        "dates_of_season": (("season",), looks.dates_S, {}),
    }


def _of_sensitivity(found: Sensitivity | None) -> dict[str, Any]:
    if found is None:
        return {}
    question = found.question
    asked = f"{question.variable.name}, mean over {question.region}, {question.lead} steps after the start"
    units = {"units": question.variable.units, "comment": "for one standard deviation in a cell of mean area"}
    dims = ("steps_before_start", "given", "latitude", "longitude")
    return {
        "sensitivity": (dims, found.mean_TCYX, units | {"long_name": f"mean gradient of {asked}"}),
        "sensitivity_rms": (dims, found.rms_TCYX, units | {"long_name": f"root mean square gradient of {asked}"}),
        "sensitivity_total": (dims[:2], found.total_TC, {"units": question.variable.units}),
    }
