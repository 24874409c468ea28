"""Milliseconds per decoded token and cache bytes of exported models, measured side by side.

All models are timed in turn, round after round, so that what else the machine does hits them alike
and their ratios hold. An exported PLT with the shift decodes all loops of a token in one pass;
other loops run one after another.
"""

import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from pltmoe.errors import ConversionError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodeSetup:
    """What is decoded: ``batch`` sequences, ``new_tokens`` after a prompt, ``rounds`` times."""

    batch: int = 4
    prompt_tokens: int = 192
    new_tokens: int = 32
    rounds: int = 3


def measure_decode(models: Mapping[str, Path], setup: DecodeSetup) -> dict[str, dict[str, Any]]:
    """Time greedy decoding with cache of each exported folder.

    Returns:
        name -> ``ms_per_token`` (median over all steps; one step decodes one token of each
        sequence), ``ms_per_token_min``, ``cache_bytes_per_sequence`` at the end (measured),
        ``context`` (slots in the cache then), ``batch``, ``device``, ``dtype``, ``versions``.

    Raises:
        ConversionError: a folder holds no model.
    """
    loaded = {name: _load(folder) for name, folder in models.items()}
    steps: dict[str, list[float]] = {name: [] for name in loaded}
    cache_bytes: dict[str, int] = {}
    with tqdm(total=setup.rounds * len(loaded), desc="decode", unit="round") as bar:
        for _ in range(setup.rounds):
            for name, model in loaded.items():
                times, cache_bytes[name] = _decode(model, setup)
                steps[name] += times
                bar.update()
    context = setup.prompt_tokens + setup.new_tokens
    about = {"context": context, "device": device_name(), **asdict(setup)}
    about["versions"] = {"torch": torch.__version__, "python": platform.python_version()}
    return {
        name: {
            "ms_per_token": statistics.median(times),
            "ms_per_token_min": min(times),
            "cache_bytes_per_sequence": cache_bytes[name] // setup.batch,
            "dtype": str(loaded[name].dtype).removeprefix("torch."),
            **about,
        }
        for name, times in steps.items()
    }


def device_name() -> str:
    """Name what the models ran on, with the threads used when it is a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores used)"


def write_decode(results: Mapping[str, Any], command: str, path: Path) -> None:
    """Write the results, each with the command that made them."""
    tree = {name: {**result, "command": command} for name, result in results.items()}
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(tree, indent=2) + "\n")
    os.replace(temporary, path)


def _load(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise ConversionError(
            f"{folder} holds no exported model (no config.json): run tools/convert_to_hf.py"
        )
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def _decode(model: Any, setup: DecodeSetup) -> tuple[list[float], int]:
    """Return the milliseconds of each decode step and the bytes of the cache after them."""
    generator = torch.Generator().manual_seed(0)
    shape = (setup.batch, setup.prompt_tokens)
    tokens = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    out = model(tokens.to(model.device), use_cache=True)
    times = []
    for _ in range(setup.new_tokens):
        _synchronize()
        start = time.perf_counter()
        newest = out.logits[:, -1:].argmax(-1)
        out = model(newest, past_key_values=out.past_key_values, use_cache=True)
        _synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return times, _cache_bytes(out.past_key_values)


def _cache_bytes(cache: Any) -> int:
    if hasattr(cache, "num_bytes"):
        return cache.num_bytes()
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
