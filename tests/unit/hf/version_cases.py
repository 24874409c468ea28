"""What an exported folder says, in whichever transformers runs this: see test_versions.py.

    python -m tests.unit.hf.version_cases FOLDER OUTPUT

Imports nothing of pltmoe, as a user of the folder does not.
"""

import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "def test_logits(name):\n    assert name in names, name\n    return name in names"
GREEDY = {"max_new_tokens": 12, "do_sample": False}
END = 5
"""Ends a text; transformers before 5.14 cannot guess from a prompt without such a token."""


@torch.no_grad()
def outcomes(folder: Path) -> dict[str, Tensor]:
    """Return logits, tokens of all ways of decoding, logits after slots were taken back, and what
    the model saves."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float64
    )
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    two = torch.cat([ids, ids.flip(1)])
    padded = torch.ones_like(two)
    padded[1, :3] = 0
    found = {
        "ids": ids,
        "logits": model(ids).logits,
        "greedy": model.generate(two, attention_mask=padded, **GREEDY),
        "uncached": model.generate(two, attention_mask=padded, use_cache=False, **GREEDY),
        "beams": model.generate(ids, num_beams=3, **GREEDY),
        "guessed": model.generate(ids, prompt_lookup_num_tokens=3, eos_token_id=END, **GREEDY),
        "assisted": model.generate(ids, assistant_model=model, **GREEDY),
    }
    cache = model(ids, use_cache=True).past_key_values
    for remove in (-7, -(ids.size(1) - 7)):  # some slots, then all
        cache.crop(remove)
        seen = cache.get_seq_length()
        found[f"after {remove}"] = model(ids[:, seen:], past_key_values=cache).logits[:, -1:]
        cache.crop(seen - ids.size(1))
    cache.reset()
    found["after reset"] = model(ids, past_key_values=cache).logits
    found["in float32"] = model.float()(ids).logits  # experts in grouped products
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        return found | load_file(Path(again, "model.safetensors"))


if __name__ == "__main__":
    torch.save({"version": transformers.__version__} | outcomes(Path(sys.argv[1])), sys.argv[2])
