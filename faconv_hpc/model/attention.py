"""Axial attention over the whole globe from a tile: along every row, and along every column."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..spatial.axis import line_shares
from ..spatial.collectives import at_least_float32
from ..spatial.domain import Domain
from .kernels import Turn, check_kernels, kernels_for
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
        exchange, kernels: see `AxialAttention`.
    """

    axis: str
    """``"lon"`` or ``"lat"``: along which lines run."""

    def __init__(self, channels: int, heads: int, attention_channels: int, exchange: str, kernels: str) -> None:
        super().__init__()
        self.heads, self.exchange, self.kernels = heads, exchange, kernels
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
        qkv_BLN3HD = self._lines(qkv_BYXF).unflatten(-1, (3, self.heads, self.head_size))
        return self._lines(self._exchanged(qkv_BLN3HD, domain).flatten(3))

    def weights(self, qkv_BYXF: Tensor, domain: Domain) -> Iterator[Tensor]:
        """How much each cell of a line takes from each other one, line after line: (B, H, N, N), queries by keys, whose
        sum over keys is 1. What `forward` mixes by, for those who want to see it; of a single tile, without gradients.
        """
        assert domain.mesh.tiles == 1, "a line must be whole on this rank"
        qkv_BLN3HD = self._lines(qkv_BYXF).unflatten(-1, (3, self.heads, self.head_size))
        turn, bias = self._turn(domain, qkv_BLN3HD), self._key_bias(domain, qkv_BLN3HD)
        queries, keys, _ = qkv_BLN3HD.detach().unbind(3)
        for line in range(qkv_BLN3HD.shape[1]):
            q, k = (turn(one[:, line, None])[:, 0].transpose(1, 2) for one in (queries, keys))
            logits_BHNN = q @ k.transpose(-1, -2) * self.head_size**-0.5
            yield torch.softmax(logits_BHNN if bias is None else logits_BHNN + bias, dim=-1)

    def _lines(self, x_BYXF: Tensor) -> Tensor:
        """All lines of every sample, (B, L, N, F); and back."""
        raise NotImplementedError

    def _owned(self, domain: Domain) -> slice:
        """Which cells of a line are this tile's."""
        raise NotImplementedError

    def _turn(self, domain: Domain, like: Tensor) -> Turn:
        """Of the cells of a whole line."""
        raise NotImplementedError

    def _key_bias(self, domain: Domain, like: Tensor) -> Tensor | None:
        """(N',) what is added to the logits of each key of a whole line; None: nothing."""
        raise NotImplementedError

    def _exchanged(self, qkv_BLN3HD: Tensor, domain: Domain) -> Tensor:
        """Attention over whole lines, (B, L, N, H, D) of the owned cells: over gathered keys, or on lines dealt out.

        A line of one head is what is dealt out, so that ranks idle only where there are more of them than those.
        """
        (batch, lines, _, _, heads, size), sizes = qkv_BLN3HD.shape, domain.cuts.sizes(self.axis)
        turn, bias, exchange = self._turn(domain, qkv_BLN3HD), self._key_bias(domain, qkv_BLN3HD), self.exchange
        attend = kernels_for(self.kernels, qkv_BLN3HD, qkv_BLN3HD).attend
        if len(sizes) == 1:
            return attend(qkv_BLN3HD, None, turn, turn, bias)
        if exchange == "auto":  # the same on all ranks of the axis: they share their lines
            exchange = cheaper_exchange(batch * lines * heads, sizes, size, qkv_BLN3HD.dtype)
        if exchange == "gather":
            own, others = qkv_BLN3HD.split([1, 2], dim=3)
            return attend(own, domain.gather(others, self.axis, dim=2), turn.of(self._owned(domain)), turn, bias)
        of_heads = qkv_BLN3HD.permute(0, 1, 4, 2, 3, 5).flatten(0, 2).flatten(2)
        whole = domain.swap(of_heads, self.axis)[None].unflatten(3, (3, 1, size))
        mixed_LND = attend(whole, None, turn, turn, bias)[0, :, :, 0]
        owned_LND = domain.swap_back(mixed_LND, self.axis, of_heads.shape[0])
        mixed: Tensor = owned_LND.unflatten(0, (batch, lines, heads))
        return mixed.transpose(2, 3)


