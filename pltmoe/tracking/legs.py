"""What the legs of a run (its start events) did anew, and with which settings.

A leg that resumes at step R does the steps after R again. With the settings and the code of those
that did them before, the numbers are the same. With others the earlier ones are a branch that was
given up: theirs are replaced.
"""

import json
from collections.abc import Sequence
from typing import Any

Start = dict[str, Any]
"""A start event of the journal."""
BRANCHES_TAG = "pltmoe.branches"
"""Tag of an MLflow run: ``branches`` as JSON, without those that a later one covers."""


def branches(starts: Sequence[Start]) -> list[tuple[float, int]]:
    """Return (time in seconds, step) of each leg that left another branch, oldest first.

    Points after that step that were taken before that time are of the branch that was given up.
    """
    return _walk(starts)[1]


def branches_tag(starts: Sequence[Start]) -> str:
    """Return the text of ``BRANCHES_TAG``: a reader leaves out what was given up."""
    left: list[tuple[float, int]] = []
    for time_s, step in branches(starts):
        left = [*(branch for branch in left if branch[1] < step), (time_s, step)]
    return json.dumps(left)


def changes(starts: Sequence[Start]) -> dict[str, str]:
    """Return the settings that the run did not keep, and their values since which step.

    Only legs of which steps are left count, so a change that was taken back is none.
    """
    values = first_values(starts)
    said: dict[str, list[str]] = {}
    for start in _walk(starts)[0]:
        for key, value in start["params"].items():
            if value != values[key]:
                values[key] = value
                said.setdefault(key, []).append(f"{value} since step {_after(start)}")
    return {key: ", then ".join(texts) for key, texts in said.items()}


def first_values(starts: Sequence[Start]) -> dict[str, str]:
    """Return each setting as it was first, which is what MLflow keeps as the parameter."""
    return {key: v for start in reversed(starts) for key, v in start["params"].items()}


def _walk(starts: Sequence[Start]) -> tuple[list[Start], list[tuple[float, int]]]:
    """Return the legs of which steps are left, and the branches."""
    left: list[Start] = []
    found: list[tuple[float, int]] = []
    for start in starts:
        done_again = []
        while left and _after(left[-1]) >= _after(start):
            done_again.append(left.pop())
        done_again += left[-1:]  # of this one the last steps only
        if any(_settings(other) != _settings(start) for other in done_again):
            found.append((start["time"], _after(start)))
        left.append(start)
    return left, found


def _after(start: Start) -> int:
    return start["resume_step"] or 0


def _settings(start: Start) -> tuple[Any, Any]:
    return start["params"], start["tags"].get("commit")
