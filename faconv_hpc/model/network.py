"""FAConvLSTMNetwork: stacked layers, a forecast of the next step at every step, and an embedding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError
from ..spatial.collectives import at_least_float32
from ..spatial.domain import Domain
from ..spatial.grid import Boundary
from .cells import layers_of
from .feedback import Feedback
from .history import History
from .losses import Loss, area_mean_squared_error, free_run_loss, shared_mean_squared_error
from .recurrence import State, known_steps
from .rules import ON_THE_SPHERE, check_coarse, check_steps, squares_of
from .segments import Segments
from .squares import in_squares, out_of_squares
from .state import NetworkState, Past
from .subspace import SubspaceHead, coarse_at_leads, coarse_means


@dataclass(frozen=True)
class NetworkOutput:
    """What the network says about a sequence.

    Attributes:
        forecast_BTCYX: what is forecast at each step for the next: changes, then diagnostics.
        fields: how many of its channels are changes.
        window: how many of the steps had inputs that were given; from then on it ran freely.
        embedding_BTE: z, one per step; of what came until then.
        coarse_BTKCRS: the field of each step, and of each of the K - 1 that follow it, as its embedding knows it, R x S
            regions.
        state: after the last step.
        window_state: the same after the window, what a window that follows it goes on from.
        valid_BT: the steps that count in the losses; None: all.
    """

    forecast_BTCYX: Tensor
    fields: int
    window: int
    embedding_BTE: Tensor
    coarse_BTKCRS: Tensor
    state: NetworkState
    window_state: NetworkState
    valid_BT: Tensor | None = None

    @property
    def tendency_BTCYX(self) -> Tensor:
        """Change of each field from each step to the next, in units of its standard deviation."""
        return self.forecast_BTCYX[:, :, : self.fields]

    @property
    def diagnostic_BTCYX(self) -> Tensor:
        """What is forecast of the next step and is no input, normalised."""
        return self.forecast_BTCYX[:, :, self.fields :]


@dataclass(frozen=True)
class TrainingLosses:
    """The loss of a micro-batch, and apart what is in it of the forecast of the next step and of the embedding."""

    total: Loss
    forecast: Loss
    embedding: Loss


class _InInputsType(nn.Conv2d):
    """A convolution in the type of its input, whatever its weights are kept in."""

    def forward(self, x_NCYX: Tensor) -> Tensor:
        return functional.conv2d(x_NCYX, self.weight.to(x_NCYX.dtype))


class ForecastHead(nn.Conv2d):
    """What is forecast of each cell: linear in the last layer's h, and in the inputs where there are some.

    Args:
        hidden_channels, inputs, targets: how many channels of each; 0 inputs: it does not see them.
    """

    def __init__(self, hidden_channels: int, inputs: int, targets: int) -> None:
        super().__init__(hidden_channels, targets, kernel_size=1)
        self.from_inputs = _InInputsType(inputs, targets, kernel_size=1, bias=False) if inputs else None

    def forward(self, h_NCYX: Tensor, x_NCYX: Tensor) -> Tensor:  # type: ignore[override]
        """(N, targets, Y, X), in the inputs' type where it sees them: in float32 a small change of them is not lost."""
        forecast = super().forward(h_NCYX)
        return forecast if self.from_inputs is None else forecast + self.from_inputs(x_NCYX)


