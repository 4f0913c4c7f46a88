"""How a forecast of one region hangs on the fields that the network was given: gradients, averaged over dates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from ...data.unknown_names import index_of
from ...data.variables import Variable
from ...errors import InputError
from ...forecasting.dates import Start
from ...forecasting.forecaster import Forecaster
from ...forecasting.frames import Frames
from ...training.contract import Contract
from ...training.units import reference_of
from ..words import latitude_in_words, longitude_in_words


@dataclass(frozen=True)
class Region:
    """A part of the globe, from south to north and from west to east, over the end of longitudes if need be.

    Attributes:
        south_deg, north_deg, west_deg, east_deg: its limits, which belong to it.
    """

    south_deg: float
    north_deg: float
    west_deg: float
    east_deg: float

    @classmethod
    def parse(cls, text: str) -> "Region":
        """Of ``LAT0,LAT1,LON0,LON1``; raises InputError."""
        try:
            first, last, west, east = (float(part) for part in text.split(","))
        except ValueError:
            raise InputError(
                f"--region takes LAT0,LAT1,LON0,LON1 in degrees such as 40,60,-20,20, got {text}."
            ) from None
        return cls(min(first, last), max(first, last), west, east)

    def share_YX(self, contract: Contract) -> NDArray[np.float64]:
        """Weights of the grid's cells for a mean over the region; raises InputError where it has none."""
        latitude, longitude = np.array(contract.latitude_deg), np.array(contract.longitude_deg)
        rows = (latitude >= self.south_deg) & (latitude <= self.north_deg)
        wide = self.east_deg - self.west_deg
        columns = (longitude - self.west_deg) % 360 <= (360 if wide >= 360 else wide % 360)
        areas_YX = np.outer(np.where(rows, contract.grid.cell_area_sr, 0.0), columns)
        if not areas_YX.any():
            raise InputError(
                f"--region {self} has no cell of a grid of {latitude.size} rows from {latitude[0]:g} to "
                f"{latitude[-1]:g} degrees and {longitude.size} columns from {longitude[0]:g} to {longitude[-1]:g}. "
                f"Give a larger one."
            )
        return np.asarray(areas_YX / areas_YX.sum(), dtype=np.float64)

    def __str__(self) -> str:
        south, north = latitude_in_words(self.south_deg), latitude_in_words(self.north_deg)
        return f"{south} to {north}, {longitude_in_words(self.west_deg)} to {longitude_in_words(self.east_deg)}"


@dataclass(frozen=True, eq=False)
class Question:
    """Of what forecast: the mean of a variable over a region, some steps ahead."""

    region: Region
    target: int
    lead: int
    contract: Contract

    @classmethod
    def of(cls, contract: Contract, region: Region, variable: str | None, lead: int) -> "Question":
        """Raises InputError for a variable that is not forecast; default: the first that is."""
        names = [one.name for one in contract.channels.targets]
        target = 0 if variable is None else index_of("forecast variable", variable, names, "the network")
        region.share_YX(contract)
        return cls(region, target, lead, contract)

    @property
    def variable(self) -> Variable:
        """That is forecast."""
        return self.contract.channels.targets[self.target]


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Gradients of the answer by what is given, over dates.

    Attributes:
        variables: fields that are inputs.
        mean_TCYX, rms_TCYX: for each step of the window, in units of the forecast variable for one standard deviation
            of the given one in a cell of mean area.
        total_TC: by how much the answer changes where a field is one standard deviation higher everywhere: mean.
        answers: of the dates.
    """

    question: Question
    variables: tuple[Variable, ...]
    mean_TCYX: NDArray[np.float64]
    rms_TCYX: NDArray[np.float64]
    total_TC: NDArray[np.float64]
    answers: tuple[float, ...]


def sensitivity_of(
    forecaster: Forecaster,
    frames: Frames,
    starts: Sequence[Start],
    question: Question,
    progress: Callable[[int, int], None],
) -> Sensitivity:
    """On one tile; dates have as many steps after them as the question asks for.

    Raises:
        InputError: the region has nothing of the variable.
    """
    channels, areas_Y = forecaster.contract.channels, forecaster.domain.grid.cell_area_sr
    share_YX = torch.from_numpy(question.region.share_YX(forecaster.contract)).to(forecaster.device)
    total, squares, answers = np.zeros(()), np.zeros(()), []
    for number, start in enumerate(starts):
        window, given, cycles = forecaster.prepared(frames, start)
        inputs_BTCYX = window.inputs_BTCYX.clone().requires_grad_()
        z_BCYX = reference_of(inputs_BTCYX[:, -1], channels)
        values = [one.value(z_BCYX[:, place]) for place, one in enumerate(channels.prognostic)]
        x_BPYX = torch.stack(values, dim=1)  # the start itself hangs on the last input, too
        last_BPYX = x_BPYX + (window.last_BPYX - x_BPYX).detach()
        runs = forecaster.free_run(replace(window, inputs_BTCYX=inputs_BTCYX, last_BPYX=last_BPYX), given, cycles)
        field_YX = next(islice(runs, question.lead - 1, None))[0, question.target]
        known_YX = field_YX.isfinite()
        known = (known_YX * share_YX).sum()
        if not known:
            raise InputError(
                f"{question.variable.name!r} is missing in every cell of --region {question.region} in the forecast "
                f"from {start.date}. Give a larger region, or another --variable."
            )
        answer = (field_YX.where(known_YX, 0.0) * share_YX).sum() / known
        (gradient,) = torch.autograd.grad(answer, inputs_BTCYX)
        gradient_TCYX = gradient[0, :, : channels.given].double().cpu().numpy()
        total, squares = total + gradient_TCYX, squares + gradient_TCYX**2
        answers.append(float(answer.detach()))
        progress(number + 1, len(starts))
    mean_TCYX, rms_TCYX = total / len(starts), np.sqrt(squares / len(starts))
    variables = (*channels.prognostic, *channels.forcing)
    per_area = (areas_Y / areas_Y.mean())[:, None]
    sums_TC = mean_TCYX.sum((2, 3))
    return Sensitivity(question, variables, mean_TCYX / per_area, rms_TCYX / per_area, sums_TC, tuple(answers))
