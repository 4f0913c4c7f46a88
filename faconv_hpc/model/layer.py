"""FAConvLSTM2d: a drop-in replacement for ConvLSTM2d whose cost grows with cells, not with kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError
from ..spatial.domain import Domain
from .attention import AxialAttention
from .kernels import Taps, kernels_for, pointwise
from .recurrence import State, unrolled, zero_state
from .rules import check_layer


class FAConvLSTM2d(nn.Module):
    """Factorized-attention ConvLSTM over a sequence of fields.

    One step (u: bottleneck, m: mixed at each dilation, s: squeeze-and-excitation)::

        u = W_x x_t + W_h h + b_u                      1x1, C_b channels
        m_d = K_d * u                                  depthwise, one bank for all gates
        s = sigmoid(V_2 silu(V_1 mean_area(u)))        one factor per dilation and channel
        i, f, g, o = W_a sum_d(s_d m_d) + b_a          1x1
        c = sigmoid(f + p_f c) c + sigmoid(i + p_i c) tanh(g)
        h = sigmoid(o + p_o c) tanh(c)                 with the new c
        every K-th step: h = h + gamma (row attention(h) + cos(latitude) column attention(h)), see `AxialAttention`

    The equations are written from the abstract of Nji and Wang, arXiv 2601.10914.

    Args:
        in_channels, hidden_channels: C_x and C_h.
        kernel_size: odd size of the depthwise kernels.
        dilations: one depthwise kernel each.
        bottleneck_channels: C_b, default C_h / 2.
        fuse: ``"sum"`` adds the weighed branches, ``"concat"`` gives W_a all of them.
        se_reduction: the squeeze has C_b / se_reduction channels.
        peephole: whether the gates see the cell state.
        attention_every: K; 0 switches attention off.
        attention_heads, attention_channels, attention_exchange: see `AxialAttention`.
        kernels: ``"eager"`` or ``"compiled"``, see `kernels_for`.
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
        attention_heads: int = 4,
        attention_channels: int | None = None,
        attention_exchange: str = "auto",
        kernels: str = "eager",
    ) -> None:
        super().__init__()
        check_layer(kernel_size, dilations, fuse, attention_every)
        bottleneck = bottleneck_channels or max(hidden_channels // 2, 1)
        squeezed = max(bottleneck // se_reduction, 1)
        branches = len(dilations)
        self.in_channels, self.hidden_channels, self.fuse = in_channels, hidden_channels, fuse
        self.attention_every = attention_every
        self.kernels = kernels_for(kernels)
        self.taps = Taps.of(kernel_size, dilations)
        self.input_weight = nn.Parameter(torch.empty(bottleneck, in_channels))
        self.hidden_weight = nn.Parameter(torch.empty(bottleneck, hidden_channels))
        self.bottleneck_bias = nn.Parameter(torch.empty(bottleneck))
        self.mixing_weight = nn.Parameter(torch.empty(branches, bottleneck, kernel_size**2))
        self.squeeze = nn.Linear(bottleneck, squeezed)
        self.excite = nn.Linear(squeezed, branches * bottleneck)
        fused = bottleneck * (branches if fuse == "concat" else 1)
        self.expansion_weight = nn.Parameter(torch.empty(4 * hidden_channels, fused))
        self.expansion_bias = nn.Parameter(torch.empty(4 * hidden_channels))
        self._add_peephole(peephole)
        self.attention = (
            AxialAttention(hidden_channels, attention_heads, attention_channels, attention_exchange)
            if attention_every
            else None
        )
        self._owner_DKN: Tensor
        owner = functional.one_hot(torch.tensor(self.taps.owner), len(self.taps.offsets)).float()
        self.register_buffer("_owner_DKN", owner, persistent=False)
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
        for bias in (self.bottleneck_bias, self.expansion_bias, self.squeeze.bias, self.excite.bias):
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
            x_BTCYX: this tile's input, (B, T, C_x, Y, X).
            state: (h, c) to start from; zeros by default.
            domain: where the tile lies; default: all there is, a plane with zero boundaries.
            first_step: number of steps before this piece, so that attention keeps its period.
            valid_BT: bool, for sequences of different length: at a step that is not valid a sample keeps
                its state and repeats its output, as Keras does with a mask. The same on every tile.

        Returns:
            h of every step (B, T, C_h, Y, X), and the state after the last.
        """
        _check_input(x_BTCYX, self.in_channels)
        domain = domain or Domain.plane(*x_BTCYX.shape[-2:])
        of_steps = self._input_bottleneck(x_BTCYX, domain)

        def step(number: int, before: State) -> State:
            h, c = self._step(*of_steps[number], before, domain)
            if self.attention is not None and (first_step + number + 1) % self.attention_every == 0:
                h = h + self.attention(h, domain)
            return h, c

        start = state if state is not None else zero_state(x_BTCYX, self.hidden_channels)
        return unrolled(step, x_BTCYX.shape[1], start, valid_BT)

    def _input_bottleneck(self, x_BTCYX: Tensor, domain: Domain) -> list[tuple[Tensor, Tensor]]:
        """W_x x + b of each step, with its halo and mean; of all at once: one product, one exchange.

        They are unbound and not indexed, which in backward would fill a gradient of all steps for each of them.
        """
        batch = x_BTCYX.shape[:2]
        u = pointwise(self.input_weight, x_BTCYX.flatten(0, 1), self.bottleneck_bias)
        padded, mean = domain.pad_and_mean(u, self.taps.reach)
        return list(zip(padded.unflatten(0, batch).unbind(1), mean.unflatten(0, batch).unbind(1), strict=True))

    def _step(self, padded_BCYX: Tensor, mean_BC: Tensor, state: State, domain: Domain) -> State:
        h, c = state
        recurrent, recurrent_mean = domain.pad_and_mean(pointwise(self.hidden_weight, h), self.taps.reach)
        excited = self.excite(functional.silu(self.squeeze(mean_BC + recurrent_mean)))
        scale_BDC = torch.sigmoid(excited).unflatten(1, self.mixing_weight.shape[:2])
        mixed = self._mix(padded_BCYX + recurrent, scale_BDC)
        gates = (4, self.hidden_channels)
        a_BGCYX = pointwise(self.expansion_weight, mixed).unflatten(1, gates)
        bias_GC = self.expansion_bias.unflatten(0, gates).to(c.dtype)
        h_new, c_new = self.kernels.gates(a_BGCYX, bias_GC, c, self.peephole_weight.to(c.dtype))
        return h_new.to(h.dtype), c_new

    def _mix(self, u_BCYX: Tensor, scale_BDC: Tensor) -> Tensor:
        """Branches weighed by s and added, as one kernel per sample, or weighed and concatenated."""
        weight_BDCK = scale_BDC.unsqueeze(-1) * self.mixing_weight
        if self.fuse == "sum":
            return self.kernels.mix(u_BCYX, self._tap_weights(weight_BDCK), self.taps)
        branches = [
            self.kernels.mix(u_BCYX, self._tap_weights(weight_BDCK[:, d : d + 1], d), self.taps)
            for d in range(weight_BDCK.shape[1])
        ]
        return torch.cat(branches, dim=1)

    def _tap_weights(self, weight_BDCK: Tensor, first: int = 0) -> Tensor:
        """(B, C, taps): kernel weights added where kernels of several dilations share a cell."""
        owner_DKN = self._owner_DKN[first : first + weight_BDCK.shape[1]].to(weight_BDCK.dtype)
        return torch.einsum("bdck,dkn->bcn", weight_BDCK, owner_DKN)


def _check_input(x_BTCYX: Tensor, in_channels: int) -> None:
    if x_BTCYX.dim() != 5 or x_BTCYX.shape[2] != in_channels:
        raise InputError(
            f"the layer takes (batch, time, {in_channels} channels, rows, columns), got {tuple(x_BTCYX.shape)}. "
            f"Permute the tensor, or change in_channels."
        )
