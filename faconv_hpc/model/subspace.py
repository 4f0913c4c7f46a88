"""The subspace head: an embedding of every step from its past alone, and a coarse map of it, now and later."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError
from ..spatial.domain import Domain
from .rules import check_coarse, check_steps
from .state import Past

REGION_SHARE = 4  # channels of a region are so many times fewer than those of the embedding
HARMONICS = 4  # of the year that the seasonal encoding has


class SubspaceHead(nn.Module):
    """Embeds the state of the globe at every step, and maps the embedding to coarse fields.

    ``e_t = W_e r_t``, where r are the means of h over ``coarse_shape`` regions, each narrowed by the same ``W_r`` to
    E / 4 channels. To it comes a seasonal encoding, harmonics of the day of the year by a matrix that begins at 0: what
    the calendar has in z is what training put there. One pre-norm transformer block gives ``z_TE``; step t attends to
    itself and the steps before it, ``past`` in all, with a bias by their age. So z of a time depends on nothing that
    comes after it.

    What z is trained to hold: one linear map takes it to the field of ``coarse_shape`` regions at its step, and with
    ``z + A z``, again and again, in place of z, to the fields of the ``leads`` steps that follow.

    Every tile computes the same numbers from the same means; nothing is communicated here.

    Args:
        hidden_channels: C_h of the layer below.
        embedding_channels: E, even, a multiple of ``heads``.
        field_channels: C of the coarse field.
        coarse_shape: (rows, columns) of regions.
        past: steps that a step attends to, itself among them.
        leads: steps ahead of which the coarse field is told, too.
        seasonal_encoding: whether there is one.
        heads: of the temporal attention.
    """

    def __init__(
        self,
        hidden_channels: int,
        embedding_channels: int,
        field_channels: int,
        coarse_shape: tuple[int, int],
        *,
        past: int = 8,
        leads: int = 2,
        seasonal_encoding: bool = True,
        heads: int = 4,
    ) -> None:
        super().__init__()
        if embedding_channels % (2 * heads):
            raise InputError(
                f"embedding_channels={embedding_channels} over {heads} heads must give each head an even number. "
                f"Use a multiple of {2 * heads}."
            )
        if past < 1:
            raise InputError(f"embedding_past={past} must be 1 (a step attends to itself alone) or more.")
        if leads < 0:
            raise InputError(f"embedding_leads={leads} must be 0 (the coarse field of the step alone) or more.")
        self.heads, self.field_channels, self.past, self.leads = heads, field_channels, past, leads
        self.coarse_shape = (coarse_shape[0], coarse_shape[1])
        narrow = max(embedding_channels // REGION_SHARE, 1)
        self.region = nn.Linear(hidden_channels, narrow)
        self.embed = nn.Linear(narrow * math.prod(coarse_shape), embedding_channels)
        self.season = nn.Linear(2 * HARMONICS, embedding_channels, bias=False) if seasonal_encoding else None
        self.attention_norm = nn.LayerNorm(embedding_channels)
        # None on keys: it would add the same to all logits of a query, and have a gradient of rounding errors alone.
        self.qkv = nn.Linear(embedding_channels, 3 * embedding_channels, bias=False)
        self.bias_of_age = nn.Parameter(torch.zeros(past, heads))
        self.attention_out = nn.Linear(embedding_channels, embedding_channels)
        self.mlp_norm = nn.LayerNorm(embedding_channels)
        self.mlp_in = nn.Linear(embedding_channels, 2 * embedding_channels)
        self.mlp_out = nn.Linear(2 * embedding_channels, embedding_channels)
        self.ahead = nn.Linear(embedding_channels, embedding_channels, bias=False) if leads else None
        self.to_coarse = nn.Linear(embedding_channels, field_channels * math.prod(coarse_shape))
        for begins_at_0 in (self.season, self.ahead):
            if begins_at_0 is not None:
                nn.init.zeros_(begins_at_0.weight)

    def forward(
        self,
        means_BTCRS: Tensor,
        year_fraction_BT: Tensor,
        past: Past | None = None,
        valid_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From the means of h at every step to what is known of it.

        Args:
            means_BTCRS: area-weighted means of the last layer's h, see `Domain.mean`.
            year_fraction_BT: position in the year, 0 to 1, float64, from real timestamps.
            past: of the steps before; default: there were none.
            valid_BT: bool, steps that others may attend to; default: all.

        Returns:
            z (B, T, E), the coarse fields (B, T, 1 + leads, C, R, S), and the tokens (B, T, E) that `Past` keeps.
        """
        check_steps(means_BTCRS.shape[1])
        if valid_BT is not None:  # whatever fills up a sequence would reach the others as 0 times no number
            year_fraction_BT = year_fraction_BT.where(valid_BT, 0)
        r_BTRSN = self.region(means_BTCRS.movedim(2, -1))
        token_BTE = self.embed(r_BTRSN.flatten(2))
        if self.season is not None:
            token_BTE = token_BTE + self.season(seasonal_encoding(year_fraction_BT, HARMONICS).to(token_BTE.dtype))
        past = Past.none(token_BTE, self.past - 1) if past is None else past
        z_BTE = token_BTE + self._attend(token_BTE, past, valid_BT)
        z_BTE = z_BTE + self.mlp_out(functional.silu(self.mlp_in(self.mlp_norm(z_BTE))))
        at_leads = [z_BTE]
        while self.ahead is not None and len(at_leads) <= self.leads:
            at_leads.append(at_leads[-1] + self.ahead(at_leads[-1]))
        coarse = self.to_coarse(torch.stack(at_leads, dim=2)).unflatten(-1, (self.field_channels, *self.coarse_shape))
        return z_BTE, coarse, token_BTE

    def after(self, past: Past | None, token_BTE: Tensor, valid_BT: Tensor | None = None) -> Past:
        """What is kept for the steps that follow these."""
        past = Past.none(token_BTE, self.past - 1) if past is None else past
        return past.then(token_BTE, valid_BT).newest(self.past - 1)

    def _attend(self, token_BTE: Tensor, past: Past, valid_BT: Tensor | None) -> Tensor:
        steps = token_BTE.shape[1]
        seen_BNE = self.attention_norm(torch.cat([past.tokens_BNE.to(token_BTE.dtype), token_BTE], dim=1))
        qkv = self.qkv(seen_BNE).unflatten(-1, (3, self.heads, -1))
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        bias_BHTN = self._bias(past, token_BTE, valid_BT)
        mixed_BHTD = functional.scaled_dot_product_attention(q[:, :, -steps:], k, v, attn_mask=bias_BHTN)
        attended: Tensor = self.attention_out(mixed_BHTD.transpose(1, 2).flatten(2))
        return attended

    def _bias(self, past: Past, token_BTE: Tensor, valid_BT: Tensor | None) -> Tensor:
        """(B, H, T, N) of the logits: by age, in steps that were valid; what is not there, or too old, has none."""
        steps = token_BTE.shape[1]
        valid_BT = torch.ones_like(token_BTE[..., 0], dtype=torch.bool) if valid_BT is None else valid_BT
        there_BN = torch.cat([past.there_BN, valid_BT], dim=1)
        count_BN = there_BN.long().cumsum(1)
        age_BTN = count_BN[:, -steps:, None] - count_BN[:, None, :]
        order_N = torch.arange(there_BN.shape[1], device=there_BN.device)
        own_TN = order_N[-steps:, None] == order_N  # a step that is not valid has itself: it counts in no loss
        seen_BTN = there_BN[:, None] & (order_N[-steps:, None] >= order_N) & (age_BTN < self.past) | own_TN
        of_age_BTNP = functional.one_hot(age_BTN.clamp(0, self.past - 1), self.past).to(self.bias_of_age.dtype)
        bias_BHTN = (of_age_BTNP @ self.bias_of_age).permute(0, 3, 1, 2)
        return bias_BHTN.masked_fill(~seen_BTN[:, None], -math.inf).to(token_BTE.dtype)


