"""The README.md of an exported model."""

from typing import Any

from pltmoe.checkpoint.manifest import Manifest
from pltmoe.config import ModelConfig
from pltmoe.config.counts import count_parameters

_FRONT = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}
---
"""

_PLT = """\
A Parallel Loop Transformer ([arXiv 2510.24824](https://arxiv.org/abs/2510.24824)): the whole layer
stack runs {num_loops} times per token with the same weights.
{between}
The model needs the code that lies next to the weights (`trust_remote_code=True`).
"""
_STOCK = """\
An ordinary decoder ({architecture} of transformers, no custom code), trained as the baseline of a
Parallel Loop Transformer.
"""

_USE = """
## How to load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"{trust})
inputs = tokenizer("def fibonacci(n):", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

transformers 5.0 or newer ({transformers} was used for the checks below). A base model: it continues
text.
{limits}
"""

_LIMITS = """\
`generate` caches all loops: greedy search, sampling, beam search, assisted decoding and chunked
prefill; no static cache, no continuous batching. An OpenAI-compatible server:

```bash
transformers serve . --trust-remote-code
```
"""


def model_card(
    manifest: Manifest, fields: dict[str, Any], dtype: str, transformers: str, checked: str
) -> str:
    """Return the text.

    Args:
        manifest: of the checkpoint.
        fields: the exported configuration.
        dtype: of the weights.
        transformers: version that the export was made with.
        checked: one sentence on the comparison of logits.
    """
    m = manifest.config.model
    is_plt = fields["model_type"] == "plt_moe"
    tags = ["pltmoe", fields["model_type"]] + (["custom_code"] if is_plt else [])
    kind = _PLT.format(num_loops=m.num_loops, between=_between(m))
    if not is_plt:
        kind = _STOCK.format(architecture=fields["architectures"][0])
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(manifest, dtype))
    limits = _LIMITS if is_plt else ""
    use = _USE.format(
        trust=", trust_remote_code=True" if is_plt else "", transformers=transformers, limits=limits
    )
    return (
        _FRONT.format(tags="\n".join(f"- {tag}" for tag in tags))
        + f"\n# {manifest.config.name}\n\n{kind}\n| | |\n|---|---|\n{rows}\n"
        + use.rstrip()
        + f"\n\n## Checks\n\n{checked}\n\n## License\n\nApache-2.0\n"
    )


def _between(m: ModelConfig) -> str:
    if not m.cross_loop_shift:
        return "A later loop reads the output of the one before."
    if m.normalize_per_loop or (m.emb_scale, m.hidden_scale) != (1.0, 1.0):
        normed = "normed " if m.normalize_per_loop else ""
        return (
            f"A later loop reads {m.emb_scale:g} x embedding + {m.hidden_scale:g} x the {normed}"
            "output of the one before, shifted by one slot."
        )
    return "A later loop reads embedding + the output of the one before, shifted by one slot."


def _facts(manifest: Manifest, dtype: str) -> list[tuple[str, str]]:
    config, m = manifest.config, manifest.config.model
    count = count_parameters(m)
    attention = f"{m.num_attention_heads} query / {m.num_kv_heads} KV heads of {m.head_dim}"
    facts = [
        ("parameters", f"{count.total:,} ({count.active:,} active per token and loop)"),
        ("layers x loops", f"{m.num_layers} x {m.num_loops}"),
        ("hidden size", f"{m.hidden_size:,}"),
        ("attention", attention),
    ]
    if m.is_moe:
        experts = f"{m.num_experts} of width {m.moe_ffn_hidden_size:,}, top {m.moe_top_k}"
        facts.append(("experts per layer", experts))
    else:
        facts.append(("feed-forward", f"SwiGLU of width {m.ffn_hidden_size:,}"))
    if m.gated_swa:
        facts.append(("later loops", f"loop 1's keys and values + window of {m.window_keys} keys"))
    elif m.num_loops > 1:
        own = "loop 1's" if m.share_first_loop_kv else "their own"
        facts.append(("later loops", f"{own} keys and values"))
    if m.moe_loop_routing == "shared":
        facts.append(("experts of later loops", "loop 1's of the same slot, by their own weights"))
    return facts + [
        ("vocabulary", f"{m.vocab_size:,}"),
        ("trained with", f"{config.data.sequence_length:,} slots per sequence"),
        ("step", f"{manifest.step:,}"),
        ("tokens", f"{manifest.tokens:,}"),
        ("weights", dtype),
        ("pltmoe commit", manifest.commit),
    ]
