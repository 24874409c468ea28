"""Does an exported folder compute what the checkpoint computes? Compares logits on real tokens.

One side is the reference model (model/reference.py) with tensors straight from the checkpoint, the
other is what a user gets: the folder, loaded by transformers. Both run one after the other, in
float64 where memory allows. transformers' own Qwen3 models run in float32: they keep norms and
router scores in it whatever the dtype, and their fused experts know no float64.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pltmoe.config import ModelConfig
from pltmoe.config.counts import count_parameters
from pltmoe.errors import ConversionError
from pltmoe.hf.checkpoint_tensors import CheckpointTensors
from pltmoe.hf.fields import hf_model_type
from pltmoe.hf.mapping import rows
from pltmoe.model import reference
from pltmoe.model.reference import ReferencePLT

NUM_SEQUENCES, NUM_SLOTS = 2, 160
"""Enough slots for a window of 64 keys to slide."""

BOUNDS = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Allowed difference, relative to the largest logit."""


@dataclass(frozen=True)
class Verification:
    """What the comparison found."""

    max_difference: float
    """Largest absolute difference of two logits."""
    mean_kl: float
    """KL divergence of the next-token distributions in nats, averaged over tokens."""
    num_tokens: int
    """Tokens compared."""
    dtype: torch.dtype
    """Precision of the computation."""

    def __str__(self) -> str:
        """One sentence."""
        return (
            f"Logits equal the checkpoint's on {self.num_tokens} tokens: largest difference "
            f"{self.max_difference:.1e}, mean KL divergence {self.mean_kl:.1e} nats "
            f"(computed in {str(self.dtype).removeprefix('torch.')})."
        )


def fitting_dtype(m: ModelConfig) -> torch.dtype | None:
    """Return the widest precision in which the model fits into free memory, or None."""
    free = psutil.virtual_memory().available
    stock = hf_model_type(m) != "plt_moe"
    for dtype in (torch.float32,) if stock else (torch.float64, torch.float32):
        if 1.3 * count_parameters(m).total * dtype.itemsize < free:
            return dtype
    return None


def verify_export(
    folder: Path, tensors: CheckpointTensors, m: ModelConfig, exported_dtype: torch.dtype
) -> Verification | str:
    """Compare the logits of ``folder`` with the checkpoint's; a string says why it was not done.

    Args:
        folder: the exported model.
        tensors: the checkpoint's tensors.
        m: the checkpoint's model section.
        exported_dtype: the checkpoint's weights are rounded to it first, as in the export.

    Raises:
        ConversionError: the logits differ.
    """
    dtype = fitting_dtype(m)
    if dtype is None:
        need_gib = 1.3 * count_parameters(m).total * torch.float32.itemsize / 2**30
        return (
            f"Logits were NOT verified: that needs {need_gib:.0f} GiB of free memory. Run "
            "tools/convert_to_hf.py with --verify-only and the same arguments on a larger machine."
        )
    tokens = _tokens(folder, m)
    expected = _reference_logits(tensors, m, tokens, exported_dtype, dtype)
    found = _exported_logits(folder, tokens, dtype)
    result = _compare(expected, found, dtype)
    if not result.max_difference <= BOUNDS[dtype] * max(1.0, float(expected.abs().max())):
        raise ConversionError(
            f"the exported model computes other logits than the checkpoint: largest difference "
            f"{result.max_difference:.2e}, mean KL divergence {result.mean_kl:.2e} nats"
        )
    return result


def _tokens(folder: Path, m: ModelConfig) -> Tensor:
    """Return ids of real text (this project's reference model), or all ids in turn."""
    ids = list(range(m.vocab_size))
    if (folder / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        text = inspect.getsource(reference)
        ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    ids = (ids * NUM_SEQUENCES * NUM_SLOTS)[: NUM_SEQUENCES * NUM_SLOTS]
    return torch.tensor(ids).view(NUM_SEQUENCES, NUM_SLOTS)


@torch.no_grad()
def _reference_logits(
    tensors: CheckpointTensors,
    m: ModelConfig,
    tokens: Tensor,
    exported_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    with torch.device("meta"):
        model = ReferencePLT(m)
    model = model.to(dtype).to_empty(device="cpu")
    if m.tied_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    state = model.state_dict()
    for row in rows(m):
        for name, tensor in row.split(tensors.read(row)).items():
            state[name].copy_(tensor if row.float32 else tensor.to(exported_dtype))
    return model(tokens).logits


@torch.no_grad()
def _exported_logits(folder: Path, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True)
    return model.eval()(tokens, use_cache=False).logits


def _compare(expected: Tensor, found: Tensor, dtype: torch.dtype) -> Verification:
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return Verification(
        max_difference=float((expected.double() - found.double()).abs().max()),
        mean_kl=float((p.exp() * (p - q)).sum(-1).clamp(min=0).mean()),
        num_tokens=expected.size(0) * expected.size(1),
        dtype=dtype,
    )
