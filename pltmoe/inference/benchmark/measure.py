"""Times of decoding and prefill with random weights, models of one size in turn.

Nothing is loaded and no prompt is read before decoding: weights and cache hold random numbers.
Every step is given random tokens, another one for each sequence, so that routers see hidden states
as different as those of different texts and choose experts evenly (a greedy text of random weights
soon repeats itself, and all sequences would share their experts).
"""

import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pltmoe.config.counts import count_parameters, kv_cache_bytes
from pltmoe.inference.benchmark.suite import Candidate, weights_for, with_gates
from pltmoe.inference.benchmark.traffic import (
    ExpertCounter,
    bytes_moved,
    clock,
    copy_bytes_per_second,
    passes,
    timed,
)
from pltmoe.inference.cache import StaticCache
from pltmoe.inference.engine import Session, check_fp8
from pltmoe.inference.kernels import choose_kernels
from pltmoe.inference.model import PLTDecoder
from pltmoe.inference.prefill import prefill
from pltmoe.inference.weights import Weights, random_weights

logger = logging.getLogger(__name__)
COUNTED_STEPS = 2
ROOM = {"cuda": 0.92, "cpu": 0.5}
"""Share of the free memory that weights and caches may take: the rest is for activations, and on
a CPU for others."""


@dataclass(frozen=True)
class Setup:
    """What is measured. ``prefill_tokens`` empty: no prefill; ``batches`` empty: no decoding."""

    batches: tuple[int, ...] = (1, 4, 16, 32, 64, 128, 256)
    context: int = 4096
    new_tokens: int = 256
    rounds: int = 5
    prefill_tokens: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    prefill_rounds: int = 3
    seed: int = 0
    fp8: bool = False
    """Experts in FP8."""
    fuse: bool = False
    """Compile what lies between the large kernels."""


@dataclass
class Result:
    """Records of one run; ``copy_bytes_per_second`` was measured in it."""

    copy_bytes_per_second: float
    kernels: str
    clock: str
    """What seconds are: of the wall clock, or of the processor."""
    decode: list[dict[str, Any]] = field(default_factory=list)
    prefill: list[dict[str, Any]] = field(default_factory=list)


def measure(
    models: Sequence[Candidate],
    setup: Setup,
    device: torch.device,
    dtype: torch.dtype,
    keep: Callable[[Result], object] = lambda result: None,
) -> Result:
    """Measure all models: together where they fit into memory, else one size after another.

    Args:
        models: of any sizes.
        setup: what is measured.
        device: where.
        dtype: of weights and cache.
        keep: called with all results so far after each batch size and prompt length.
    """
    kernels = choose_kernels(device, dtype)
    on_wall = clock(device) is time.perf_counter
    seconds = "wall clock" if on_wall else "processor time of the one thread"
    result = Result(copy_bytes_per_second(device), kernels.reason, seconds)
    _free(device)
    logger.info("copy: %.1f GB/s; %s", result.copy_bytes_per_second / 1e9, kernels.reason)
    for together in _that_fit(models, device, dtype):
        decoders = _build(together, setup, device, dtype)
        for batch in setup.batches:
            result.decode += _decode(decoders, batch, setup, result.copy_bytes_per_second)
            keep(result)
        for tokens in setup.prefill_tokens:
            result.prefill += _prefill(decoders, tokens, setup)
            keep(result)
        del decoders
        _free(device)
    return result


def _that_fit(
    models: Sequence[Candidate], device: torch.device, dtype: torch.dtype
) -> list[list[Candidate]]:
    """Return all models at once if their weights leave room for caches, else size by size."""
    sizes: dict[str, list[Candidate]] = {}
    for candidate in models:
        sizes.setdefault(candidate.weights_key(), []).append(candidate)
    needed = sum(weight_bytes(members, dtype) for members in sizes.values())
    if needed <= 0.5 * _free_bytes(device):
        return [list(models)]
    return list(sizes.values())


def weight_bytes(members: Sequence[Candidate], dtype: torch.dtype) -> int:
    """Return the bytes of the weights that models of one size share."""
    return count_parameters(with_gates(members)).total * dtype.itemsize


def _build(
    models: Sequence[Candidate], setup: Setup, device: torch.device, dtype: torch.dtype
) -> list[tuple[Candidate, PLTDecoder]]:
    sizes: dict[str, list[Candidate]] = {}
    for candidate in models:
        sizes.setdefault(candidate.weights_key(), []).append(candidate)
    for c in models if setup.fp8 else ():
        check_fp8(c.model, device)
    shared: dict[str, Weights] = {
        key: random_weights(with_gates(members), device, dtype, setup.seed, setup.fp8)
        for key, members in sizes.items()
    }
    slots = max(setup.context + setup.new_tokens, *setup.prefill_tokens, 1)
    kernels = choose_kernels(device, dtype)
    return [
        (c, PLTDecoder(weights_for(c, shared[c.weights_key()]), slots, kernels, setup.fuse))
        for c in models
    ]


