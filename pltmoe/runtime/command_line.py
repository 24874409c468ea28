"""What the tools under tools/ share: arguments, and how they end.

They end with log lines as they are, and an error for the user as one line.
"""

import argparse
import errno
import faulthandler
import io
import logging
import os
import re
import select
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from pltmoe.errors import ConfigError, PLTMoEError

_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


def positive(text: str) -> int:
    """Read a whole number of at least 1: ``type=positive`` of an option."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def add_text_arguments(parser: argparse.ArgumentParser, json_key: str) -> None:
    """Add what a tool that reads text takes: ``inputs``, and ``--json-key`` with its default."""
    parser.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        help="text files (each one document, at most 64 MiB), JSONL files (a document a line), "
        "folders of them; also .gz .bz2 .xz .zst",
    )
    parser.add_argument(
        "--json-key",
        default=json_key,
        help="field of the text in JSONL, in every line (default %(default)s)",
    )


def output_file(text: str) -> Path:
    """Read the path of a file to write: ``type=output_file`` of an option. Makes its folder.

    Raises:
        ConfigError: it cannot be written; before the work for it, not after.
    """
    path = Path(text)
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name the file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        why = f"{path.parent}: {error.strerror}"
        raise ConfigError(f"{path}: cannot be written ({why})") from error


def open_closed_streams() -> None:
    """Put /dev/null where a standard stream is closed (``2>&-``): Python has None there, and the
    next file that is opened would take its number, and all that libraries write to it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(descriptor, True)
            setattr(sys, name, open(descriptor, mode, encoding="utf-8"))


def run_tool(main: Callable[[], int | None], *, takes_torchrun: bool = False) -> NoReturn:
    """Run ``main`` and leave the process with its exit code (None: 0).

    What a user can act on, files included, is one line on stderr and exit code 1; Ctrl-C is one
    line and 130; no reader of the output (``| head``) is 141. Anything else is a defect and keeps
    its traceback.
    """
    open_closed_streams()
    faulthandler.enable(2)  # a crash in C code shows the stack of every thread
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a text, or a path, that is not in it
    try:
        if not takes_torchrun:
            _check_alone()
        code = main()
        sys.stdout.flush()
    except PLTMoEError as error:
        sys.exit(f"error: {error}")
    except UnicodeEncodeError:
        odd = [argument for argument in sys.argv if re.search("[\ud800-\udfff]", argument)]
        if not odd:
            raise
        sys.exit(f"error: {odd[0]!r}: no UTF-8, which what writes or reads it needs; rename it")
    except BrokenPipeError:
        if _is_read():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left is written at the very end
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.filename is None and error.errno not in _DISK_IS_FULL:
            raise
        where = "" if error.filename is None else f"{error.filename}: "  # write() does not know
        sys.exit(f"error: {where}{error.strerror}")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    sys.exit(code)


def _check_alone() -> None:
    """Refuse several processes of torchrun: each would write the same files."""
    size = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ and size != "1":
        tool = Path(sys.argv[0]).name
        raise ConfigError(f"torchrun started {size} processes of {tool}, which is one: use python")


def _is_read() -> bool:
    """Whether what is printed still has a reader."""
    output = select.poll()
    output.register(1, 0)
    return not output.poll(0)  # an error or a hang-up, if anything
