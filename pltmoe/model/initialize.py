"""Weights from a seed, one generator per *global* parameter name.

| parameter                              | start                                    |
|----------------------------------------|------------------------------------------|
| embedding, QKV, experts' first linear, router, output head | normal(0, init_std)  |
| attention and feed-forward output projections | normal(0, init_std / sqrt(2 num_layers)) |
| norms                                  | 1                                        |
| gate weight and bias                   | 0, so g = 0.5                            |

A parameter depends on its name only, not on the rank that holds it or on what was built before it:
a rank draws the whole tensor and keeps its slice, so every layout starts from the same model. (CPU
and GPU generators differ.)
"""

import hashlib
import math
import re

import torch

from pltmoe.model.plt import PLTModel

_OUTPUT_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialize(model: PLTModel, seed: int) -> None:
    """Fill every parameter of ``model`` in place.

    Raises:
        ValueError: a vector or number that is neither a norm's nor a gate's; noise would be wrong.
    """
    std = model.plt.init_std
    for name, parameter in model.named_parameters():
        if "norm.weight" in name:
            parameter.fill_(1.0)
        elif ".plt_gate." in name:
            parameter.zero_()
        elif parameter.dim() < 2:
            raise ValueError(f"{name}: pltmoe/model/initialize.py does not say how it begins")
        else:
            everywhere = global_name(model, name)
            is_output = everywhere.endswith(_OUTPUT_PROJECTIONS)
            scale = math.sqrt(2 * model.plt.num_layers) if is_output else 1
            generator = _generator(everywhere, seed, parameter.device)
            parts = tensor_ranks(model, name)
            shape = whole_shape(parameter, parts[1])
            whole = torch.empty(shape, dtype=torch.float32, device=parameter.device)
            whole.normal_(0.0, std / scale, generator=generator)
            parameter.copy_(local_slice(whole, everywhere, parameter, *parts))


def global_name(model: PLTModel, name: str) -> str:
    """Number layers and experts over the whole model; a tied head is the embedding.

    Transformer Engine's grouped experts are named as Megatron's own are.
    """
    if name == "output_layer.weight" and model.plt.tied_embeddings:
        return "embedding.word_embeddings.weight"
    if not (found := re.match(r"layers\.(\d+)\.", name)):
        return name
    local = int(found[1])
    rest = name[found.end() :]
    rest = re.sub(
        r"^mlp\.experts\.(linear_fc\d)\.weight(\d+)$",
        r"mlp.experts.local_experts.\2.\1.weight",
        rest,
    )
    if expert := re.match(r"mlp\.experts\.local_experts\.(\d+)\.", rest):
        number = model.layers[local].mlp.local_expert_indices[int(expert[1])]
        rest = f"mlp.experts.local_experts.{number}.{rest[expert.end() :]}"
    return f"layers.{model.layers.numbers[local]}.{rest}"


def tensor_ranks(model: PLTModel, name: str) -> tuple[int, int]:
    """Return (rank, size) of the tensor-parallel group that cuts a parameter."""
    groups = model.pg_collection
    group = groups.expt_tp if ".experts." in name else groups.tp
    return group.rank(), group.size()


def whole_shape(parameter: torch.Tensor, size: int) -> list[int]:
    """Return the shape of a parameter over all ``size`` tensor-parallel ranks."""
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= size  # type: ignore[attr-defined]
    return shape


def local_slice(
    whole: torch.Tensor, name: str, parameter: torch.Tensor, rank: int, size: int
) -> torch.Tensor:
    """Cut one rank's part out of a whole tensor, as Megatron's parallel layers hold it.

    A gated feed-forward layer holds its part of the gate above its part of the up projection.
    """
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return whole
    dim = parameter.partition_dim  # type: ignore[attr-defined]
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(size, dim)[rank] for half in whole.chunk(2, dim)], dim)
    return whole.chunk(size, dim)[rank]


def _generator(name: str, seed: int, device: torch.device) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
