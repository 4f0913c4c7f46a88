"""What a bench has found: one JSON file, that a later one can be compared with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from ..config import Section
from ..errors import InputError
from ..spread import Spread
from .case import BenchCase


class Machine(Section):
    """What it was measured on.

    Attributes:
        device: name of the processor or the GPU, of each rank.
        threads: of each rank.
        cores: that this process may use, all ranks together.
    """

    kind: str
    device: str
    threads: int
    cores: int
    torch: str
    faconv_hpc: str


class Limits(Section):
    """What every rank could do at best, all at once.

    Attributes:
        products: GFLOP/s, by the sizes of a matrix product.
        copy_gb_s: GB read and written in a second.
    """

    products: dict[str, Spread]
    copy_gb_s: Spread

    @property
    def best_product(self) -> str:
        """The sizes of the fastest product."""
        return max(self.products, key=lambda name: self.products[name].median)


class OnTiles(Section):
    """A layer on tiles beside the same tiles of ranks that do not talk, and beside one rank with the whole grid.

    Attributes:
        apart_s, whole_s: seconds of a forward and a backward, of the slowest rank.
        efficiency: apart / tiles, of every repeat.
        speed_up: whole / tiles, of every repeat.
        exposed_s: by verb, seconds of a time step in which a rank is held up, mean over ranks; median over repeats.
    """

    apart_s: Spread
    whole_s: Spread
    efficiency: Spread
    speed_up: Spread
    exposed_s: dict[str, float]


class Costs(Section):
    """What a layer costs but for time; bytes are of the rank with most of them.

    Attributes:
        layout: of memory in which the library's convolutions were faster; ``""`` where there are none.
        multiply_adds: of one forward over the whole grid, see `multiply_adds`.
        kept_bytes: what autograd keeps for backward beside input, output and parameters.
        moved_bytes: see `least_moved_bytes`.
        peak_bytes: memory at most beyond what is there before; None: not known.
    """

    layer: str
    layout: str
    parameters: int
    multiply_adds: int
    kept_bytes: int
    moved_bytes: int
    peak_bytes: int | None


class Row(Costs):
    """One layer; seconds are of the rank with most of them.

    Attributes:
        forward_s, backward_s, total_s: seconds of a sequence.
        faster: by base, the base's seconds over this layer's, of every repeat.
        smaller: by base, the base's peak over this layer's, where both can be told.
        product_share: of the best product's FLOP/s; copy_share: of the copy's bytes per second.
    """

    forward_s: Spread
    backward_s: Spread
    total_s: Spread
    faster: dict[str, Spread]
    smaller: dict[str, float]
    product_share: float
    copy_share: float
    tiles: OnTiles | None = None


@dataclass(frozen=True)
class Fall:
    """A ratio that is smaller than in a reference, by more than its margin."""

    layer: str
    ratio: str
    before: float
    now: float


class BenchResult(Section):
    """All of it; ``fell``: beside a reference, if there was one."""

    format: Literal[1] = 1
    case: BenchCase
    repeats: int
    machine: Machine
    limits: Limits
    rows: tuple[Row, ...]
    fell: tuple[Fall, ...] = ()

    def to_json(self) -> str:
        """For a file."""
        return self.model_dump_json(indent=1)

    @classmethod
    def load(cls, path: Path) -> "BenchResult":
        """What `to_json` gave.

        Raises:
            InputError: there is no such file, or something else is in it.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            reason = error.strerror or str(error)
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
        raise InputError(f"{path} holds no result of faconv bench: {reason}. Make one: faconv bench --json > {path}")
