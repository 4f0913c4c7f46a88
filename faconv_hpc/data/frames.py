"""Which frames of a store samples may be drawn from."""

from ..errors import InputError
from .store import Store
from .times import describe_steps, is_regular


def check_frames(store: Store, frames: range, window: int) -> None:
    """Raises InputError for frames that the store lacks, or fewer than one window takes."""
    if window < 1:
        raise InputError(f"a window has at least 1 input frame, got {window}. Use data.window 1 or more.")
    if frames.step != 1 or frames.start < 0 or frames.stop > store.frames:
        raise InputError(
            f"frames must follow each other within the store's {store.frames}, got {frames.start} to {frames.stop} in "
            f"steps of {frames.step}. Use frames between 0 and {store.frames}; thin out times before preparing."
        )
    if len(frames) < window + 1:
        raise InputError(
            f"a window of {window} inputs needs {window + 1} frames (the last is a target), but frames "
            f"{frames.start} to {frames.stop} of {store.path} are {len(frames)}. Use a window of at most "
            f"{max(len(frames) - 1, 0)}, or more frames."
        )


def check_regular(store: Store, frames: range) -> None:
    """A network that steps in time takes all steps to be alike; raises InputError if they are not."""
    hours = store.time_hours[frames.start : frames.stop]
    if not is_regular(hours):
        smallest, largest = describe_steps(hours)
        raise InputError(
            f"the times of {store.path} are irregular: steps run from {smallest:g} to {largest:g} hours in frames "
            f"{frames.start} to {frames.stop}. Interpolate the source to equal steps, or accept them with "
            f"`data.allow_irregular_time: true` (then add the forcing 'step_hours', which tells the network)."
        )
