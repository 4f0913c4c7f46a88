"""The subspace head: one embedding per time step, refined over the sequence, and a coarse map back."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError
from ..spatial.domain import Domain
from .rules import check_coarse


class SubspaceHead(nn.Module):
    """Embeds the state of the globe at every step, and maps the embedding to a coarse field.

    ``e_t = W_e mean_area(h_t)``; to it a fixed seasonal encoding is added, sine and cosine harmonics of
    the day of the year, and one pre-norm transformer block over the sequence gives ``z_TE``. The linear
    map from z to a field of ``coarse_shape`` regions trains the embedding to hold the large scales.

    Every tile computes the same numbers from the same means; nothing is communicated here.

    Args:
        hidden_channels: C_h of the layer below.
        embedding_channels: E, even, a multiple of ``heads``.
        field_channels: C of the coarse field.
        coarse_shape: (rows, columns) of regions.
        heads: of the temporal attention.
    """

    def __init__(
        self,
        hidden_channels: int,
        embedding_channels: int,
        field_channels: int,
        coarse_shape: tuple[int, int],
        heads: int = 4,
    ) -> None:
        super().__init__()
        if embedding_channels % (2 * heads):
            raise InputError(
                f"embedding_channels={embedding_channels} over {heads} heads must give each head an even number. "
                f"Use a multiple of {2 * heads}."
            )
        self.heads, self.coarse_shape, self.field_channels = heads, coarse_shape, field_channels
        self.embed = nn.Linear(hidden_channels, embedding_channels)
        self.attention_norm = nn.LayerNorm(embedding_channels)
        self.qkv = nn.Linear(embedding_channels, 3 * embedding_channels)
        self.attention_out = nn.Linear(embedding_channels, embedding_channels)
        self.mlp_norm = nn.LayerNorm(embedding_channels)
        self.mlp_in = nn.Linear(embedding_channels, 2 * embedding_channels)
        self.mlp_out = nn.Linear(2 * embedding_channels, embedding_channels)
        self.to_coarse = nn.Linear(embedding_channels, field_channels * math.prod(coarse_shape))

    def forward(
        self, mean_BTC: Tensor, year_fraction_BT: Tensor, valid_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """From the mean of h at every step to z (B, T, E) and the coarse field (B, T, C, rows, columns).

        Args:
            mean_BTC: area-weighted mean of the last layer's h.
            year_fraction_BT: position in the year, 0 to 1, float64, from real timestamps.
            valid_BT: bool, steps that others may attend to; default: all.
        """
        e_BTE = self.embed(mean_BTC)
        z_BTE = e_BTE + seasonal_encoding(year_fraction_BT, e_BTE.shape[-1]).to(e_BTE.dtype)
        z_BTE = z_BTE + self._attend(self.attention_norm(z_BTE), valid_BT)
        z_BTE = z_BTE + self.mlp_out(functional.silu(self.mlp_in(self.mlp_norm(z_BTE))))
        coarse = self.to_coarse(z_BTE).unflatten(-1, (self.field_channels, *self.coarse_shape))
        return z_BTE, coarse

    def _attend(self, z_BTE: Tensor, valid_BT: Tensor | None) -> Tensor:
        qkv = self.qkv(z_BTE).unflatten(-1, (3, self.heads, -1))
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        keys = None
        if valid_BT is not None:  # a sample without any valid step attends to all: it counts in no loss
            keys = (valid_BT | ~valid_BT.any(1, keepdim=True))[:, None, None, :]
        mixed_BHTD = functional.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        attended: Tensor = self.attention_out(mixed_BHTD.transpose(1, 2).flatten(2))
        return attended


def seasonal_encoding(year_fraction_BT: Tensor, channels: int) -> Tensor:
    """(B, T, channels): sine and cosine of the first channels / 2 harmonics of the year."""
    harmonic = torch.arange(1, channels // 2 + 1, device=year_fraction_BT.device, dtype=torch.float64)
    angle = 2 * math.pi * year_fraction_BT.double()[..., None] * harmonic
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


@torch.no_grad()
def coarse_means(
    x_BTCYX: Tensor, domain: Domain, coarse_shape: tuple[int, int], known_BTCYX: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Area-weighted means of x over regions of whole cells: (B, T, C, rows, columns) on every tile.

    A target, not for use inside the network: gradients do not flow. Row r of the grid belongs to region
    row ``floor(r * rows / nlat)``, columns alike.

    Args:
        x_BTCYX: this tile's cells; 0 where missing.
        known_BTCYX: 1 where a cell is known, 0 where it is missing; default: all are known.

    Returns:
        the means over known cells, and which regions have any (None: all).
    """
    check_coarse(coarse_shape, domain.grid.nlat, domain.grid.nlon)
    if known_BTCYX is None:
        return _region_means(x_BTCYX, domain, coarse_shape), None
    known = _region_means(known_BTCYX, domain, coarse_shape)
    means = _region_means(x_BTCYX * known_BTCYX, domain, coarse_shape)
    return means / known.clamp_min(torch.finfo(known.dtype).eps), known > 0


def _region_means(x_BTCYX: Tensor, domain: Domain, coarse_shape: tuple[int, int]) -> Tensor:
    rows = _shares(domain.coordinates.row_areas(x_BTCYX), coarse_shape[0])[:, slice(*domain.tile.rows)]
    columns = _shares(x_BTCYX.new_ones(domain.grid.nlon), coarse_shape[1])[:, slice(*domain.tile.columns)]
    return domain.total(rows @ x_BTCYX @ columns.T)


def _shares(weights: Tensor, parts: int) -> Tensor:
    """(parts, N) matrix that averages N weighed cells over consecutive parts."""
    part = torch.arange(weights.numel(), device=weights.device) * parts // weights.numel()
    member = functional.one_hot(part, parts).T.to(weights.dtype) * weights
    return member / member.sum(1, keepdim=True)
