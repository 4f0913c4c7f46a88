"""Axial attention over the whole globe from a tile: along every row, and along every column."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..spatial.axis import line_shares
from ..spatial.collectives import at_least_float32
from ..spatial.domain import Domain
from .kernels import pointwise
from .rules import check_attention


@dataclass(frozen=True, order=True)
class ExchangeCost:
    """What attention along one axis costs the rank with most to do, forward and backward together.

    Attributes:
        moved_bytes: received from other ranks.
        phases: collectives, one after the other.
        held_bytes: q, k, v and the result, kept for backward.
    """

    moved_bytes: int
    phases: int
    held_bytes: int


def exchange_costs(lines: int, sizes: Sequence[int], channels: int, dtype: torch.dtype) -> dict[str, ExchangeCost]:
    """The cost of each way to attend along an axis.

    With L lines, C channels, P ranks, n cells of a line on a rank and N on all, counted in numbers:

    * gather receives k and v of all other ranks, 2 C L (P - 1) n, and holds them whole, 2 C L N, beside its own q and
      result, 2 C L n. Its adjoint receives as many gradients, in float32 or better, as they are summed. 2 phases.
      Tiles are filled up to the largest.
    * swap takes s = L / P whole lines: receives 3 C s (N - n) of q, k and v, gives the result back, C (L - s) n, and
      holds 4 C s N. Its adjoint moves the same numbers the other way. 4 phases. Where L does not divide, the rank
      with most lines counts.

    Even tiles of n' = C L n numbers: gather moves 4 (P - 1) n' and holds (2 P + 2) n', swap 8 (P - 1) / P n' and 4 n'.

    Args:
        lines: L, all lines along the axis through this tile, over all samples.
        sizes: n of every rank of the axis.
        channels: C, of queries as of keys and values, over all heads.
        dtype: of the activations.
    """
    ranks, whole = len(sizes), sum(sizes)
    number, summed = dtype.itemsize, at_least_float32(dtype).itemsize
    gathered = 2 * channels * lines * (ranks - 1) * max(sizes)
    shares = line_shares(lines, ranks)
    swapped = max(
        4 * channels * (share * (whole - size) + (lines - share) * size)
        for share, size in zip(shares, sizes, strict=True)
    )
    return {
        "gather": ExchangeCost(gathered * (number + summed), 2, 2 * channels * lines * (max(sizes) + whole) * number),
        "swap": ExchangeCost(swapped * number, 4, 4 * channels * max(shares) * whole * number),
    }


def cheaper_exchange(lines: int, sizes: Sequence[int], channels: int, dtype: torch.dtype) -> str:
    """``"gather"`` or ``"swap"``: the one of the `exchange_costs` that moves fewer bytes.

    At equal bytes the one with fewer phases, then the one that holds less. So float32 on two even tiles gathers, and
    holds 6 n' where swap would hold 4 n'; on more tiles, and in bf16, swap moves less and holds less.
    """
    costs = exchange_costs(lines, sizes, channels, dtype)
    return min(costs, key=lambda name: costs[name])


class LineAttention(nn.Module):
    """Multi-head attention among the cells of every line along one axis, over all tiles: the base of rows and columns.

    Args:
        channels: C of the field that is attended to.
        heads: number of heads.
        attention_channels: C_a, channels of queries, keys and values together over heads.
        exchange: see `AxialAttention`.
    """

    axis: str
    """``"lon"`` or ``"lat"``: along which lines run."""

    def __init__(self, channels: int, heads: int, attention_channels: int, exchange: str) -> None:
        super().__init__()
        self.heads, self.exchange = heads, exchange
        self.head_size = attention_channels // heads
        self.qkv = nn.Parameter(torch.empty(3 * attention_channels, channels))
        self.out = nn.Parameter(torch.empty(channels, attention_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the projections anew: uniform, Glorot."""
        nn.init.xavier_uniform_(self.qkv)
        nn.init.xavier_uniform_(self.out)

    def forward(self, h_BCYX: Tensor, domain: Domain) -> Tensor:
        """What the cells of each line gather from one another: (B, C, Y, X)."""
        qkv_BLCN = self._lines(pointwise(self.qkv, h_BCYX))
        qkv_LCN = self._turned(qkv_BLCN.flatten(0, 1), domain)
        mixed_LCN = self._exchanged(qkv_LCN, qkv_BLCN.shape[:2], domain)
        return pointwise(self.out, self._cells(mixed_LCN, qkv_BLCN.shape[:2]))

    def _lines(self, x_BCYX: Tensor) -> Tensor:
        """All lines of every sample, (B, L, C, N)."""
        raise NotImplementedError

    def _cells(self, x_LCN: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `_lines`, for lines of all samples; ``shape`` is (B, lines per sample)."""
        raise NotImplementedError

    def _position(self, domain: Domain, like: Tensor) -> Tensor:
        """(N,) angle of each owned cell of a line, in radians."""
        raise NotImplementedError

    def _key_bias(self, domain: Domain, like: Tensor) -> Tensor | None:
        """(N',) what is added to the logits of each key of a whole line; None: nothing."""
        raise NotImplementedError

    def _turned(self, qkv_LCN: Tensor, domain: Domain) -> Tensor:
        """Queries and keys turned by their positions: harmonic m of the angle, in float64, turns the m-th pair."""
        position = self._position(domain, qkv_LCN.new_empty(0, dtype=torch.float64))
        harmonic = torch.arange(1, self.head_size // 2 + 1, dtype=torch.float64, device=qkv_LCN.device)
        q, k, v = self._heads(qkv_LCN)
        return torch.stack([*_rotate(q, k, harmonic[:, None] * position), v], dim=1).flatten(1, 3)

    def _exchanged(self, qkv_LCN: Tensor, shape: torch.Size, domain: Domain) -> Tensor:
        """Attention over whole lines, (L, C_a, N) of the owned cells: over gathered keys, or on lines dealt out."""
        axis, sizes, (lines, channels, _) = self.axis, domain.cuts.sizes(self.axis), qkv_LCN.shape
        bias, exchange = self._key_bias(domain, qkv_LCN), self.exchange
        if exchange == "auto":  # the same on all ranks of the axis: they share their lines
            exchange = cheaper_exchange(lines, sizes, channels // 3, qkv_LCN.dtype)
        if exchange == "swap":
            q, k, v = self._heads(domain.swap(qkv_LCN, axis))
            return domain.swap_back(_attend(q, k, v, bias).flatten(1, 2), axis, lines)
        q, k, v = self._heads(qkv_LCN)
        if len(sizes) > 1:
            keys_values = domain.gather(self._cells(qkv_LCN[:, channels // 3 :], shape), axis)
            whole_LCN = self._lines(keys_values).flatten(0, 1)
            k, v = whole_LCN.unflatten(1, (2, self.heads, self.head_size)).unbind(1)
        return _attend(q, k, v, bias).flatten(1, 2)

    def _heads(self, qkv_LCN: Tensor) -> tuple[Tensor, ...]:
        heads: tuple[Tensor, ...] = qkv_LCN.unflatten(1, (3, self.heads, self.head_size)).unbind(1)
        return heads


class RowAttention(LineAttention):
    """Along latitude circles. Angles are integer harmonics of longitude: only differences count, the circle closes."""

    axis = "lon"

    def _lines(self, x_BCYX: Tensor) -> Tensor:
        return x_BCYX.transpose(1, 2)

    def _cells(self, x_LCN: Tensor, shape: torch.Size) -> Tensor:
        x_BLCN: Tensor = x_LCN.unflatten(0, shape)
        return x_BLCN.transpose(1, 2)

    def _position(self, domain: Domain, like: Tensor) -> Tensor:
        return domain.coordinates.longitudes(like)

    def _key_bias(self, domain: Domain, like: Tensor) -> Tensor | None:
        return None  # the cells of a row are equal


class ColumnAttention(LineAttention):
    """Along meridians. Angles are proportional to latitude; keys are weighed by cell area (log area on the logits).

    A sum over the cells of a column stands for an integral over the sphere.
    """

    axis = "lat"

    def _lines(self, x_BCYX: Tensor) -> Tensor:
        return x_BCYX.permute(0, 3, 1, 2)

    def _cells(self, x_LCN: Tensor, shape: torch.Size) -> Tensor:
        x_BLCN: Tensor = x_LCN.unflatten(0, shape)
        return x_BLCN.permute(0, 2, 3, 1)

    def _position(self, domain: Domain, like: Tensor) -> Tensor:
        return domain.coordinates.latitudes(like)

    def _key_bias(self, domain: Domain, like: Tensor) -> Tensor | None:
        tiny = math.log(torch.finfo(torch.float32).tiny)
        area = domain.coordinates.row_areas(like.new_empty(0, dtype=torch.float64))
        return area.log().clamp_min(tiny).to(like.dtype)


class AxialAttention(nn.Module):
    """gamma (row attention + cos(latitude) column attention), multi-head, with positions from coordinates.

    All meridians meet at a pole, and what each of them adds there belongs to the same point: only what vanishes
    towards the pole is continuous across it. Hence the cosine of latitude, on grids that end at a pole; on others
    column attention counts alike in all rows.

    Args:
        channels: C of the field that is attended to.
        heads: number of heads.
        attention_channels: C_a <= C, channels of queries, keys and values together over heads.
        exchange: ``"gather"`` keys and values, ``"swap"`` the split to whole lines, or ``"auto"``,
            the one that `cheaper_exchange` names. Both compute the same.
    """

    def __init__(
        self, channels: int, heads: int = 4, attention_channels: int | None = None, exchange: str = "auto"
    ) -> None:
        super().__init__()
        attention_channels = attention_channels or channels
        check_attention(channels, heads, attention_channels, exchange)
        self.rows = RowAttention(channels, heads, attention_channels, exchange)
        self.columns = ColumnAttention(channels, heads, attention_channels, exchange)
        self.gamma = nn.Parameter(torch.full((channels,), 0.1))

    def reset_parameters(self) -> None:
        """Draws the projections anew."""
        self.rows.reset_parameters()
        self.columns.reset_parameters()

    def forward(self, h_BCYX: Tensor, domain: Domain) -> Tensor:
        """What attention adds to h: (B, C, Y, X)."""
        taper = domain.coordinates.pole_taper(h_BCYX)[:, None]
        attended: Tensor = self.rows(h_BCYX, domain) + self.columns(h_BCYX, domain) * taper
        return self.gamma[:, None, None] * attended


def _rotate(q_LHDN: Tensor, k_LHDN: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions (Su et al., arXiv 2104.09864): pairs of channels turned by their angle."""
    cosine, sine = angles.cos().to(q_LHDN.dtype), angles.sin().to(q_LHDN.dtype)

    def turned(x_LHDN: Tensor) -> Tensor:
        first, second = x_LHDN.chunk(2, dim=2)
        return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=2)

    return turned(q_LHDN), turned(k_LHDN)


def _attend(q_LHDN: Tensor, k_LHDM: Tensor, v_LHDM: Tensor, bias_M: Tensor | None) -> Tensor:
    """Scaled dot-product attention over the cells of each line: (L, H, D, N)."""
    q, k, v = (x.transpose(-1, -2).contiguous() for x in (q_LHDN, k_LHDM, v_LHDM))
    mask = None if bias_M is None else bias_M.expand(1, 1, q.shape[-2], -1)
    if not q.shape[0]:
        return (q + k[..., :1, :] * 0 + v[..., :1, :] * 0).transpose(-1, -2)  # no lines: keep the graph
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(-1, -2)
