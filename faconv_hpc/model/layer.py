"""FAConvLSTM2d: a drop-in replacement for ConvLSTM2d whose cost grows with cells, not with kernels."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..autograd import as_given
from ..errors import InputError
from ..spatial.collectives import at_least_float32
from ..spatial.domain import Domain
from .attention import AxialAttention
from .bank import Bank
from .kernels import check_kernels, kernels_for
from .recurrence import State, as_taken, zero_state
from .rules import check_layer
from .sweep import Joined, Seal, Steps, Sweep, Weights
from .taps import Taps


class _Squeezing(nn.Linear):
    """A linear map in the type of its input, whatever its weights are kept in."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class FAConvLSTM2d(nn.Module):
    """Factorized-attention ConvLSTM over a sequence of fields.

    One step (u: bottleneck, m: mixed at each dilation, s: squeeze-and-excitation)::

        u = W_x x_t + W_h h + b_u                      1x1, C_b channels
        m_d = K_d * u                                  depthwise, one bank for all gates
        s = sigmoid(V_2 silu(V_1 mean_area(W_x x_t + b_u)))    one factor per dilation and channel, or 1 for all
        i, f, g, o = W_a sum_d(s_d m_d) + b_a          1x1
        c = sigmoid(f + p_f c) c + sigmoid(i + p_i c) tanh(g)
        h = sigmoid(o + p_o c) tanh(c)                 with the new c
        every K-th step: h = h + gamma (row attention(h) + cos(latitude) column attention(h)), see `AxialAttention`

    The equations are written from the abstract of Nji and Wang, arXiv 2601.10914. The squeeze looks at what comes in,
    not at the state: forecasts of shallow water were as good, of three seeds (docs/measurements.md). As the means of
    all steps are taken at once, a step waits for its halo alone.

    Args:
        in_channels, hidden_channels: C_x and C_h.
        kernel_size: odd size of the depthwise kernels.
        dilations: one depthwise kernel each.
        bottleneck_channels: C_b, default C_h / 2.
        fuse: ``"sum"`` adds the weighed branches, ``"concat"`` gives W_a all of them.
        se_reduction: the squeeze has C_b / se_reduction channels; 0: there is none.
        peephole: whether the gates see the cell state.
        attention_every: K; 0 switches attention off.
        attention_heads, attention_reduction, attention_exchange: see `AxialAttention`.
        kernels: ``"eager"``, ``"compiled"`` or ``"triton"``, see `kernels_named`.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        *,
        kernel_size: int = 3,
        dilations: Sequence[int] = (1, 2, 4),
        bottleneck_channels: int | None = None,
        fuse: str = "sum",
        se_reduction: int = 4,
        peephole: bool = True,
        attention_every: int = 4,
        attention_heads: int = 1,
        attention_reduction: int = 4,
        attention_exchange: str = "auto",
        kernels: str = "eager",
    ) -> None:
        super().__init__()
        check_layer(kernel_size, dilations, fuse, se_reduction, attention_every)
        bottleneck = bottleneck_channels or max(hidden_channels // 2, 1)
        branches = len(dilations)
        self.in_channels, self.hidden_channels, self.fuse = in_channels, hidden_channels, fuse
        self.attention_every, self.dilations = attention_every, tuple(dilations)
        check_kernels(kernels)
        self.kernels = kernels
        taps = Taps.of(kernel_size, dilations)
        side_by_side = tuple(Taps.of(kernel_size, (dilation,), taps.reach) for dilation in dilations)
        self.passes = side_by_side if fuse == "concat" else (taps,)
        self.input_weight = nn.Parameter(torch.empty(bottleneck, in_channels))
        self.hidden_weight = nn.Parameter(torch.empty(bottleneck, hidden_channels))
        self.bottleneck_bias = nn.Parameter(torch.empty(bottleneck))
        self.mixing_weight = nn.Parameter(torch.empty(branches, bottleneck, kernel_size**2))
        squeezed = max(bottleneck // se_reduction, 1) if se_reduction else 0
        self.squeeze = _Squeezing(bottleneck, squeezed) if squeezed else None
        self.excite = _Squeezing(squeezed, branches * bottleneck) if squeezed else None
        fused = bottleneck * (branches if fuse == "concat" else 1)
        self.expansion_weight = nn.Parameter(torch.empty(4 * hidden_channels, fused))
        self.expansion_bias = nn.Parameter(torch.empty(4 * hidden_channels))
        self._add_peephole(peephole)
        self.attention = (
            AxialAttention(hidden_channels, attention_heads, attention_reduction, attention_exchange, kernels)
            if attention_every
            else None
        )
        self._owner_DKN: Tensor | None
        owner = functional.one_hot(torch.tensor(taps.owner), len(taps.offsets)).float()
        self.register_buffer("_owner_DKN", None if fuse == "concat" else owner, persistent=False)
        self.reset_parameters()

    def _add_peephole(self, peephole: bool) -> None:
        weight = torch.zeros(3, self.hidden_channels)
        if peephole:
            self.peephole_weight: Tensor = nn.Parameter(weight)
        else:
            self.register_buffer("peephole_weight", weight, persistent=False)

    def reset_parameters(self) -> None:
        """Draws the weights anew. Variance is kept through the chain 1x1 - depthwise - 1x1; forget bias 1."""
        nn.init.xavier_uniform_(self.input_weight)
        nn.init.orthogonal_(self.hidden_weight)
        nn.init.normal_(self.mixing_weight, std=self.mixing_weight.shape[-1] ** -0.5)
        nn.init.xavier_uniform_(self.expansion_weight)
        of_squeeze = [one.bias for one in (self.squeeze, self.excite) if one is not None]
        for bias in (self.bottleneck_bias, self.expansion_bias, *of_squeeze):
            nn.init.zeros_(bias)
        forget = slice(self.hidden_channels, 2 * self.hidden_channels)
        nn.init.ones_(self.expansion_bias.data[forget])

    def forward(
        self,
        x_BTCYX: Tensor,
        state: State | None = None,
        *,
        domain: Domain | None = None,
        first_step: int = 0,
        valid_BT: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Runs a sequence. A sequence continued in pieces equals the whole.

        Args:
            x_BTCYX: this tile's input, (B, T, C_x, Y, X). A layer whose weights are in bf16 takes it in float32, too,
                and rounds what it makes of it, not the input.
            state: (h, c) to start from; zeros by default.
            domain: where the tile lies; default: all there is, a plane with zero boundaries.
            first_step: number of steps before this piece, so that attention keeps its period.
            valid_BT: bool, for sequences of different length: at a step that is not valid a sample keeps
                its state and repeats its output, as Keras does with a mask; what the input has there does not count.
                The same on every tile.

        Returns:
            h of every step (B, T, C_h, Y, X), and the state after the last. Backward needs the former: what changes it
            in place raises there. Under autocast all is computed in the weights' type.

        Raises:
            InputError: an input or a state of another shape, type or device, or a sequence of no steps.
        """
        domain = domain or Domain.plane(*x_BTCYX.shape[-2:])
        x_BTCYX = as_taken(x_BTCYX, self.in_channels, self.input_weight.dtype, valid_BT)
        with as_given(x_BTCYX.device):
            return self._swept(x_BTCYX, state, domain, first_step, valid_BT)

    def dilation_weights(self, x_BTCYX: Tensor, domain: Domain) -> Tensor:
        """How much each dilation counts in each channel of the bottleneck, (B, T, D, C_b): its factor from squeeze and
        excitation, times the length of its kernel. For those who want to see it. Collective over the tiles.

        Args:
            x_BTCYX: what the layer is given.
        """
        weights_BTDC: Tensor = self._factors(x_BTCYX, domain) * self.mixing_weight.norm(dim=-1)
        return weights_BTDC

    def _factors(self, x_BTCYX: Tensor, domain: Domain) -> Tensor:
        """(B, T, D, C_b) of squeeze and excitation, in float32 or better. One mean over all tiles for all steps, and
        on the way back the sum of its gradients."""
        kind = at_least_float32(self.input_weight.dtype)
        shape = *x_BTCYX.shape[:2], *self.mixing_weight.shape[:2]
        if self.squeeze is None or self.excite is None:
            return self.mixing_weight.new_ones((), dtype=kind).expand(shape)
        weight, bias = self.input_weight.to(kind), self.bottleneck_bias.to(kind)
        mean_BTC = functional.linear(domain.mean(x_BTCYX, dtype=kind), weight, bias)
        excited: Tensor = self.excite(functional.silu(self.squeeze(mean_BTC)))
        return torch.sigmoid(excited).view(shape)

    def _swept(
        self, x_BTCYX: Tensor, state: State | None, domain: Domain, first_step: int, valid_BT: Tensor | None
    ) -> tuple[Tensor, State]:
        domain.check_cells(x_BTCYX)
        h: Tensor | None
        h, c = state or (None, zero_state(x_BTCYX, self.hidden_channels)[1])
        activations = self.input_weight.dtype
        _check_state(h, c, x_BTCYX, self.hidden_channels, activations)
        h_BTCYX = x_BTCYX.new_empty(*x_BTCYX.shape[:2], *c.shape[1:], dtype=activations)
        weights, seal = self._weights(), Seal()
        bank = Bank(self.passes, self._owner_DKN, kernels_for(self.kernels, h_BTCYX, c))
        # Before x is split: the gradient of all its cells then comes first, and the means' is added in its place.
        banks = bank.weights(self._factors(x_BTCYX, domain), self.mixing_weight.to(weights.bias.dtype))
        ends, parts = self._ends(first_step, x_BTCYX.shape[1]), list[Tensor]()
        spans = [slice(*span) for span in pairwise((0, *ends))]
        sizes = [span.stop - span.start for span in spans]
        pieces = x_BTCYX.split(sizes, dim=1)
        keep = torch.is_grad_enabled() and any(
            one is not None and one.requires_grad for one in (x_BTCYX, h, c, *banks, *weights)
        )
        steps = Steps(bank, domain.halo_exchange(self.passes[0].reach), domain.remembered, seal, keep)
        for span, x, *own in zip(spans, pieces, *(one.split(sizes) for one in banks), strict=True):
            valid = None if valid_BT is None else valid_BT[:, span]
            early, last, c = Sweep.call(steps, h_BTCYX[:, span], valid, x, h, c, *own, *weights)
            h = self._attended(last, domain, valid) if self._attends(first_step + span.stop) else last
            parts += early, h
        result = Joined.call(h_BTCYX, ends, *parts)
        if keep:
            seal.close(result)
        return result, (parts[-1], c)

    def _attends(self, step: int) -> bool:
        """Whether attention follows after so many steps."""
        return self.attention is not None and step % self.attention_every == 0

    def _attended(self, h_BCYX: Tensor, domain: Domain, valid_BT: Tensor | None) -> Tensor:
        assert self.attention is not None
        attended: Tensor = self.attention(h_BCYX, domain)
        return attended if valid_BT is None else attended.where(valid_BT[:, -1, None, None, None], h_BCYX)

    def _ends(self, first_step: int, length: int) -> list[int]:
        """The step after each sweep: where attention follows, and after the last."""
        return [step for step in range(1, length + 1) if step == length or self._attends(first_step + step)]

    def _weights(self) -> Weights:
        """In float32 or better, however they are kept."""
        weights = Weights(
            self.input_weight,
            self.hidden_weight,
            self.bottleneck_bias,
            self.expansion_weight,
            self.expansion_bias,
            self.peephole_weight,
        )
        return weights.in_float32()


def _check_state(
    h_BCYX: Tensor | None, c_BCYX: Tensor, x_BTCYX: Tensor, hidden_channels: int, activations: torch.dtype
) -> None:
    """A state of other samples, cells or types would be read as what it is not."""
    wanted = (x_BTCYX.shape[0], hidden_channels, *x_BTCYX.shape[-2:])
    for name, one in (("h", h_BCYX), ("c", c_BCYX)):
        if one is not None and (one.shape != wanted or one.device != x_BTCYX.device):
            raise InputError(
                f"the state's {name} has shape {tuple(one.shape)} on {one.device}, this input needs {wanted} on "
                f"{x_BTCYX.device}. Pass the state of the same samples and tile, or none to begin."
            )
    if h_BCYX is not None and h_BCYX.dtype != activations:
        raise InputError(
            f"the state's h is {h_BCYX.dtype}, the layer computes in {activations}. Bring it to that type, "
            f"h.to({activations}); c stays float32 or better."
        )
