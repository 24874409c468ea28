"""Whether a forward pass is a repetition that backward asked for.

Statistics and expert counts must be taken once. PyTorch's non-reentrant checkpointing is used
throughout: keys and values of loop 1 may enter and leave a recomputed region like any tensor, and
the gradient of a weight that all loops share is complete when its hook fires.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

_depth = 0


def is_recomputing() -> bool:
    """Whether the running forward pass repeats an earlier one for its gradients."""
    return _depth > 0


def recompute_contexts(
    precision: AbstractContextManager[Any],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the first pass and of its repetition, for ``checkpoint``.

    Args:
        precision: what the first pass runs in and does not enter itself; backward is outside.
    """
    return nullcontext(), _repeating(precision)


@contextmanager
def _repeating(precision: AbstractContextManager[Any]) -> Iterator[None]:
    global _depth
    _depth += 1
    try:
        with precision:
            yield
    finally:
        _depth -= 1
