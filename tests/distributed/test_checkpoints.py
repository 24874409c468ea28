"""A run that is saved under one layout goes on under another as if nothing had happened.

What a checkpoint holds is read back as whole tensors with PyTorch's own reader, so that nothing of
the code that wrote it takes part in the comparison.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from pltmoe.hf.convert import ExportOptions, export_checkpoint
from tests.distributed.layouts import MODELS, MOVED, parallel_section
from tests.state_dicts import tensors_of

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group(__name__)]
CASES = "tests.distributed.engine_cases"
CURVE = 2e-5
"""Relative, of two steps in float32: sums run in another order."""


@pytest.mark.parametrize("model", MOVED)
def test_a_run_moves_between_layouts(warm_ranks, tmp_path, model) -> None:
    """At each change: what was saved is what the next layout holds, bit for bit; the curve goes on.

    The Hugging Face folders made from both are the same, byte for byte. The curve is that of one
    process that goes on from the same checkpoint, and, from the first step on, that of one process
    alone (loosely: after some steps the last digits of a sum decide where a token goes).
    """
    alone = train_on(warm_ranks, 1, "DP1", model, 2 * len(MOVED[model]))[0]
    before: Path | None = None
    for leg, (processes, layout) in enumerate(MOVED[model]):
        taken, after = tmp_path / f"{leg}_taken", tmp_path / f"{leg}_after"
        one = train_on(warm_ranks, 1, "DP1", model, 2, load_from=before)[0]
        reports = train_on(
            warm_ranks, processes, layout, model, 2, load_from=before, copy_to=taken, save_to=after
        )
        if before:
            same_tensors(stored(taken), stored(before))
            assert exported(taken) == exported(before)
        steps = slice(2 * leg, 2 * leg + 2)
        for report in reports:
            assert report["losses"] == pytest.approx(one["losses"], rel=CURVE), layout
            assert report["norms"] == pytest.approx(one["norms"], rel=10 * CURVE), layout
            assert report["losses"] == pytest.approx(alone["losses"][steps], rel=2e-3), layout
            assert report["rates"] == alone["rates"][steps], layout
        before = after


def train_on(
    warm_ranks: Any, processes: int, layout: str, model: str, steps: int, **more: Any
) -> list[dict[str, Any]]:
    """Take steps of eight sequences, two a micro batch; returns the ranks' reports."""
    changes = {f"parallel__{field}": size for field, size in parallel_section(layout).items()}
    target = f"{CASES}:train"
    return warm_ranks(processes, target, steps=steps, model=MODELS[model], **changes, **more)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the one checkpoint in ``folder``, whole, by their stored names."""
    tensors = tensors_of(checkpoint_in(folder))
    assert any(n.startswith("optimizer.state.exp_avg_sq.model.layers.3") for n in tensors)
    return tensors


def same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Compare names and bits."""
    assert left.keys() == right.keys()
    for name, values in left.items():
        assert torch.equal(values, right[name]), name


def exported(folder: Path) -> dict[str, bytes]:
    """Return the files of the Hugging Face folder made from the one checkpoint in ``folder``."""
    target = folder / "hf"
    options = ExportOptions(tokenizer=False)
    export_checkpoint(checkpoint_in(folder), target, options)
    files = {p.name: p.read_bytes() for p in sorted(target.iterdir())}
    card = files["README.md"].splitlines()  # names the commit, which may be made between two legs
    files["README.md"] = b"\n".join(line for line in card if b"pltmoe commit" not in line)
    assert "config.json" in files and any(name.endswith(".safetensors") for name in files)
    return files


def checkpoint_in(folder: Path) -> Path:
    """Return the only step's folder."""
    (step,) = folder.glob("step_*")
    return step
