"""How every tool under tools/ ends: log lines as they are, an error for the user as one line."""

import logging
import sys
from collections.abc import Callable
from typing import NoReturn

from pltmoe.errors import PLTMoEError


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and leave the process with its exit code (None: 0).

    What a user can act on is one line on stderr and exit code 1; anything else is a defect and
    keeps its traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        code = main()
    except PLTMoEError as error:
        sys.exit(f"error: {error}")
    sys.exit(code)
