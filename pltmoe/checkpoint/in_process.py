"""Keeps Megatron's synchronous save inside this process.

Its file writer is the one for asynchronous saves and fetches results through a queue of a manager
process. Starting that process means another interpreter that imports the entry script: ten seconds
and half a gigabyte on every rank, for nothing, and it outlives a killed job. A queue of this
process does the same. Here, and nowhere else, an attribute of Megatron's checkpointing is replaced.
"""

import queue

from megatron.core.dist_checkpointing.strategies import filesystem_async


def save_in_process() -> None:
    """Give Megatron's writer a plain queue, before it makes its own; call it before each save."""
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
