"""The paper's ratios, what we aim at, and what the records of a run say. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pltmoe.inference.benchmark.suite import (
    ABLATION,
    BIG_VANILLA,
    HEADLINE,
    LOOP2,
    PLT2,
    PLT2_SHARED,
    SMALL_PLT,
    SMALL_SHARED,
    VANILLA,
)

Quantity = Literal["ms_per_token", "cache_bytes_per_sequence", "share_of_copy_bandwidth", "prefill"]
Verdict = Literal["met", "not met", "not run", "reported"]


@dataclass(frozen=True)
class Target:
    """One ratio: ``model`` over ``base`` (None: the figure itself) at some batch sizes."""

    what: str
    paper: str
    group: str
    model: str
    base: str | None
    quantity: Quantity
    at: tuple[int, ...]
    """Batch sizes, or prompt lengths of a prefill, that the target speaks of."""
    at_most: float | None = None
    at_least: float | None = None
    """Neither: reported without a target."""

    def is_met_by(self, value: float) -> bool:
        """Whether the value lies where it should."""
        low = self.at_least is None or value >= self.at_least
        return low and (self.at_most is None or value <= self.at_most)

    def wanted(self) -> str:
        """Return the target in words."""
        if self.at_most is not None:
            return f"<= {self.at_most:.2f}"
        return "reported" if self.at_least is None else f">= {self.at_least:.2f}"


def _pair(what: str, model: str, at_most: float | None) -> Target:
    batches = (4, 16, 32, 64)
    return Target(
        what, "0.67..0.77", HEADLINE, model, BIG_VANILLA, "ms_per_token", batches, at_most
    )


def _same_size(what: str, paper: str, model: str, base: str, at: int, most: float | None) -> Target:
    batches = (4,) if at == 4 else (32, 64)
    return Target(what, paper, ABLATION, model, base, "ms_per_token", batches, most)


_HEADLINE = "PLT-2 1.7B/40B / vanilla 2.5B/60B, ms per token"
_SAME = "PLT-2 / vanilla, same size"
_SHARE = "share of copy bandwidth, PLT-2 1.7B/40B"
TARGETS = (
    _pair(f"{_HEADLINE}, shared routing", SMALL_SHARED, 0.70),
    _pair(f"{_HEADLINE}, independent routing", SMALL_PLT, None),
    _same_size("PLT-2 / vanilla loop-2", "0.53", PLT2, LOOP2, 32, 0.53),
    _same_size("PLT-2 / vanilla loop-2, shared routing", "0.53", PLT2_SHARED, LOOP2, 32, 0.53),
    _same_size(f"{_SAME}, shared routing", "1.02", PLT2_SHARED, VANILLA, 4, 1.03),
    _same_size(f"{_SAME}, independent routing", "1.02", PLT2, VANILLA, 4, None),
    _same_size(f"{_SAME}, shared routing", "1.04..1.06", PLT2_SHARED, VANILLA, 32, 1.06),
    _same_size(f"{_SAME}, independent routing", "1.04..1.06", PLT2, VANILLA, 32, None),
    Target("KV cache, headline pair", "2/3", HEADLINE, SMALL_PLT, BIG_VANILLA,
           "cache_bytes_per_sequence", (4,), 0.68),
    Target(f"{_SHARE}, independent routing", "-", HEADLINE, SMALL_PLT, None,
           "share_of_copy_bandwidth", (16, 32, 64, 128, 256), None, 0.70),
    Target(f"{_SHARE}, shared routing", "-", HEADLINE, SMALL_SHARED, None,
           "share_of_copy_bandwidth", (16, 32, 64, 128, 256), None, 0.70),
    Target("prefill of 32k, PLT-2 / vanilla, same size", "2 (FLOPs)", ABLATION, PLT2, VANILLA,
           "prefill", (32768,), 1.10),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a run says about one target."""

    target: Target
    values: dict[int, float]
    """Batch size (prompt length) -> value; those that the target does not speak of, too."""

    @property
    def verdict(self) -> Verdict:
        """Met where all that the target speaks of was measured and is met.

        A cache depends on the batch in nothing, so that any will do.
        """
        t = self.target
        judged = {at: v for at, v in self.values.items() if at in t.at}
        if t.quantity == "cache_bytes_per_sequence":
            judged = self.values
        if t.at_most is None and t.at_least is None:
            return "reported" if judged else "not run"
        if any(not t.is_met_by(value) for value in judged.values()):
            return "not met"
        complete = bool(judged) and (t.quantity == "cache_bytes_per_sequence" or
                                     set(judged) == set(t.at))  # fmt: skip
        return "met" if complete else "not run"


def outcomes(decode: Sequence[dict[str, Any]], prefill: Sequence[dict[str, Any]]) -> list[Outcome]:
    """Compare records (``measure.Result``) with all targets."""
    return [Outcome(target, _values(target, decode, prefill)) for target in TARGETS]


def _values(
    target: Target, decode: Sequence[dict[str, Any]], prefill: Sequence[dict[str, Any]]
) -> dict[int, float]:
    records, at, value = decode, "batch", str(target.quantity)
    if target.quantity == "prefill":
        records, at, value = prefill, "prompt_tokens", "ms"

    def of(model: str) -> dict[int, float]:
        found = (r for r in records if r["group"] == target.group and r["model"] == model)
        return {r[at]: r[value] for r in found if value in r}

    ours = of(target.model)
    if target.base is None:
        return ours
    base = of(target.base)
    return {key: ours[key] / base[key] for key in sorted(ours) if key in base}
