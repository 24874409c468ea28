"""Small decoders in float64 with the weights of a reference model, every option of the loops."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pltmoe.config import ModelConfig
from pltmoe.inference.cache import StaticCache
from pltmoe.inference.model import PLTDecoder
from pltmoe.inference.weights import Weights, pack
from pltmoe.model.reference import ReferencePLT
from tests.unit.hf.models import MODELS, random_reference, small_model

SHARED_ROUTING = {
    "plt2_routing": {"moe_loop_routing": "shared"},
    "plt3_normed_routing": {"moe_loop_routing": "shared"},
    "plt2_expert_bias_routing": {"moe_loop_routing": "shared"},
    "loop3_routing": {"moe_loop_routing": "shared"},
    "plt2_no_shift_routing": {"moe_loop_routing": "shared"},
}
NAMES = [*MODELS, *SHARED_ROUTING]


def model(name: str) -> ModelConfig:
    """Return a model section; names of tests/unit/hf/models.py, and with loop-shared routing."""
    if name in SHARED_ROUTING:
        return small_model(name.removesuffix("_routing"), **SHARED_ROUTING[name])
    return small_model(name)


def weights_of(
    model: ModelConfig,
    name_to_tensor: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    fp8: bool = False,
) -> Weights:
    """Pack a state dict with Hugging Face (or reference) names."""
    dtype = dtype or name_to_tensor["model.embed_tokens.weight"].dtype
    return pack(model, name_to_tensor.__getitem__, torch.device(device), dtype, fp8)


def pair(name: str, max_slots: int = 64) -> tuple[ReferencePLT, PLTDecoder]:
    """Return reference and decoder in float64 with the same random weights."""
    reference = random_reference(model(name))
    return reference, PLTDecoder(weights_of(reference.m, reference.state_dict()), max_slots)


def cache_of(decoder: PLTDecoder, batch: int, capacity: int = 40) -> StaticCache:
    """Return an empty float64 cache."""
    return StaticCache(decoder.m, batch, capacity, "cpu", torch.float64)


def kept(cache: StaticCache, sequence: int) -> list[Tensor]:
    """Return everything the next step of a sequence reads, rings in the order of slots."""
    length = int(cache.lengths_b[sequence])
    out = []
    for layer in range(cache.m.num_layers):
        for x in cache.full_of_all_loops(layer):
            out.append(x[sequence, :, :, :length])
    # The next step overwrites the oldest slot of a full ring before it reads.
    seen = torch.arange(max(length - cache.window + 1, 0), length) % cache.window
    out += [x[sequence][:, :, seen] for x in (*cache.ring_k, *cache.ring_v)]
    return [*out, cache.handed_on_bld[sequence]]
