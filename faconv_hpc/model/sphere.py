"""Neural operators on the sphere, those of the package torch-harmonics: layers without memory that see all of it.

Their transforms need whole latitude circles and meridians: one tile has them all.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import InputError
from ..spatial.domain import Domain
from .memoryless import Memoryless
from .rules import check_one_tile, check_package, check_scale


class SphericalOperator2d(Memoryless):
    """A whole model of torch-harmonics between the inputs and C_h channels; its weights are bound to the grid's size.

    ``sfno``: the Spherical Fourier Neural Operator (Bonev et al., arXiv 2306.03838); ``lsno``: the Local Spherical
    Neural Operator (Liu-Schiaffini et al., arXiv 2402.16845). It computes in float32.

    Args:
        cell: ``"sfno"`` or ``"lsno"``.
        in_channels, hidden_channels: C_x and C_h, which all of its blocks have.
        blocks: how many.
        globe: rows, columns and kind of the grid, see `rules.globe_of`.
        scale_factor: cells along either side of the grid that become one between the first and the last block.
    """

    def __init__(
        self,
        cell: str,
        in_channels: int,
        hidden_channels: int,
        blocks: int,
        *,
        globe: tuple[int, int, str],
        scale_factor: int = 1,
    ) -> None:
        check_package(cell)
        from torch_harmonics.examples import models

        super().__init__()
        self.cell, self.in_channels, self.hidden_channels = cell, in_channels, hidden_channels
        made = {"sfno": models.SphericalFourierNeuralOperator, "lsno": models.LocalSphericalNeuralOperator}[cell]
        rows, columns, kind = globe
        check_scale(cell, scale_factor, rows, columns)
        self.shape = (rows, columns)
        sizes: dict[str, Any] = {"in_chans": in_channels, "out_chans": hidden_channels, "embed_dim": hidden_channels}
        self.operator = made(img_size=(rows, columns), grid=kind, num_layers=blocks, scale_factor=scale_factor, **sizes)
        for module in list(self.operator.modules()):
            for name, weight in list(module.named_parameters(recurse=False)):
                if weight.is_complex():
                    parametrize.register_parametrization(module, name, _Complex(), unsafe=True)

    def _of_inputs(self, x_NCYX: Tensor, domain: Domain) -> Tensor:
        check_one_tile(self.cell, domain.tiles)
        if x_NCYX.shape[-2:] != self.shape:
            raise InputError(
                f"a network of cell={self.cell} is bound to the {self.shape[0]} x {self.shape[1]} cells that it was "
                f"made for, these are {x_NCYX.shape[-2]} x {x_NCYX.shape[-1]}. Regrid them, or train on theirs."
            )
        h_NCYX: Tensor = self.operator(x_NCYX.to(next(self.parameters()).dtype))
        return h_NCYX


class _Complex(nn.Module):
    """Of real and imaginary parts: who shards parameters, saves or exports them knows real numbers alone."""

    def forward(self, real: Tensor, imaginary: Tensor) -> Tensor:
        return torch.complex(real.float(), imaginary.float())

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.real.clone(), weight.imag.clone()
