"""What a layer can be, in numbers alone: judged by the layers themselves, and before anything is imported."""

from collections.abc import Sequence

from ..errors import InputError

FUSES = ("sum", "concat")
EXCHANGES = ("auto", "gather", "swap")


def check_kernel(kernel_size: int) -> None:
    """Raises InputError for a kernel without a centre."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise InputError(f"kernel_size={kernel_size} has no centre. Use an odd size, such as 3.")


def check_layer(kernel_size: int, dilations: Sequence[int], fuse: str, attention_every: int) -> None:
    """Raises InputError for arguments of `FAConvLSTM2d` that no layer can have."""
    check_kernel(kernel_size)
    if not dilations or min(dilations) < 1:
        raise InputError(f"dilations={tuple(dilations)} must be one or more positive numbers, such as (1, 2, 4).")
    if fuse not in FUSES:
        raise InputError(f"fuse={fuse!r} is not known. Use one of {', '.join(FUSES)}.")
    if attention_every < 0:
        raise InputError(f"attention_every={attention_every} must be 0 (no attention) or a number of steps.")


def check_steps(steps: int) -> None:
    """Raises InputError for a sequence of none."""
    if steps < 1:
        raise InputError(f"a sequence of {steps} steps has no output and no last state. Give it one step or more.")


def attention_channels(channels: int, reduction: int, heads: int) -> int:
    """C_a, of queries, keys and values over all heads: C / reduction, rounded up to an even number for each head, as
    rotary positions turn pairs."""
    pairs = 2 * heads
    return pairs * -(-channels // (reduction * pairs))


def check_attention(heads: int, reduction: int, exchange: str) -> None:
    """Raises InputError for arguments of `AxialAttention` that no attention can have."""
    if exchange not in EXCHANGES:
        raise InputError(f"attention_exchange={exchange!r} is not known. Use one of {', '.join(EXCHANGES)}.")
    if heads < 1:
        raise InputError(f"attention_heads={heads} must be 1 or more.")
    if reduction < 1:
        raise InputError(f"attention_reduction={reduction} must be 1 (as many channels as the field has) or more.")


def check_coarse(coarse_shape: tuple[int, int], nlat: int, nlon: int) -> None:
    """Raises InputError for a coarse field with more regions than the grid has cells."""
    if coarse_shape[0] > nlat or coarse_shape[1] > nlon:
        raise InputError(
            f"a coarse field of {coarse_shape[0]} x {coarse_shape[1]} regions does not fit a grid of "
            f"{nlat} x {nlon} cells. Use at most as many (key model.coarse_shape)."
        )
