"""What a network says of its targets, in their units."""

import torch
from torch import Tensor

from ..data.variables import Channels


def in_units(fields_CYX: Tensor, reference_CYX: Tensor, channels: Channels) -> Tensor:
    """(..., C, Y, X) float64 by how much the targets differ from a reference, in their units.

    Args:
        fields_CYX: of prognostic variables the change over their `Variable.target_scale`, of diagnostic ones the
            departure from their mean.
        reference_CYX: see `reference_of`.
    """
    each = zip(channels.targets, reference_CYX.unbind(-3), fields_CYX.double().unbind(-3), strict=True)
    return torch.stack([variable.change(z, dz * variable.target_scale) for variable, z, dz in each], dim=-3)


def reference_of(start_CYX: Tensor, channels: Channels) -> Tensor:
    """(..., C, Y, X) float64 what the changes of the targets are from, as the network sees it: the last input; of
    diagnostic variables the mean.

    Args:
        start_CYX: the last input, all channels or those of the prognostic variables.
    """
    parts = []
    for place, variable in enumerate(channels.targets):
        mean_YX = torch.full_like(start_CYX[..., 0, :, :], variable.mean, dtype=torch.float64)
        prognostic = variable.role == "prognostic"
        parts.append(start_CYX[..., place, :, :] * variable.scale + mean_YX if prognostic else mean_YX)
    return torch.stack(parts, dim=-3)
