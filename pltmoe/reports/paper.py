"""The paper's own figures, to stand beside ours (arXiv 2510.24824): its two models of 1T tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from pltmoe.config.counts import count_parameters
from pltmoe.reports import numbers
from pltmoe.reports.runs import Run

TITLE = "paper"
MODELS = "vanilla → PLT-2"
PARAMETERS = "60 B → 40 B"
ACTIVE = "2.5 B → 1.7 B"
TOKENS = "1 T → 1 T"
SCORE = "62.1 → 62.6"
SCORE_TASKS = 10
LATENCY = "about 0.70x"
LATENCY_RANGE = "0.67x to 0.77x over batch sizes 4 to 64"
CACHE = "about 0.67x"
UNSTATED = "not stated"
_SIZES = {"vanilla 2.5B/60B": 58.65e9, "PLT-2 1.7B/40B": 39.19e9}
"""Parameters as this package counts the two configurations (configs/)."""
_TOKENS = 1e12
_CLOSE = 0.02


@dataclass(frozen=True)
class Likeness:
    """How far runs are those of the paper."""

    is_same_size: bool
    is_same_length: bool


def likeness(runs: Sequence[Run]) -> Likeness:
    """Compare sizes and tokens with the paper's two models."""
    sizes = [count_parameters(run.config.model).total for run in runs]
    both = all(any(abs(s - size) <= _CLOSE * size for s in sizes) for size in _SIZES.values())
    return Likeness(both, all(run.tokens >= (1 - _CLOSE) * _TOKENS for run in runs))


def statement(runs: Sequence[Run]) -> str:
    """Say what the paper's figures mean beside these runs."""
    found = likeness(runs)
    if found.is_same_size and found.is_same_length:
        return "These are models of the paper's two sizes, trained on its number of tokens."
    tokens = ", ".join(sorted({numbers.count(run.tokens) for run in runs}))
    if found.is_same_size:
        return (
            f"The models have the paper's sizes, but saw {tokens} tokens where the paper's saw "
            f"{numbers.count(_TOKENS)}: its figures stand beside ours for orientation."
        )
    counts = [numbers.count(count_parameters(run.config.model).total) for run in runs]
    sizes = ", ".join(dict.fromkeys(counts))
    return (
        f"**These are not the paper's models** ({' and '.join(_SIZES)}, "
        f"{numbers.count(_TOKENS)} tokens) but models of {sizes} parameters after {tokens} tokens. "
        "The paper's figures stand beside ours for orientation; nothing here confirms or refutes "
        "them."
    )
