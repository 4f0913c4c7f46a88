"""Axial attention over the whole globe from a tile: along every row, and along every column."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..spatial.axis import line_shares
from ..spatial.collectives import at_least_float32
from ..spatial.domain import Domain
from .rules import attention_channels, check_attention


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

    With L lines of a head, C channels of it, P ranks, n cells of a line on a rank and N on all, counted in numbers:

    * gather receives k and v of all other ranks, 2 C L (P - 1) n, and holds them whole, 2 C L N, beside its own q and
      result, 2 C L n. Its adjoint receives as many gradients, in float32 or better, as they are summed. 2 phases.
      Tiles are filled up to the largest.
    * swap takes s = L / P whole lines: receives 3 C s (N - n) of q, k and v, gives the result back, C (L - s) n, and
      holds 4 C s N. Its adjoint moves the same numbers the other way. 4 phases. Where L does not divide, the rank
      with most lines counts.

    Even tiles of n' = C L n numbers: gather moves 4 (P - 1) n' and holds (2 P + 2) n', swap 8 (P - 1) / P n' and 4 n'.

    Args:
        lines: L, all lines along the axis through this tile, over all samples and heads.
        sizes: n of every rank of the axis.
        channels: C, of queries as of keys and values, of one head.
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

    def forward(self, qkv_BYXF: Tensor, domain: Domain) -> Tensor:
        """What the cells of each line gather from one another, (B, Y, X, C_a), from their 3 C_a projections.

        A cell's numbers lie side by side, which is how attention reads them: nothing is turned over but to be sent.
        """
        qkv_BLNF = self._lines(qkv_BYXF)
        q, k, v = qkv_BLNF.unflatten(-1, (3, self.heads, self.head_size)).unbind(3)
        cosine_N1D, sine_N1D = self._turn(domain, qkv_BYXF)
        q, k = (_turned(one, cosine_N1D, sine_N1D) for one in (q, k))
        return self._lines(self._exchanged(q, k, v, domain).flatten(3))

    def _lines(self, x_BYXF: Tensor) -> Tensor:
        """All lines of every sample, (B, L, N, F); and back."""
        raise NotImplementedError

    def _turn(self, domain: Domain, like: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 1, D / 2) cosines and sines of the angles by which the pairs of each owned cell of a line are turned."""
        raise NotImplementedError

    def _key_bias(self, domain: Domain, like: Tensor) -> Tensor | None:
        """(N',) what is added to the logits of each key of a whole line; None: nothing."""
        raise NotImplementedError

    def _exchanged(self, q: Tensor, k: Tensor, v: Tensor, domain: Domain) -> Tensor:
        """Attention over whole lines, (B, L, N, H, D) of the owned cells: over gathered keys, or on lines dealt out.

        A line of one head is what is dealt out, so that ranks idle only where there are more of them than those.
        """
        (batch, lines, _, heads, size), sizes = q.shape, domain.cuts.sizes(self.axis)
        bias, exchange = self._key_bias(domain, q), self.exchange
        if len(sizes) == 1:
            return _attend(q, k, v, bias)
        if exchange == "auto":  # the same on all ranks of the axis: they share their lines
            exchange = cheaper_exchange(batch * lines * heads, sizes, size, q.dtype)
        if exchange == "swap":
            of_heads = torch.cat([q, k, v], dim=-1).transpose(2, 3).flatten(0, 2)
            q, k, v = domain.swap(of_heads, self.axis)[None, :, :, None].chunk(3, dim=-1)
            owned_LNF = domain.swap_back(_attend(q, k, v, bias)[0, :, :, 0], self.axis, of_heads.shape[0])
            mixed: Tensor = owned_LNF.unflatten(0, (batch, lines, heads))
            return mixed.transpose(2, 3)
        k, v = domain.gather(torch.stack([k, v], dim=3), self.axis, dim=2).unbind(3)
        return _attend(q, k, v, bias)