class FAConvLSTMNetwork(nn.Module):
    """Recurrent network from normalized fields and forcings to tendencies and embeddings.

    Args:
        in_channels: fields, then whatever else is known about each cell.
        field_channels: how many of them, from the first, are forecast, by their change.
        hidden_channels: C_h of every layer.
        layers: how many are stacked.
        diagnostic_channels: what is forecast besides, and is no input.
        history: how many frames the layers and the forecast see at each step, its own among them; see `History`.
        past_channels: how many of the inputs, from the first, they see of the frames before. Default: all.
        scale_factor: f; layers and forecast compute on squares of f x f cells, see squares.py, all of which they see
            and forecast. Their domain is `Domain.coarsened`, so that tiles must be of whole squares. The operators of
            `ON_THE_SPHERE` have squares of their own.
        residual: every layer but the first adds what it says to what it was given, and the forecast sees the inputs.
            Gates saturate; a forecast that is linear in the fields can hold back what has grown too large.
        embedding_channels, coarse_shape, seasonal_encoding: see `SubspaceHead`.
        embedding_past, embedding_leads: its ``past`` and ``leads``.
        embedding_weight: weight of the coarse fields' error in the loss.
        checkpoint_steps: length of the time segments that are computed again in backward instead of
            being stored, see `Segments`; 0 stores everything.
        cell: what its layers are, see `CELLS`.
        layer_options: passed to every layer, see its class.

    Attributes:
        boundaries: of the grid it was trained on, see `LatLonGrid.boundaries`; a call on others is refused. None: any.
    """

    def __init__(
        self,
        in_channels: int,
        field_channels: int,
        hidden_channels: int = 32,
        layers: int = 2,
        *,
        diagnostic_channels: int = 0,
        history: int = 1,
        past_channels: int | None = None,
        scale_factor: int = 1,
        residual: bool = True,
        embedding_channels: int = 32,
        coarse_shape: tuple[int, int] = (3, 6),
        embedding_past: int = 8,
        embedding_leads: int = 2,
        seasonal_encoding: bool = True,
        embedding_weight: float = 0.02,
        checkpoint_steps: int = 0,
        cell: str = "faconvlstm",
        **layer_options: Any,
    ) -> None:
        super().__init__()
        if not 1 <= field_channels <= in_channels:
            raise InputError(
                f"field_channels={field_channels} must be between 1 and in_channels={in_channels}: "
                f"the first input channels are the fields that are forecast."
            )
        self.field_channels, self.checkpoint_steps = field_channels, checkpoint_steps
        self.embedding_weight = embedding_weight
        self.boundaries: tuple[Boundary, Boundary, Boundary] | None = None
        past = in_channels if past_channels is None else past_channels
        if history < 1 or not 0 <= past <= in_channels:
            raise InputError(
                f"history={history} frames with past_channels={past}: it sees one frame or more, and of those before "
                f"0 to in_channels={in_channels} channels. Give history=1 for the frame of the step alone."
            )
        if cell in ON_THE_SPHERE:
            layer_options |= {"scale_factor": scale_factor}
        self.scale_factor = squares_of(cell, scale_factor)
        in_square = self.scale_factor**2
        self.history = History(history, past * in_square)
        seen = in_channels * in_square + self.history.added
        self.layers = layers_of(cell, seen, hidden_channels, layers, layer_options)
        targets = (field_channels + diagnostic_channels) * in_square
        self.residual = residual
        self.forecast = ForecastHead(hidden_channels, seen if residual else 0, targets)
        self.subspace = SubspaceHead(
            hidden_channels,
            embedding_channels,
            field_channels,
            coarse_shape,
            past=embedding_past,
            leads=embedding_leads,
            seasonal_encoding=seasonal_encoding,
        )
        for parameter in self.forecast.parameters():
            nn.init.zeros_(parameter)  # the first forecast is persistence, exactly

    def forward(
        self,
        x_BTCYX: Tensor,
        year_fraction_BT: Tensor,
        *,
        domain: Domain | None = None,
        state: NetworkState | None = None,
        first_step: int = 0,
        valid_BT: Tensor | None = None,
        feedback: Feedback | None = None,
    ) -> NetworkOutput:
        """Runs a sequence; see `FAConvLSTM2d.forward` for first_step and valid_BT.

        One that is continued in pieces, from the ``state`` of the piece before, gives what it gives as a whole.

        Args:
            x_BTCYX: normalized fields and forcings of this tile; float32 where the weights are in bf16, too: rounded to
                that, they lose several percent of a small change.
            year_fraction_BT: position of each step in the year, 0 to 1.
            feedback: how it goes on by itself after a window, with gradients through all steps; default: it does not.
        """
        domain = domain or Domain.plane(*x_BTCYX.shape[-2:])
        self._check_boundaries(domain)
        domain.check_cells(x_BTCYX)
        within = domain.coarsened(self.scale_factor)
        check_coarse(self.subspace.coarse_shape, within.grid.nlat, within.grid.nlon, self.scale_factor)
        if feedback is not None and valid_BT is not None:
            raise InputError(
                "samples of different length (valid_BT) do not run freely (feedback). Give one of the two."
            )
        window = x_BTCYX.shape[1] if feedback is None else feedback.window
        check_steps(min(window, x_BTCYX.shape[1]))
        x_BTCYX = known_steps(x_BTCYX, valid_BT)
        states = [None] * (1 + len(self.layers)) if state is None else state.parts(len(self.layers))
        forecasts, means = [], []
        given_BTCYX, ahead_BTCYX = x_BTCYX.split([window, x_BTCYX.shape[1] - window], dim=1)
        cut = Segments(self.checkpoint_steps, within)
        for start, x in cut.of(given_BTCYX):
            valid = None if valid_BT is None else valid_BT[:, start : start + x.shape[1]]
            segment = partial(self._segment, within=within, first_step=first_step + start, valid_BT=valid)
            forecast, mean, states = cut.computed(segment, x, states)
            forecasts.append(forecast)
            means.append(mean)
        window_states = states
        if feedback is not None:
            last, change = given_BTCYX[:, -1], self._change(forecasts[-1][:, -1])
            for start, x in cut.of(ahead_BTCYX):
                free = partial(self._free_segment, feedback, within=within, first_step=first_step + window + start)
                forecast, mean, states, change = cut.computed(free, last, x, change, states)
                forecasts.append(forecast)
                means.append(mean)
        past = None if state is None else state.past
        embedding_BTE, coarse, tokens_BTE = self.subspace(torch.cat(means, dim=1), year_fraction_BT, past, valid_BT)
        final = at_window = self._state(states, past, tokens_BTE, valid_BT)
        if feedback is not None:
            at_window = self._state(window_states, past, tokens_BTE[:, :window], None)
        forecast = torch.cat(forecasts, dim=1)
        return NetworkOutput(forecast, self.field_channels, window, embedding_BTE, coarse, final, at_window, valid_BT)

    def _state(
        self, states: Sequence[State | None], past: Past | None, tokens_BTE: Tensor, valid_BT: Tensor | None
    ) -> NetworkState:
        """After steps of these tokens."""
        return NetworkState.after(states[0], states[1:], self.subspace.after(past, tokens_BTE, valid_BT))

    def _change(self, forecast_BCYX: Tensor) -> Tensor:
        """Of the fields, in float32 or better, as it is summed up."""
        return forecast_BCYX[:, : self.field_channels].to(at_least_float32(forecast_BCYX.dtype))

    def _less(self, forecast_BTCYX: Tensor, zero_BCYX: Tensor) -> Tensor:
        """What has been forecast, the same, less the gradient of the changes before it."""
        fields, rest = forecast_BTCYX.split([self.field_channels, forecast_BTCYX.shape[2] - self.field_channels], dim=2)
        return torch.cat([fields + zero_BCYX[:, None].to(fields), rest], dim=2)

    def _check_boundaries(self, domain: Domain) -> None:
        if self.boundaries is not None and domain.grid.boundaries != self.boundaries:
            trained, given = (
                ", ".join(one.value for one in boundaries) for boundaries in (self.boundaries, domain.grid.boundaries)
            )
            raise InputError(
                f"the network was trained with the boundaries {trained} (north, south, longitude), this domain has "
                f"{given}. Pass `domain=trained.domain()` of what `load_network` gave; without a domain a network "
                f"works on a plane with zero boundaries."
            )

    def borrowed(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        """Parameters of parts that a module uses and does not call; who shards them brings together what is called."""
        for module in self.modules():
            for name in getattr(module, "borrows", ()):
                part = getattr(module, name)
                yield from () if part is None else ((module, parameter) for parameter in part.parameters())

    def losses(
        self,
        output: NetworkOutput,
        x_BTCYX: Tensor,
        target_BTCYX: Tensor,
        domain: Domain,
        valid: Tensor | None = None,
        fresh: Tensor | None = None,
        weights: tuple[float, ...] | None = None,
        lead_weights: tuple[float, ...] = (),
    ) -> TrainingLosses:
        """What training minimizes, and apart the forecast of the next step within the window, and the embedding.

        See `forecast_loss`, `embedding_loss` and `free_run_loss`: where the network runs freely after the window of W
        steps, for each lead from 2 on, the mean over W steps and leads counts, each lead with its weight.

        Args:
            fresh: how fresh the fields are that it was given, see `fill_gaps`. Default: all are known.
            lead_weights: of the leads from 2 on, beside 1 for each step of the window; the last one holds for those
                that follow. Default: 1.
        """
        forecast = self.forecast_loss(output, target_BTCYX, domain, valid, weights)
        whole, ahead = forecast, target_BTCYX.shape[1] - output.window
        of_leads = [*lead_weights[:ahead], *(lead_weights[-1:] or [1.0]) * (ahead - len(lead_weights))]
        if sum(of_leads):
            share = sum(of_leads) / (output.window + sum(of_leads))
            given = output.forecast_BTCYX, target_BTCYX, domain, valid
            free = free_run_loss(
                *given,
                weights,
                tuple(of_leads),
                fields=output.fields,
                window=output.window,
                begun_BCYX=None if fresh is None else fresh[:, output.window - 1] > 0,
            )
            whole = forecast * (1 - share) + free * share
        embedding = self.embedding_loss(output, x_BTCYX, domain, fresh)
        return TrainingLosses(whole + embedding * self.embedding_weight, forecast, embedding)

    def forecast_loss(
        self,
        output: NetworkOutput,
        target_BTCYX: Tensor,
        domain: Domain,
        valid: Tensor | None = None,
        weights: tuple[float, ...] | None = None,
    ) -> Loss:
        """Error of the forecast of the next step within the window, in units of its standard deviation squared.

        Args:
            output: of `forward`.
            target_BTCYX: the true tendencies, in units of their standard deviations, and diagnostics, normalised.
            valid: bool, like the target: cells that count. Default: all.
            weights: of the channels. Default: all count the same.
        """
        if output.valid_BT is not None:
            steps = output.valid_BT[:, :, None, None, None].expand_as(target_BTCYX)
            valid = steps if valid is None else valid & steps
        window = slice(output.window)
        valid = None if valid is None else valid[:, window]
        forecast_BTCYX, target_BTCYX = output.forecast_BTCYX[:, window], target_BTCYX[:, window]
        return area_mean_squared_error(forecast_BTCYX, target_BTCYX, domain, valid, weights)

    def embedding_loss(
        self, output: NetworkOutput, x_BTCYX: Tensor, domain: Domain, fresh_BTCYX: Tensor | None = None
    ) -> Loss:
        """Error of the coarse fields that the embeddings map to, at each step and at the leads that the sequence has.

        Args:
            output: of `forward` on ``x_BTCYX``, whose first channels are the fields.
            fresh_BTCYX: 1 where a field is known; a region's mean is over its known cells, a region without any counts
                in no loss. Default: all are known.
        """
        fields = x_BTCYX[:, :, : self.field_channels]
        means, counts = coarse_means(fields, domain, self.subspace.coarse_shape, fresh_BTCYX)
        target, counts = coarse_at_leads(means, counts, output.valid_BT, self.subspace.leads)
        return shared_mean_squared_error(output.coarse_BTKCRS, target, counts)

    def _segment(
        self,
        x_BTCYX: Tensor,
        states: Sequence[State | None],
        within: Domain,
        first_step: int,
        valid_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor, list[State]]:
        """Some steps through all layers and the forecast; only what later segments need comes out.

        States are those of the history, and then of the layers; ``within`` is the domain of the squares.
        """
        cells = x_BTCYX.shape[-2], x_BTCYX.shape[-1]
        x_BTCYX, frames = self.history(in_squares(x_BTCYX, self.scale_factor), states[0], valid_BT)
        h_BTCYX, after = x_BTCYX, [frames]
        for number, (layer, state) in enumerate(zip(self.layers, states[1:], strict=True)):
            out_BTCYX, last = layer(h_BTCYX, state, domain=within, first_step=first_step, valid_BT=valid_BT)
            h_BTCYX = h_BTCYX + out_BTCYX if number and self.residual else out_BTCYX
            after.append(last)
        in_parts = self.forecast(h_BTCYX.flatten(0, 1), x_BTCYX.flatten(0, 1))
        forecast_BTCYX = out_of_squares(in_parts, self.scale_factor, cells).unflatten(0, h_BTCYX.shape[:2])
        return forecast_BTCYX, within.mean(h_BTCYX, self.subspace.coarse_shape), after

    def _free_segment(
        self,
        feedback: Feedback,
        last_BCYX: Tensor,
        given_BTCYX: Tensor,
        change_BCYX: Tensor,
        states: Sequence[State | None],
        within: Domain,
        first_step: int,
    ) -> tuple[Tensor, Tensor, Sequence[State | None], Tensor]:
        """Some steps, each from what the one before has forecast.

        Where gradients do not go through that, the sum of the changes until a step has the gradient of its last alone.
        """
        forecasts, means = [], []
        for number in range(given_BTCYX.shape[1]):
            came_BCYX = change_BCYX if feedback.through else change_BCYX.detach()
            x_BTCYX = feedback.inputs(last_BCYX, given_BTCYX[:, number], came_BCYX)[:, None]
            forecast, mean, states = self._segment(x_BTCYX, states, within, first_step + number, None)
            zero_BCYX, change_BCYX = came_BCYX - change_BCYX, came_BCYX + self._change(forecast[:, 0])
            forecasts.append(forecast if feedback.through else self._less(forecast, zero_BCYX))
            means.append(mean)
        return torch.cat(forecasts, dim=1), torch.cat(means, dim=1), states, change_BCYX
