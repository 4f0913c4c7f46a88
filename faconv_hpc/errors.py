"""The one error a user can mend. Everything else that is raised is ours to mend."""

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_NO_REQUEUE = 93
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143  # what shells make of Ctrl-C and SIGTERM


class InputError(ValueError):
    """The user's input is wrong: a config, a file, a layout, the data in a store.

    The message gives the rule, the values, and the way out. The command line prints it without
    a traceback, ends every rank, and exits with code 2 (`EXIT_INPUT`).
    """


def exit_code_of(error: BaseException) -> int:
    """The exit code with which a process ends because of this error."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_INPUT if isinstance(error, InputError) else EXIT_FAILED
