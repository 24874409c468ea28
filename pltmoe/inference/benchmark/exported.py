"""Milliseconds per decoded token and cache bytes of exported folders, through the engine.

All models are timed in turn, round after round, so that what else the machine does hits them alike
and their ratios hold. A model with the cross-loop shift decodes all loops in one pass.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pltmoe.inference.benchmark.traffic import passes, synchronize
from pltmoe.inference.engine import Engine, Session


@dataclass(frozen=True)
class DecodeSetup:
    """What is decoded: ``batch`` sequences, ``new_tokens`` after a prompt, ``rounds`` times."""

    batch: int = 4
    prompt_tokens: int = 192
    new_tokens: int = 32
    rounds: int = 3


def measure_exported(
    models: Mapping[str, Path], setup: DecodeSetup, about: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Time greedy decoding of each exported folder; ``about`` is added to every entry.

    Returns:
        name -> ``ms_per_token`` (median over all steps; one step decodes one token of each
        sequence), ``ms_per_token_min``, ``cache_bytes_per_sequence`` (allocated for the context),
        ``context`` (slots in the cache at the end), ``passes`` (forward passes per token),
        ``batch``, ``dtype`` and ``about``.

    Raises:
        ConversionError: a folder holds no model.
    """
    context = setup.prompt_tokens + setup.new_tokens
    engines = {name: Engine.load(folder, max_slots=context) for name, folder in models.items()}
    sessions = {name: Session(e.decoder, setup.batch, context) for name, e in engines.items()}
    steps: dict[str, list[float]] = {name: [] for name in engines}
    with tqdm(total=setup.rounds * len(engines), desc="decode", unit="round") as bar:
        for _ in range(setup.rounds):
            for name, session in sessions.items():
                steps[name] += _decode(session, setup)
                bar.update()
    return {
        name: {
            "ms_per_token": statistics.median(times),
            "ms_per_token_min": min(times),
            "cache_bytes_per_sequence": sessions[name].cache.num_bytes() // setup.batch,
            "passes": passes(engines[name].decoder.m),
            "dtype": str(engines[name].decoder.weights.dtype).removeprefix("torch."),
            "kernels": engines[name].decoder.kernels.reason,
            "context": context,
            **asdict(setup),
            **about,
        }
        for name, times in steps.items()
    }


def _decode(session: Session, setup: DecodeSetup) -> list[float]:
    """Return the milliseconds of each decode step after reading random prompts."""
    generator = torch.Generator().manual_seed(0)
    shape = (setup.batch, setup.prompt_tokens)
    prompts = torch.randint(session.decoder.m.vocab_size, shape, generator=generator).tolist()
    session.begin(prompts)
    device, times = session.token_b.device, []
    for _ in range(setup.new_tokens):
        synchronize(device)
        start = time.perf_counter()
        session.step()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return times