def seasonal_encoding(year_fraction_BT: Tensor, harmonics: int) -> Tensor:
    """(B, T, 2 harmonics): sine and cosine of the first harmonics of the year."""
    harmonic = torch.arange(1, harmonics + 1, device=year_fraction_BT.device, dtype=torch.float64)
    angle = 2 * math.pi * year_fraction_BT.double()[..., None] * harmonic
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


@torch.no_grad()
def coarse_means(
    x_BTCYX: Tensor, domain: Domain, coarse_shape: tuple[int, int], fresh_BTCYX: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Area-weighted means of x over regions of whole cells: (B, T, C, R, S) on every tile.

    A target, not for use inside the network: gradients do not flow. The regions are those of `Domain.mean`.

    Args:
        x_BTCYX: this tile's cells.
        fresh_BTCYX: 1 where a cell is known; less where it has an older value, or none. Default: all are known.

    Returns:
        the means over known cells, and which regions have any (None: all).
    """
    check_coarse(coarse_shape, domain.grid.nlat, domain.grid.nlon)
    if fresh_BTCYX is None:
        return domain.mean(x_BTCYX, coarse_shape), None
    known_BTCYX = (fresh_BTCYX == 1).to(x_BTCYX)
    known = domain.mean(known_BTCYX, coarse_shape)
    means = domain.mean(x_BTCYX * known_BTCYX, coarse_shape)
    return means / known.where(known > 0, 1), known > 0


def coarse_at_leads(
    means_BTCRS: Tensor, counts_BTCRS: Tensor | None, valid_BT: Tensor | None, leads: int
) -> tuple[Tensor, Tensor]:
    """The coarse fields of each step and of those after it, (B, T, 1 + leads, C, R, S), and which of them count.

    Those beyond the last step do not, and none of or from a step that is not valid.
    """
    steps = means_BTCRS.shape[1]
    now = torch.arange(steps, device=means_BTCRS.device)[:, None]
    at_TK = now + torch.arange(1 + leads, device=means_BTCRS.device)
    place_TK = at_TK.clamp_max(steps - 1)
    counts = (at_TK < steps)[None]
    if valid_BT is not None:
        counts = counts & valid_BT[:, place_TK] & valid_BT[:, :, None]
    target = means_BTCRS[:, place_TK]
    counts = counts[..., None, None, None].expand_as(target)
    return target, counts if counts_BTCRS is None else counts & counts_BTCRS[:, place_TK]