class RowAttention(LineAttention):
    """Along latitude circles. Angles are integer harmonics of longitude: only differences count, the circle closes."""

    axis = "lon"

    def _lines(self, x_BYXF: Tensor) -> Tensor:
        return x_BYXF

    def _turn(self, domain: Domain, like: Tensor) -> tuple[Tensor, Tensor]:
        return domain.coordinates.turns_of_longitude(self.head_size // 2, like)

    def _key_bias(self, domain: Domain, like: Tensor) -> Tensor | None:
        return None  # the cells of a row are equal


class ColumnAttention(LineAttention):
    """Along meridians. Angles are proportional to latitude; keys are weighed by cell area (log area on the logits).

    A sum over the cells of a column stands for an integral over the sphere.
    """

    axis = "lat"

    def _lines(self, x_BYXF: Tensor) -> Tensor:
        return x_BYXF.transpose(1, 2)

    def _turn(self, domain: Domain, like: Tensor) -> tuple[Tensor, Tensor]:
        return domain.coordinates.turns_of_latitude(self.head_size // 2, like)

    def _key_bias(self, domain: Domain, like: Tensor) -> Tensor | None:
        return domain.coordinates.log_areas(like)


class AxialAttention(nn.Module):
    """h + gamma (row attention + cos(latitude) column attention), multi-head, with positions from coordinates.

    All meridians meet at a pole, and what each of them adds there belongs to the same point: only what vanishes
    towards the pole is continuous across it. Hence the cosine of latitude, on grids that end at a pole; on others
    column attention counts alike in all rows.

    Args:
        channels: C of the field that is attended to.
        heads: number of heads.
        reduction: C / C_a, see `attention_channels`. A quarter of the channels and one head did as well on shallow
            water as all of them and four (docs/measurements.md).
        exchange: ``"gather"`` keys and values, ``"swap"`` the split to whole lines, or ``"auto"``,
            the one that `cheaper_exchange` names. Both compute the same.
    """

    borrows = ("rows", "columns")
    """Parts whose projections are made together, not where they are called: who shards parameters must know."""

    def __init__(self, channels: int, heads: int = 1, reduction: int = 4, exchange: str = "auto") -> None:
        super().__init__()
        check_attention(heads, reduction, exchange)
        width = attention_channels(channels, reduction, heads)
        self.rows = RowAttention(channels, heads, width, exchange)
        self.columns = ColumnAttention(channels, heads, width, exchange)
        self.gamma = nn.Parameter(torch.full((channels,), 0.1))

    def reset_parameters(self) -> None:
        """Draws the projections anew."""
        self.rows.reset_parameters()
        self.columns.reset_parameters()

    def forward(self, h_BCYX: Tensor, domain: Domain) -> Tensor:
        """h and what attention adds to it: (B, C, Y, X). One product leads to all projections, one back from them."""
        batch, _, *cells = h_BCYX.shape
        projections = torch.cat([self.rows.qkv, self.columns.qkv])
        qkv_BNF = torch.matmul(h_BCYX.flatten(2).transpose(1, 2), projections.t())
        of_rows, of_columns = qkv_BNF.unflatten(1, cells).chunk(2, dim=-1)
        taper_Y11 = domain.coordinates.pole_taper(h_BCYX)[:, None, None]
        mixed_BYXF = torch.cat([self.rows(of_rows, domain), self.columns(of_columns, domain) * taper_Y11], dim=-1)
        back = self.gamma[:, None] * torch.cat([self.rows.out, self.columns.out], dim=1)
        mixed_BFN = mixed_BYXF.flatten(1, 2).transpose(1, 2)
        attended_BCN = torch.baddbmm(h_BCYX.flatten(2), back.expand(batch, -1, -1), mixed_BFN)
        attended: Tensor = attended_BCN.unflatten(2, cells)
        return attended


def _turned(x_BLNHD: Tensor, cosine_N1D: Tensor, sine_N1D: Tensor) -> Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864): pairs of channels turned by their angle."""
    first, second = x_BLNHD.chunk(2, dim=-1)
    return torch.cat([first * cosine_N1D - second * sine_N1D, first * sine_N1D + second * cosine_N1D], dim=-1)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias_M: Tensor | None) -> Tensor:
    """Scaled dot-product attention over the cells of each line: (B, L, N, H, D); keys and values may have others."""
    lines = q.shape[:2]
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))
    mask = None if bias_M is None else bias_M.expand(1, 1, q.shape[-2], -1)
    if not q.shape[0]:
        mixed = q + k[..., :1, :] * 0 + v[..., :1, :] * 0  # no lines: keep the graph
    else:
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    attended: Tensor = mixed.transpose(1, 2).unflatten(0, lines)
    return attended
