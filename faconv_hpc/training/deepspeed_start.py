"""How DeepSpeed is started: without what training never uses, and without what it prints."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """DeepSpeed imports an optimizer (Muon) whose decorators load all of torch's compiler: 3 s of every start."""
    compiler = torch.compile
    torch.compile = lambda function=None, **options: function or (lambda one: one)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed prints its build steps; they are shown only if it fails."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)  # DeepSpeed's calls
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    except BaseException:
        print(printed.getvalue())
        raise
    finally:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
