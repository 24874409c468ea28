"""Ports for servers that tests start, stop and start again."""

import os
import socket
from contextlib import suppress

_FIRST, _OF_A_WORKER, _WORKERS = 30_100, 200, 13
"""Below 32768, from where the system gives a port to whoever asks for any: between a look for a
free one and its use, or while a server is stopped, another test's connection would take it."""
_NUMBERS = iter(range(_OF_A_WORKER))


def free_port() -> int:
    """Return a port that nobody listens on, and that no other call in this suite returns.

    Raises:
        RuntimeError: all of this worker's ports were returned before or are taken.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = _FIRST + _OF_A_WORKER * (worker % _WORKERS)
    for number in _NUMBERS:
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", first + number))
            return first + number
    raise RuntimeError(f"none of the ports {first} to {first + _OF_A_WORKER - 1} is left")
