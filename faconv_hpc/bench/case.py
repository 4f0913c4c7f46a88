"""What is measured side by side: the sizes of everything. No torch: a command that starts ranks has no use for it."""

import re
from typing import Literal

from ..config import Count, MeshConfig, Section
from ..errors import InputError

Precision = Literal["fp32", "tf32", "bf16"]


class BenchCase(Section):
    """Figures of one case are comparable.

    Attributes:
        nlat, nlon: cells of the grid, zero beyond its first and last row, periodic along them.
        inputs, hidden, steps, batch: C_x, C_h, T, B.
        precision: of activations and weights; tf32: float32 whose products a GPU may round.
        mesh: tiles, a rank each.
    """

    nlat: Count
    nlon: Count
    inputs: Count
    hidden: Count
    steps: Count
    batch: Count
    precision: Precision
    mesh: MeshConfig

    @property
    def grid(self) -> str:
        """Rows x columns."""
        return f"{self.nlat}x{self.nlon}"

    def check(self) -> None:
        """Raises InputError for a mesh of several replicas."""
        if self.mesh.replicas > 1:
            raise InputError(
                f"--mesh {self.mesh} has {self.mesh.replicas} replicas, which layers know nothing of: tiles are "
                f"LATxLON. Use --mesh {self.mesh.lat}x{self.mesh.lon}, and --batch for samples."
            )


def cells_of(grid: str) -> tuple[int, int]:
    """Rows and columns of a text such as 96x192; raises InputError."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", grid)
    if match is None:
        raise InputError(f"--grid is ROWSxCOLUMNS, got {grid!r}. Write for example 96x192.")
    return int(match[1]), int(match[2])
