"""Choosing the next token: greedy, temperature, top-k, top-p; a request's draws are its own.

The random number of a draw is a hash of the request's seed and the slot that is filled, so a
request gets the same tokens whatever else is in the batch, and a text that is continued later goes
on as if it had not stopped. Everything is computed on the device without reading back.

Letters: b sequences, v vocabulary, c candidates (the largest top-k, or the vocabulary).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pltmoe.errors import ConfigError


@dataclass(frozen=True)
class SamplingOptions:
    """How one request is continued.

    Raises:
        ConfigError: a value out of its range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0: the likeliest token (greedy); then top_k and top_p change nothing."""
    top_k: int = 0
    """Draw among so many likeliest tokens; 0: all. Equal logits at the border all count."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens whose probabilities reach this sum, after top_k."""
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the text; the token itself is not part of it."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for broken, message in (
            (self.max_new_tokens < 1, f"max_new_tokens ({self.max_new_tokens}) must be at least 1"),
            (not self.temperature >= 0, f"temperature ({self.temperature}) must be 0 or more"),
            (self.top_k < 0, f"top_k ({self.top_k}) must be 0 (all tokens) or more"),
            (not 0 < self.top_p <= 1, f"top_p ({self.top_p}) must be over 0 and at most 1"),
        ):
            if broken:
                raise ConfigError(f"sampling: {message}")


@dataclass(frozen=True)
class Plan:
    """What a batch needs at all: one static computation (and one CUDA graph) per plan."""

    greedy: bool
    candidates: int
    """At least the largest top-k: a power of two or the vocabulary, so that there are few plans;
    0: no request narrows its choice."""
    logprobs: bool


class Sampler:
    """The options of a batch as tensors on the device, changed in place by :meth:`set`."""

    def __init__(self, batch: int, vocab_size: int, device: torch.device):
        self._vocab_size = vocab_size
        self._temperature_b = torch.ones(batch, device=device)
        self._greedy_b = torch.ones(batch, dtype=torch.bool, device=device)
        self._top_k_b = torch.ones(batch, dtype=torch.int64, device=device)
        self._top_p_b = torch.ones(batch, dtype=torch.float64, device=device)
        self._seed_b = torch.zeros(batch, dtype=torch.int64, device=device)

    def set(self, options: Sequence[SamplingOptions], logprobs: bool = False) -> Plan:
        """Take over the options of a batch; return what computing them needs."""
        limits = [o.top_k or self._vocab_size for o in options]
        limits = [min(k, self._vocab_size) for k in limits]
        # Colder than this, float32 quotients are infinite, and their softmax no number.
        temperatures = [max(o.temperature or 1.0, 1e-30) for o in options]
        self._temperature_b.copy_(torch.tensor(temperatures))
        self._greedy_b.copy_(torch.tensor([o.temperature == 0 for o in options]))
        self._top_k_b.copy_(torch.tensor(limits))
        self._top_p_b.copy_(torch.tensor([o.top_p for o in options], dtype=torch.float64))
        self._seed_b.copy_(torch.tensor([_signed(o.seed) for o in options]))
        drawing = [(k, o) for k, o in zip(limits, options, strict=True) if o.temperature]
        narrowed = any(k < self._vocab_size or o.top_p < 1 for k, o in drawing)
        return Plan(
            greedy=not drawing,
            candidates=self._candidates(max(k for k, _ in drawing)) if narrowed else 0,
            logprobs=logprobs,
        )

    def _candidates(self, top_k: int) -> int:
        return min(1 << (top_k - 1).bit_length(), self._vocab_size)

    def choose(self, logits_bv: Tensor, slot_b: Tensor, plan: Plan) -> tuple[Tensor, Tensor | None]:
        """Return tokens [b] and, if asked for, their log-probabilities [b] (of the model: before
        temperature, top-k and top-p).

        Args:
            logits_bv: of the last slot of each sequence.
            slot_b: slots so far: the number of the slot that the token will fill.
            plan: of :meth:`set`.
        """
        token_b = logits_bv.argmax(-1)
        if not plan.greedy:
            drawn_b = self._draw(logits_bv.float(), slot_b, plan.candidates)
            token_b = torch.where(self._greedy_b, token_b, drawn_b)
        if not plan.logprobs:
            return token_b, None
        wide = logits_bv.float()
        chosen_b = wide.gather(-1, token_b[:, None])[:, 0]
        return token_b, chosen_b - wide.logsumexp(-1)

    def _draw(self, logits_bv: Tensor, slot_b: Tensor, candidates: int) -> Tensor:
        """Invert the distribution function in the order of the vocabulary."""
        scaled_bv = logits_bv / self._temperature_b[:, None]
        if candidates:
            lowest_b = self._lowest_kept(scaled_bv, candidates)
            scaled_bv = scaled_bv.masked_fill(scaled_bv < lowest_b[:, None], float("-inf"))
        below_bv = scaled_bv.softmax(-1, dtype=torch.float64).cumsum(-1)
        wanted_b = uniform(self._seed_b, slot_b) * below_bv[:, -1]
        index_b = torch.searchsorted(below_bv, wanted_b[:, None], right=True)[:, 0]
        return index_b.clamp(max=self._vocab_size - 1)

    def _lowest_kept(self, scaled_bv: Tensor, candidates: int) -> Tensor:
        """Return the smallest logit of each sequence that top-k and then top-p keep [b]."""
        best_bc = scaled_bv.topk(candidates, dim=-1).values
        rank_c = torch.arange(candidates, device=best_bc.device)
        beyond_bc = rank_c >= self._top_k_b[:, None]
        p_bc = best_bc.masked_fill(beyond_bc, float("-inf")).softmax(-1, dtype=torch.float64)
        # A candidate is kept when those before it do not reach top_p; the first one always is.
        kept_bc = ~beyond_bc & (p_bc.cumsum(-1) - p_bc < self._top_p_b[:, None])
        last_b = kept_bc.sum(-1) - 1
        return best_bc.gather(-1, last_b.clamp(min=0)[:, None])[:, 0]


def uniform(seed_b: Tensor, slot_b: Tensor) -> Tensor:
    """Return numbers in [0, 1) [b] in float64: a hash of seed and slot (Steele et al. 2014)."""
    state_b = _mix(seed_b + _GOLDEN) ^ (slot_b * _GOLDEN)
    return _shift(_mix(state_b + _GOLDEN), 32).double() / 2.0**32


def _mix(x: Tensor) -> Tensor:
    """Scramble 64 bits (the finaliser of SplitMix64); integers wrap around."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros: torch's >> copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """Return the 64-bit pattern of ``x`` as torch's int64 holds it."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >= 1 << 63 else x


_GOLDEN = _signed(0x9E3779B97F4A7C15)
