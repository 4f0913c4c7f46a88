"""What a variable is to a network, and where it stands in what the network takes and gives."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from ..errors import InputError

if TYPE_CHECKING:
    from torch import Tensor  # for configs, too, come here

ChosenRole = Literal["prognostic", "forcing", "diagnostic"]
"""``prognostic``: in and out; ``forcing``: in only; ``diagnostic``: out only."""
Role = Literal["prognostic", "forcing", "diagnostic", "static"]
"""The same, or ``static``: in only, without time, which a store decides."""


class Variable(BaseModel):
    """A field of a network: how it is called, in what units, and its statistics over the frames of training.

    Attributes:
        role: see `Role`.
        log1p: the scale s of ``z = log(1 + x / s)``, that the network sees instead of x; None: it sees x.
        harmonics: of the `AnnualCycle` c(t) of each cell; the network sees ``z = x - c(t)``. None: it sees x.
        may_miss: whether cells may be missing; the network has an input that says how fresh it is.
        loss_weight: of its squared error among those of the others.
        inherited: whether the statistics are of the data of the network whose weights the run began with.
        mean, std, tendency_std: of z; the last of its change from a frame to the next.
        long_name: as the store has it; of a level it ends in `` at 500 hPa``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    units: str
    role: Role = "prognostic"
    log1p: float | None = None
    harmonics: int | None = None
    may_miss: bool = False
    loss_weight: float = 1.0
    inherited: bool = False
    mean: float
    std: float
    tendency_std: float
    long_name: str = ""

    @property
    def kind(self) -> tuple[str | float | None, ...]:
        """What makes it another one, although it has the same name: how it is transformed."""
        return self.log1p, self.harmonics

    @property
    def scale(self) -> float:
        """What a field is divided by: 1 where it never changes."""
        return self.std or 1.0

    @property
    def target_scale(self) -> float:
        """What a target is divided by: the change to the next frame, or a diagnostic's departure from its mean."""
        return (self.tendency_std or 1.0) if self.role == "prognostic" else self.scale

    def value(self, z: "Tensor") -> "Tensor":
        """x in its units, but for its annual cycle."""
        return z if self.log1p is None else self.log1p * z.expm1()

    def change(self, z: "Tensor", dz: "Tensor") -> "Tensor":
        """By how much x changes, in its units, where z changes by dz; exact also where the change is small."""
        return dz if self.log1p is None else self.log1p * z.exp() * dz.expm1()


def logarithm(x: NDArray[np.float32], scale: float, name: str) -> NDArray[np.float32]:
    """``log(1 + x / scale)``, near x / scale where x is small; NaN, what is missing, stays NaN.

    Raises:
        InputError: x is not above -scale somewhere.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        z: NDArray[np.float32] = np.log1p(x / np.float32(scale))
        bad = x <= -scale
    if bad.any():
        raise InputError(
            f"the variable {name!r} is {x[bad].min():g} somewhere, and log(1 + x / {scale:g}) is a number only above "
            f"{-scale:g}. Give it a larger scale in data.log1p, or leave it out there."
        )
    return z


class Channels:
    """Where the variables stand among the channels of a network: it is built and fed by this.

    Args:
        variables: of any roles.
        forcings: names of computed inputs, see `forcings.FORCINGS`.

    Attributes:
        prognostic, forcing, diagnostic, static: the variables of each role, in their order.
        forcings: names of computed inputs.
        fields: variables that are read for every time, in this order: prognostic, forcing, diagnostic.
        targets: variables that are forecast: prognostic, diagnostic.
        masked: those of the inputs that may miss cells, and have an input that says how fresh they are: `fill_gaps`.
        inputs: names of the input channels: prognostic, forcing, ``fresh_`` and the name of each that is masked,
            static, and computed ones.
    """

    def __init__(self, variables: Sequence[Variable], forcings: Sequence[str] = ()) -> None:
        by_role = [tuple(one for one in variables if one.role == role) for role in get_args(Role)]
        self.prognostic, self.forcing, self.diagnostic, self.static = by_role
        self.forcings = tuple(forcings)
        given = self.prognostic + self.forcing
        self.fields, self.targets = given + self.diagnostic, self.prognostic + self.diagnostic
        self.masked = tuple(one for one in given if one.may_miss)
        masks, static = (f"fresh_{one.name}" for one in self.masked), (one.name for one in self.static)
        self.inputs = (*(one.name for one in given), *masks, *static, *self.forcings)

    @property
    def given(self) -> int:
        """How many of the fields, from the first, are inputs: prognostic and forcing."""
        return len(self.prognostic) + len(self.forcing)

    @property
    def remembered(self) -> int:
        """How many of the inputs, from the first, a network that sees earlier frames has of them.

        Fields, and how fresh they are: what is static it has anyway, what is computed follows from time and place.
        """
        return self.given + len(self.masked)

    @cached_property
    def fresh(self) -> tuple[int | None, ...]:
        """For each prognostic variable the input channel that says how fresh it is."""
        places = {one.name: self.given + place for place, one in enumerate(self.masked)}
        return tuple(places.get(one.name) for one in self.prognostic)

    @cached_property
    def loss_weights(self) -> tuple[float, ...] | None:
        """Of the targets; None if all are the same."""
        weights = tuple(one.loss_weight for one in self.targets)
        return None if len(set(weights)) == 1 else weights