def _decode(
    decoders: Sequence[tuple[Candidate, PLTDecoder]], batch: int, setup: Setup, copy: float
) -> list[dict[str, Any]]:
    """Measure one batch size: in rounds over all models if their caches fit, else in turn."""
    device = decoders[0][1].weights.device
    free = _free_bytes(device)
    needed = {c: _cache_bytes(c, d, batch, setup) for c, d in decoders}
    records = [_too_large(c, batch, needed[c], free) for c, _ in decoders if needed[c] > free]
    fit = [(c, d) for c, d in decoders if needed[c] <= free]
    together = sum(needed[c] for c, _ in fit) <= free
    groups = [fit] if together else [[pair] for pair in fit]
    for group in groups if fit else []:
        sessions = {c: _session(d, batch, setup) for c, d in group}
        experts = {c: _experts_read(s, setup) for c, s in sessions.items()}
        rounds: dict[Candidate, list[float]] = {c: [] for c, _ in group}
        for index in range(setup.rounds):
            order = list(sessions) if index % 2 == 0 else list(sessions)[::-1]
            for c in order:
                rounds[c].append(_one_round(sessions[c], setup))
        for c, session in sessions.items():
            about = {"in_turn_with": len(group) - 1}
            records.append(about | _record(c, session, setup, rounds[c], experts[c], copy))
            logger.info("%s, batch %d: %.3f ms", c.name, batch, records[-1]["ms_per_token"])
        del sessions, session
        _free(device)
    return records


def _session(decoder: PLTDecoder, batch: int, setup: Setup) -> Session:
    session = Session(decoder, batch, setup.context + setup.new_tokens)
    session.pretend_filled(setup.context, setup.seed)
    session.prepare()
    return session


def _tokens(session: Session, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield another random token for each sequence, step by step; the same for all models."""
    generator = torch.Generator().manual_seed(seed)
    shape, vocabulary = (steps, session.batch), session.decoder.m.vocab_size
    yield from torch.randint(vocabulary, shape, generator=generator).to(session.token_b.device)


def _experts_read(session: Session, setup: Setup) -> float:
    """Return the distinct experts of a step, summed over layers and passes."""
    session.cache.lengths_b.fill_(setup.context)
    with ExpertCounter(session) as counter:
        for token_b in _tokens(session, COUNTED_STEPS, setup.seed + 1):
            session.decoder.step(token_b, session.cache)
    return sum(counter.calls) / COUNTED_STEPS


def _one_round(session: Session, setup: Setup) -> float:
    """Decode ``new_tokens`` and return the milliseconds of a step."""
    session.cache.lengths_b.fill_(setup.context)
    steps = list(_tokens(session, setup.new_tokens + 2, setup.seed + 2))

    def run(tokens: Sequence[Tensor]) -> None:
        for token_b in tokens:
            session.token_b.copy_(token_b)
            session.step()

    run(steps[:2])  # what the model before has left in the caches is gone
    session.cache.lengths_b.fill_(setup.context)
    seconds = timed(lambda: run(steps[2:]), session.token_b.device)
    return seconds / setup.new_tokens * 1e3


def _record(
    c: Candidate, session: Session, setup: Setup, rounds: list[float], experts: float, copy: float
) -> dict[str, Any]:
    ms, m = statistics.median(rounds), c.model
    moved = bytes_moved(session, setup.context + setup.new_tokens // 2, experts)
    return {
        "group": c.group,
        "model": c.name,
        "batch": session.batch,
        "context": setup.context,
        "new_tokens": setup.new_tokens,
        "ms_per_token": ms,
        "rounds_ms": rounds,
        "tokens_per_second": session.batch / ms * 1e3,
        "cache_bytes": session.cache.num_bytes(),
        "cache_bytes_per_sequence": session.cache.num_bytes() // session.batch,
        "passes": passes(m),
        "distinct_experts_per_layer": experts / m.num_layers,
        "bytes_moved": moved,
        "share_of_copy_bandwidth": moved / (ms / 1e3) / copy,
    }


def _too_large(c: Candidate, batch: int, needed: int, free: int) -> dict[str, Any]:
    reason = f"needs {needed / 2**30:.1f} GiB of cache, {free / 2**30:.1f} GiB are free"
    return {"group": c.group, "model": c.name, "batch": batch, "not_run": reason}


def _cache_bytes(c: Candidate, decoder: PLTDecoder, batch: int, setup: Setup) -> int:
    size = decoder.weights.embedding_vd.element_size()
    slots = setup.context + setup.new_tokens
    return batch * (kv_cache_bytes(c.model, slots, size) + 8 * c.model.vocab_size)


def _prefill(
    decoders: Sequence[tuple[Candidate, PLTDecoder]], tokens: int, setup: Setup
) -> list[dict[str, Any]]:
    """Time the prompt of one sequence, in rounds over all models."""
    weights = decoders[0][1].weights
    caches = {
        c: StaticCache(c.model, 1, tokens, weights.device, weights.dtype) for c, _ in decoders
    }
    generator = torch.Generator().manual_seed(setup.seed)
    vocabulary = min(c.model.vocab_size for c, _ in decoders)
    prompt = torch.randint(vocabulary, (tokens,), generator=generator).tolist()
    rounds: dict[Candidate, list[float]] = {c: [] for c in caches}
    for index in range(setup.prefill_rounds + 1):
        for c, decoder in decoders if index % 2 == 0 else decoders[::-1]:
            caches[c].reset()
            seconds = timed(lambda d=decoder, x=caches[c]: prefill(d, x, [prompt]), weights.device)
            if index > 0:  # the first one warms up
                rounds[c].append(seconds * 1e3)
    for c, times in rounds.items():
        logger.info("%s, prefill of %d: %.1f ms", c.name, tokens, statistics.median(times))
    return [
        {
            "group": c.group, "model": c.name, "prompt_tokens": tokens,
            "ms": statistics.median(times), "rounds_ms": times,
        }
        for c, times in rounds.items()
    ]  # fmt: skip


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(ROOM["cuda"] * torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo", encoding="ascii") as file:
        available = next(line for line in file if line.startswith("MemAvailable"))
    return int(ROOM["cpu"] * int(available.split()[1]) * 1024)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