class RowAttention(LineAttention):
    """Along latitude circles. Angles are integer harmonics of longitude: only differences count, the circle closes."""

    axis = "lon"

    def _lines(self, x_BYXF: Tensor) -> Tensor:
        return x_BYXF

    def _owned(self, domain: Domain) -> slice:
        return domain.tile.slices[1]

    def _turn(self, domain: Domain, like: Tensor) -> Turn:
        return Turn(*domain.coordinates.turns_of_longitude(self.head_size // 2, like))

    def _key_bias(self, domain: Domain, like: Tensor) -> Tensor | None:
        return None  # the cells of a row are equal


class ColumnAttention(LineAttention):
    """Along meridians. Angles are proportional to latitude; keys are weighed by cell area (log area on the logits).

    A sum over the cells of a column stands for an integral over the sphere.
    """

    axis = "lat"

    def _lines(self, x_BYXF: Tensor) -> Tensor:
        return x_BYXF.transpose(1, 2)

    def _owned(self, domain: Domain) -> slice:
        return domain.tile.slices[0]

    def _turn(self, domain: Domain, like: Tensor) -> Turn:
        return Turn(*domain.coordinates.turns_of_latitude(self.head_size // 2, like))

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
        kernels: ``"eager"``, ``"compiled"`` or ``"triton"``, see `kernels_named`.
    """

    borrows = ("rows", "columns")
    """Parts whose projections are made together, not where they are called: who shards parameters must know."""

    def __init__(
        self, channels: int, heads: int = 1, reduction: int = 4, exchange: str = "auto", kernels: str = "eager"
    ) -> None:
        super().__init__()
        check_attention(heads, reduction, exchange)
        check_kernels(kernels)
        width = attention_channels(channels, reduction, heads)
        self.rows = RowAttention(channels, heads, width, exchange, kernels)
        self.columns = ColumnAttention(channels, heads, width, exchange, kernels)
        self.gamma = nn.Parameter(torch.full((channels,), 0.1))

    def reset_parameters(self) -> None:
        """Draws the projections anew."""
        self.rows.reset_parameters()
        self.columns.reset_parameters()

    def forward(self, h_BCYX: Tensor, domain: Domain) -> Tensor:
        """h and what attention adds to it: (B, C, Y, X). One product leads to all projections, one back from them."""
        batch, _, *cells = h_BCYX.shape
        of_rows, of_columns = self.projected(h_BCYX)
        taper_Y11 = domain.coordinates.pole_taper(h_BCYX)[:, None, None]
        mixed_BYXF = torch.cat([self.rows(of_rows, domain), self.columns(of_columns, domain) * taper_Y11], dim=-1)
        back = self.gamma[:, None] * torch.cat([self.rows.out, self.columns.out], dim=1)
        mixed_BFN = mixed_BYXF.flatten(1, 2).transpose(1, 2)
        attended_BCN = torch.baddbmm(h_BCYX.flatten(2), back.expand(batch, -1, -1), mixed_BFN)
        attended: Tensor = attended_BCN.unflatten(2, cells)
        return attended

    def projected(self, h_BCYX: Tensor) -> tuple[Tensor, Tensor]:
        """Queries, keys and values of rows and of columns, (B, Y, X, 3 C_a) each."""
        projections = torch.cat([self.rows.qkv, self.columns.qkv])
        qkv_BNF = torch.matmul(h_BCYX.flatten(2).transpose(1, 2), projections.t())
        of_rows, of_columns = qkv_BNF.unflatten(1, h_BCYX.shape[2:]).chunk(2, dim=-1)
        return of_rows, of_columns
