"""How every tool under tools/ ends: log lines as they are, an error for the user as one line."""

import argparse
import faulthandler
import logging
import sys
from collections.abc import Callable
from typing import NoReturn

from pltmoe.errors import PLTMoEError


def positive(text: str) -> int:
    """Read a whole number of at least 1: ``type=positive`` of an option."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and leave the process with its exit code (None: 0).

    What a user can act on is one line on stderr and exit code 1; anything else is a defect and
    keeps its traceback.
    """
    faulthandler.enable(2)  # a crash in C code shows the stack of every thread
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        code = main()
    except PLTMoEError as error:
        sys.exit(f"error: {error}")
    sys.exit(code)
