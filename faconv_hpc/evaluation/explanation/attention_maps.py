"""What a network looks at: the weights of its attention, and of its dilations, over windows of some dates."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...forecasting.dates import Start
from ...forecasting.forecaster import Forecaster
from ...forecasting.frames import Frames
from ...model.attention import AxialAttention
from ...model.layer import FAConvLSTM2d
from ..seasons import SEASONS


@dataclass(frozen=True, eq=False)
class Looks:
    """Means over dates, heads, and all attentions of a window; in units of what even weights would be, so that 1 is no
    preference.

    Attributes:
        row_map_LSYX: of each layer and season, how much a cell is looked at by the cells of its latitude circle.
        column_map_LSYX: the same by those of its meridian, beside its share of the area.
        row_offset_LSYX: how much the cells of a circle look as many columns to the east.
        latitudes_LSYY: how much each latitude looks at each other one, beside its share of the area.
        added_L: root mean square of what attention adds, over that of what it is added to.
        dilations_LDC: share of each dilation in each channel of the bottleneck, which sum to 1.
        dates_S: dates of each season; where there is none, maps are NaN.
    """

    row_map_LSYX: NDArray[np.float64]
    column_map_LSYX: NDArray[np.float64]
    row_offset_LSYX: NDArray[np.float64]
    latitudes_LSYY: NDArray[np.float64]
    added_L: NDArray[np.float64]
    dilations_LDC: NDArray[np.float64]
    dates_S: NDArray[np.int64]


@torch.no_grad()
def looks_of(
    forecaster: Forecaster, frames: Frames, starts: Sequence[Start], progress: Callable[[int, int], None]
) -> Looks | None:
    """Of the windows of some dates, on one tile; None for a network of another cell."""
    layers = [layer for layer in forecaster.network.layers if isinstance(layer, FAConvLSTM2d)]
    if not layers:
        return None
    sums = [_Sums(forecaster, layer) for layer in layers]
    dates = np.zeros(len(SEASONS), dtype=np.int64)
    for number, start in enumerate(starts):
        month = int(start.times.months[start.window - 1])
        season = next(place for place, months in enumerate(SEASONS.values()) if month in months)
        dates[season] += 1
        with ExitStack() as stack:
            for one in sums:
                stack.enter_context(one.watching(season))
            forecaster.embedding(frames, start)
        progress(number + 1, len(starts))
    rows, columns, offsets, latitudes = (np.stack([one.mean(name) for one in sums]) for name in _Sums.MAPS)
    added, dilations = np.array([one.added for one in sums]), np.stack([one.dilations for one in sums])
    return Looks(rows, columns, offsets, latitudes, added, dilations, dates)


class _Sums:
    """Of one layer, by season."""

    MAPS = ("rows", "columns", "offsets", "latitudes")

    def __init__(self, forecaster: Forecaster, layer: FAConvLSTM2d) -> None:
        self._layer, self._domain, self._cells = layer, forecaster.within, forecaster.domain.tile.shape
        nlat, nlon = self._domain.tile.shape
        areas_Y = torch.from_numpy(np.asarray(self._domain.grid.cell_area_sr, dtype=np.float64))
        self._even_Y = areas_Y / areas_Y.sum()  # weights of a column that has no preference
        shapes = (nlat, nlon), (nlat, nlon), (nlat, nlon), (nlat, nlat)
        self._maps = {
            name: torch.zeros(len(SEASONS), *shape, dtype=torch.float64)
            for name, shape in zip(self.MAPS, shapes, strict=True)
        }
        self._events = torch.zeros(len(SEASONS), dtype=torch.float64)
        self._squares = [0.0, 0.0]
        self._dilations: list[Tensor] = []

    @contextmanager
    def watching(self, season: int) -> Iterator[None]:
        """Takes in what the layer does while the block lasts."""
        hooks = [self._layer.register_forward_hook(self._layer_ran)]
        if self._layer.attention is not None:
            hooks.append(self._layer.attention.register_forward_hook(self._attention_ran(season)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _layer_ran(self, layer: nn.Module, given: tuple[Any, ...], said: Any) -> None:
        assert isinstance(layer, FAConvLSTM2d), f"{type(layer)} has no dilations"
        weights_BTDC = layer.dilation_weights(given[0], self._domain)
        self._dilations.append((weights_BTDC / weights_BTDC.sum(2, keepdim=True)).mean((0, 1)).double().cpu())

    def _attention_ran(self, season: int) -> Callable[..., None]:
        def ran(attention: nn.Module, given: tuple[Any, ...], said: Tensor) -> None:
            assert isinstance(attention, AxialAttention), f"{type(attention)} has no lines"
            h_BCYX = given[0]
            self._squares[0] += float((said - h_BCYX).double().square().mean())
            self._squares[1] += float(h_BCYX.double().square().mean())
            of_rows, of_columns = attention.projected(h_BCYX)
            self._take_rows(attention.rows.weights(of_rows, self._domain), season)
            self._take_columns(attention.columns.weights(of_columns, self._domain), season)
            self._events[season] += 1

        return ran

    def _take_rows(self, lines: Iterator[Tensor], season: int) -> None:
        nlon = self._maps["rows"].shape[-1]
        east = (torch.arange(nlon)[:, None] + torch.arange(nlon)) % nlon
        for row, weights_BHNN in enumerate(lines):
            mean_NN = weights_BHNN.double().mean((0, 1)).cpu()
            self._maps["rows"][season, row] += mean_NN.mean(0) * nlon
            self._maps["offsets"][season, row] += mean_NN.gather(1, east).mean(0) * nlon

    def _take_columns(self, lines: Iterator[Tensor], season: int) -> None:
        nlon = self._maps["columns"].shape[-1]
        for column, weights_BHNN in enumerate(lines):
            mean_NN = weights_BHNN.double().mean((0, 1)).cpu() / self._even_Y
            self._maps["columns"][season, :, column] += mean_NN.mean(0)
            self._maps["latitudes"][season] += mean_NN / nlon

    def mean(self, name: str) -> NDArray[np.float64]:
        """Of one of the `MAPS`, by season; NaN where there was none. Cells of a square have what it has."""
        found = np.asarray(self._maps[name] / self._events[:, None, None])
        nlat, nlon = self._cells
        for axis, size in ((1, nlat), (2, nlat if name == "latitudes" else nlon)):
            found = found.repeat(-(-size // found.shape[axis]), axis=axis).take(range(size), axis=axis)
        return found

    @property
    def added(self) -> float:
        """See `Looks`; NaN where no attention came."""
        return (self._squares[0] / self._squares[1]) ** 0.5 if self._squares[1] else float("nan")

    @property
    def dilations(self) -> NDArray[np.float64]:
        """(D, C_b) mean shares."""
        return np.asarray(torch.stack(self._dilations).mean(0))
