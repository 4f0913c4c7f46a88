"""What a checkpoint says of itself."""

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

from ..spatial.grid import Span
from .contract import Contract
from .schedule import Leg

# 1 had no legs, 2 no contract, 3 no roles, 4 no states, 5 no annual cycle, 6 no long names; 7 and those before it made
# embeddings of the mean over the globe, by a part of the network that there is no more; to 8 every gap was 0, and the
# squeeze saw the state.
Format = Literal["faconv_hpc checkpoint 9"]
READ: tuple[str, ...] = get_args(Format)
FORMAT = "faconv_hpc checkpoint 9"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardFile(_Section):
    """One file of a checkpoint."""

    bytes: int
    sha256: str


class StoredTensor(_Section):
    """Where a parameter lies, its value in full precision; its moments stand beside it, see `optimizers.new_moment`."""

    file: str
    shape: tuple[int, ...]
    dtype: Literal["float32"] = "float32"


class StatePiece(_Section):
    """What one file has of the states that are carried on: of which samples of a step, on which cells."""

    places: tuple[int, ...]
    rows: Span
    columns: Span


class Manifest(_Section):
    """What a checkpoint holds and where it comes from.

    Attributes:
        run: which run wrote it; only that run removes it.
        updates: that the optimizer has made; fewer than steps where some were left out.
        mesh: REPLICASxLATxLON that it was written on; any other can read it.
        save_s: what copying and writing took the slowest rank.
        moments: of the optimizer, stored beside every parameter.
        identity: what a run must keep to go on as it began.
        contract: what the network was trained on.
        legs: of the learning rate.
        states: of the files that have some.
    """

    format: Format
    run: str
    step: int
    updates: int
    seed: int
    mesh: str
    zero_stage: int
    versions: dict[str, str]
    save_s: float = 0.0
    config: dict[str, Any]
    identity: dict[str, Any]
    contract: Contract
    moments: tuple[str, ...]
    legs: tuple[Leg, ...]
    parameters: dict[str, StoredTensor]
    states: dict[str, StatePiece] = {}
    files: dict[str, ShardFile]
