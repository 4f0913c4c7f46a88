"""Forecaster: a trained network with all that it takes to forecast, from stores, files, datasets or tensors."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.forcings import Instants
from ..data.gaps import fill_gaps
from ..data.inputs import Inputs
from ..data.times import TimeAxis
from ..data.variables import Channels
from ..observe import READING
from ..spatial.device import device_for
from ..spatial.domain import Domain
from ..spatial.mesh import ProcessMesh
from ..training.free_run import free_run_from
from ..training.loading import TrainedNetwork, load_network
from ..training.shards import newest_at
from ..training.units import in_units, reference_of
from .dates import Start
from .frames import Frames

if TYPE_CHECKING:
    from collections import OrderedDict

    import xarray as xr

    from .earth2 import Coords


@dataclass(frozen=True)
class Window:
    """Inputs that spin the state up, of B samples.

    Attributes:
        inputs_BTCYX: as the network takes them.
        year_fraction_BT: of their times.
        last_BPYX: float64, the prognostic variables of the last in their units; NaN where nothing is known.
    """

    inputs_BTCYX: Tensor
    year_fraction_BT: Tensor
    last_BPYX: Tensor


Prepared = tuple[Window, Iterator[tuple[Tensor, Tensor]], Iterator[Tensor]]
"""What `Forecaster.free_run` takes."""


class Forecaster:
    """A trained network that forecasts and embeds, on one tile or on those of a mesh.

    Args:
        trained: see `load_network`.
        mesh: its ranks share the grid; default: this process has all of it.
        device: default: the mesh's; without a mesh a GPU, if there is one.
        block: see `TrainedNetwork.domain`; for networks side by side on the same tiles.

    Attributes:
        network: in float32, on the device.
        contract: what it was trained on.
        domain: the grid, and this rank's tile of it.
        window: inputs that spin its state up.
        cycle: of the variables that it sees without it, on this rank's tile.

    It also is a prognostic model in earth2studio's sense, see earth2.py, where it needs nothing but states.
    """

    def __init__(
        self,
        trained: TrainedNetwork,
        mesh: ProcessMesh | None = None,
        device: torch.device | str | None = None,
        block: int = 1,
    ) -> None:
        if device is None:
            device = mesh.device if mesh is not None else device_for("auto")
        self.trained, self.contract, self.window = trained, trained.contract, trained.window
        self.domain: Domain = trained.domain(mesh, block)
        self.device = torch.device(device)
        self.network = trained.network.to(self.device)
        self.cycle = trained.cycle.part(self.domain.tile)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        mesh: ProcessMesh | None = None,
        kernels: str | None = "eager",
    ) -> "Forecaster":
        """Of a run directory (its newest whole checkpoint), a checkpoint's directory, or an exported .safetensors file.
        Collective over a mesh: all take the checkpoint that the first rank finds.

        Args:
            device, mesh: see the class.
            kernels: see `load_network`.

        Raises:
            InputError: as `load_network`; or it does not say how long its window is.
        """
        if mesh is not None and Path(path).is_dir():
            path = mesh.from_first(newest_at(Path(path)).path if mesh.rank == 0 else path)
        return cls(load_network(path, kernels=kernels), mesh, device)

    @property
    def within(self) -> Domain:
        """The domain that its layers compute on."""
        return self.domain.coarsened(self.network.scale_factor)

    def to(self, device: torch.device | str) -> "Forecaster":
        """The same forecaster, moved to a device."""
        self.device = torch.device(device)
        self.network = self.network.to(self.device)
        return self

    def forecast(self, dataset: "xr.Dataset", steps: int, start: str | Sequence[str] | None = None) -> "xr.Dataset":
        """Forecasts from a dataset, in memory. Collective over the tiles of a mesh.

        Args:
            dataset: with the contract's prognostic variables at the ``window`` times up to the start, forcing variables
                at these and at all leads but the last, and those without time; names and units are the contract's,
                the rest is found as `faconv data prepare` finds it.
            steps: how many.
            start: dates, see `seconds_of`. Default: the last that the dataset allows.

        Returns:
            float32, dims init_time, lead_time, latitude, longitude (and level): what is forecast, in units; on a mesh
            of several tiles this rank's part.

        Raises:
            InputError: the dataset has not what the contract says, or not what a start needs.
        """
        from .datasets import forecast_of

        return forecast_of(self, dataset, steps, start)

    def embed(self, dataset: "xr.Dataset") -> "xr.Dataset":
        """The embedding of each time of a dataset that has its window before it. Collective over the tiles of a mesh.

        Returns:
            ``embedding`` (time, component) float32: that of the window's last step.

        Raises:
            InputError: as `forecast`.
        """
        from .datasets import embedding_of

        return embedding_of(self, dataset)

    def input_coords(self) -> "OrderedDict[str, NDArray[Any]]":
        """earth2studio's protocol: coordinates of the states that it goes on from; see earth2.py."""
        from .earth2 import input_coords

        return input_coords(self)

    def output_coords(self, input_coords: "Coords") -> "OrderedDict[str, NDArray[Any]]":
        """earth2studio's protocol: coordinates of the step after those of an input."""
        from .earth2 import output_coords

        return output_coords(self, input_coords)

    def create_iterator(self, x: Tensor, coords: "Coords") -> "Iterator[tuple[Tensor, OrderedDict[str, NDArray[Any]]]]":
        """earth2studio's protocol: the last state of an input, and then step after step, without end."""
        from .earth2 import iterate

        return iterate(self, x, coords)

    def __call__(self, x: Tensor, coords: "Coords") -> "tuple[Tensor, OrderedDict[str, NDArray[Any]]]":
        """earth2studio's protocol: the step after an input."""
        steps = self.create_iterator(x, coords)
        next(steps)
        return next(steps)

    @torch.no_grad()
    def leads(self, frames: Frames, start: Start) -> Iterator[Tensor]:
        """Forecasts from one date, lead by lead. Collective over the tiles of a replica.

        Yields:
            (C, Y, X) float64 of this tile: `Channels.targets` in their units, NaN where they were never known in the
            window.
        """
        for lead_BCYX in self.free_run(*self.prepared(frames, start)):
            yield lead_BCYX[0]

    def prepared(self, frames: Frames, start: Start) -> Prepared:
        """What `free_run` takes, of one date; what is given at later times is read when it is asked for."""
        inputs = self._inputs(frames)
        window = self._window_of(inputs, frames, start)
        times = start.times.year_fraction[start.window - 1 :]
        cycles = (torch.from_numpy(inputs.cycle_at(times[at : at + 1])).to(self.device) for at in range(len(times)))
        return window, self._given(inputs, frames, start), cycles

    @torch.no_grad()
    def embedding(self, frames: Frames, start: Start) -> NDArray[np.float32]:
        """(E,) of the last step of a window. Collective over the tiles of a replica."""
        window = self._window_of(self._inputs(frames), frames, start)
        output = self.network(window.inputs_BTCYX, window.year_fraction_BT, domain=self.domain)
        embedding: NDArray[np.float32] = output.embedding_BTE[0, -1].float().cpu().numpy()
        return embedding

    def free_run(
        self, window: Window, given: Iterable[tuple[Tensor, Tensor]], cycles: Iterable[Tensor]
    ) -> Iterator[Tensor]:
        """Leads of B samples, (B, C, Y, X) float64 in the units of `Channels.targets`.

        Args:
            given: see `free_run_from`.
            cycles: (B, C, Y, X) of the start and of each lead, see `Inputs.cycle_at`.
        """
        channels, changing = self.contract.channels, len(self.contract.channels.prognostic)
        z_BCYX = reference_of(window.inputs_BTCYX[:, -1], channels)
        means_BDYX = [one.value(z) for one, z in zip(channels.targets, z_BCYX.unbind(1), strict=True)][changing:]
        base_BCYX = torch.cat([window.last_BPYX, *(mean[:, None] for mean in means_BDYX)], dim=1)
        turns = iter(cycles)
        from_BCYX = next(turns).double()
        from_BCYX[:, changing:] = 0.0  # a diagnostic departs from its mean, a change from the start
        runs = free_run_from(self.network, window.inputs_BTCYX, window.year_fraction_BT, given, channels, self.domain)
        for change, cycle_BCYX in zip(runs, turns, strict=False):
            said_BCYX = in_units(torch.cat(change, dim=1), z_BCYX, channels)
            yield base_BCYX + said_BCYX + (cycle_BCYX.double() - from_BCYX)

    def _inputs(self, frames: Frames) -> Inputs:
        tile = self.domain.tile
        return Inputs(self.contract.channels, tile, self.domain.grid, frames.read_static(tile), self.cycle)

    def _window_of(self, inputs: Inputs, frames: Frames, start: Start) -> Window:
        """Reads it."""
        size = start.window
        values_TCYX, known_TCYX = self._read(frames, start.states, start.forcings[:size])
        return self.window_from(inputs, values_TCYX, known_TCYX, instants(start.times, range(size)))

    def window_from(
        self, inputs: Inputs, values_TCYX: NDArray[np.float32], known_TCYX: NDArray[np.bool_] | None, at: Instants
    ) -> Window:
        """Of raw fields, which are changed in place."""
        size, channels = len(values_TCYX), self.contract.channels
        last_PYX = torch.from_numpy(values_TCYX[-1, : len(channels.prognostic)].astype(np.float64))
        inputs.transform(values_TCYX, at.year_fraction[:size])
        fresh_TCYX = fill_gaps(values_TCYX, known_TCYX, len(channels.prognostic))
        if fresh_TCYX is not None:
            filled = values_TCYX[-1], inputs.cycle_at(at.year_fraction[size - 1 : size])[0]
            known_PYX = torch.from_numpy(fresh_TCYX[-1, : len(channels.prognostic)] == 1)
            last_PYX = torch.where(known_PYX, last_PYX, _in_units_of(channels, *filled))
        inputs.normalise(values_TCYX)
        inputs_TCYX = torch.empty(size, len(channels.inputs), *self.domain.tile.shape)
        inputs.fill(values_TCYX, fresh_TCYX, at, inputs_TCYX.numpy())
        fractions = torch.from_numpy(at.year_fraction[:size].copy())
        on_device = (one[None].to(self.device) for one in (inputs_TCYX, fractions, last_PYX))
        return Window(*on_device)

    def _read(
        self, frames: Frames, states: Sequence[int], forcings: Sequence[int]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """Raw fields of all inputs that have time, and where they are known; None: everywhere."""
        with self.domain.mesh.activity.during(READING):
            values_TPYX, known_TPYX = frames.states.read(states, self.domain.tile)
            if frames.forcings is None:
                return values_TPYX, known_TPYX
            values_TFYX, known_TFYX = frames.forcings.read(forcings, self.domain.tile)
        known = [_all_known(*pair) for pair in ((values_TPYX, known_TPYX), (values_TFYX, known_TFYX))]
        return np.concatenate([values_TPYX, values_TFYX], axis=1), np.concatenate(known, axis=1)

    def _given(self, inputs: Inputs, frames: Frames, start: Start) -> Iterator[tuple[Tensor, Tensor]]:
        """What is known of the times after the window, one after the other, but for the last: forcings."""
        channels, tile = self.contract.channels, self.domain.tile
        for place in range(start.window, len(start.times) - 1):
            values_TCYX = np.zeros((1, channels.given, *tile.shape), dtype=np.float32)
            known_TCYX = np.ones(values_TCYX.shape, dtype=bool)
            if frames.forcings is not None:
                with self.domain.mesh.activity.during(READING):
                    forced_TFYX, known_TFYX = frames.forcings.read([start.forcings[place]], tile)
                values_TCYX[:, len(channels.prognostic) :] = forced_TFYX
                known_TCYX[:, len(channels.prognostic) :] = _all_known(forced_TFYX, known_TFYX)
            yield self.given_from(inputs, values_TCYX, known_TCYX, instants(start.times, range(place, place + 1)))

    def given_from(
        self, inputs: Inputs, values_TCYX: NDArray[np.float32], known_TCYX: NDArray[np.bool_], at: Instants
    ) -> tuple[Tensor, Tensor]:
        """(1, C, Y, X) inputs of one time, of which the prognostic ones mean nothing, and (1,) its year fraction."""
        inputs.transform(values_TCYX, at.year_fraction[:1])
        inputs.normalise(values_TCYX)
        inputs_TCYX = torch.empty(1, len(self.contract.channels.inputs), *self.domain.tile.shape)
        inputs.fill(values_TCYX, known_TCYX.astype(np.float32), at, inputs_TCYX.numpy())
        return inputs_TCYX.to(self.device), torch.from_numpy(at.year_fraction[:1].copy()).to(self.device)


def instants(times: TimeAxis, places: range) -> Instants:
    """Of some times that follow each other, and the one after them."""
    span = slice(places.start, places.stop + 1)
    return Instants(times.hours[span], times.year_fraction[span], times.utc_hour[span])


def _in_units_of(channels: Channels, z_CYX: NDArray[np.float32], cycle_CYX: NDArray[np.float32]) -> Tensor:
    """(P, Y, X) float64, the prognostic variables of what the network sees of them, which is not normalised yet."""
    fields = zip(channels.prognostic, torch.from_numpy(z_CYX).double(), torch.from_numpy(cycle_CYX), strict=False)
    return torch.stack([one.value(z_YX) + cycle_YX for one, z_YX, cycle_YX in fields])


def _all_known(fields_TCYX: NDArray[np.float32], known_TCYX: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    return np.ones(fields_TCYX.shape, dtype=bool) if known_TCYX is None else known_TCYX
