"""Errors with a message for the user, the exit codes, and what the terminal shows of an error.

Everything else that is raised is ours to mend, and shown with its traceback. Which codes put a Slurm job back into its
queue stands in launch/job.sh.
"""

import errno
import traceback

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_STOPPED = 75  # a signal asked for it or a rank was lost; the run can go on: sysexits.h's "try again"
EXIT_NO_PROGRESS = 93  # starting again has led nowhere several times
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143  # what shells make of Ctrl-C and SIGTERM
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
OUT_OF_REACH = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN)
"""A file system that fails or is away; the file itself may be whole."""


class InputError(ValueError):
    """The user's input is wrong: a config, a file, a layout, the data in a store.

    The message gives the rule, the values, and the way out. The command line prints it without
    a traceback, ends every rank, and exits with code 2 (`EXIT_INPUT`).
    """


class SilentClusterError(InputError):
    """The cluster answers nobody, or takes no more jobs at the moment: the same may work later."""


class RunError(RuntimeError):
    """The run cannot go on for a reason outside the code: a full disk, weights that drift, a rank that is silent.

    The message says what is left and what to do; a traceback would not help.
    """


class TryAgainError(RunError):
    """Nothing is wrong with the run, it can go on from its checkpoint (exit code `EXIT_STOPPED`)."""


class LostRankError(TryAgainError):
    """A rank is silent or was killed.

    Attributes:
        told_to_leave: SIGTERM came before: the launcher has seen another rank end, which has said why.
    """

    told_to_leave = False


class NoProgressError(RunError):
    """Starting again has led nowhere several times, so it is not tried again (exit code `EXIT_NO_PROGRESS`)."""


def exit_code_of(error: BaseException) -> int:
    """The exit code with which a process ends because of this error."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, NoProgressError):
        return EXIT_NO_PROGRESS
    if isinstance(error, TryAgainError) or is_out_of_reach(error):
        return EXIT_STOPPED
    return EXIT_INPUT if isinstance(error, InputError) else EXIT_FAILED


def is_out_of_reach(error: BaseException) -> bool:
    """Whether a file system failed here and now; from another node it may answer."""
    return isinstance(error, OSError) and error.errno in OUT_OF_REACH


def describe(error: BaseException, rank: int | None = None) -> str:
    """What the terminal shows: the message alone for what the user can mend, else the traceback."""
    where = "" if rank is None else f" (rank {rank})"
    if isinstance(error, InputError):
        return f"faconv: error{where}: {error}"
    if isinstance(error, KeyboardInterrupt):
        return f"faconv: interrupted{where}" + (f": {error}" if str(error) else "")
    if isinstance(error, FloatingPointError | RunError):
        return f"faconv: failed{where}: {error}"
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return (
            f"faconv: failed{where}: {error.strerror}: {error.filename or 'a file of the run'}. The checkpoints that "
            f"are there stay. Make room, and start the same command again."
        )
    if is_out_of_reach(error):
        return f"faconv: failed{where}: {error}. The file system is away, or fails: start the same command again."
    lines = "".join(traceback.format_exception(error))
    return f"{lines}faconv: failed{where}: {type(error).__name__}: {error}"
