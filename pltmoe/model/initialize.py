"""Weights from a seed, one generator per *global* parameter name.

| parameter                              | start                                    |
|----------------------------------------|------------------------------------------|
| embedding, QKV, experts' first linear, router, output head | normal(0, init_std)  |
| attention and feed-forward output projections | normal(0, init_std / sqrt(2 num_layers)) |
| norms                                  | 1                                        |
| gate weight and bias                   | 0, so g = 0.5                            |

A parameter depends on its name only, not on the rank that holds it or on what was built before it,
so every expert-parallel layout starts from the same model. (CPU and GPU generators differ.)
"""

import hashlib
import math
import re

import torch

from pltmoe.model.plt import PLTModel

_OUTPUT_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialize(model: PLTModel, seed: int) -> None:
    """Fill every parameter of ``model`` in place."""
    std = model.plt.init_std
    for name, parameter in model.named_parameters():
        if "norm.weight" in name:
            parameter.fill_(1.0)
        elif ".plt_gate." in name:
            parameter.zero_()
        else:
            scale = math.sqrt(2 * model.plt.num_layers) if name.endswith(_OUTPUT_PROJECTIONS) else 1
            generator = _generator(global_name(model, name), seed, parameter.device)
            fresh = torch.empty_like(parameter, dtype=torch.float32)
            parameter.copy_(fresh.normal_(0.0, std / scale, generator=generator))


def global_name(model: PLTModel, name: str) -> str:
    """Replace the local number of an expert by its number in the whole model."""
    found = re.match(r"layers\.(\d+)\.mlp\.experts\.local_experts\.(\d+)\.", name)
    if not found:
        return name
    layer, local = int(found[1]), int(found[2])
    expert = model.layers[layer].mlp.local_expert_indices[local]
    return name.replace(f"local_experts.{local}.", f"local_experts.{expert}.")


def _generator(name: str, seed: int, device: torch.device) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
