"""Models whose layers are spread over GPUs that hold no data."""

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

from tests.unit.hf.models import hf_model, small_model


def run_on_two_gpus() -> None:
    """Compute logits, fill a cache and go on with it, as device_map="auto" lays out a model."""
    for name in ("dense_vanilla", "dense_plt2", "dense_plt3_normed"):
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            model = _spread(name)
            x = torch.zeros(2, 9, dtype=torch.long, device="cuda:0")
            assert model(x, use_cache=False).logits.device.index == 1
            cache = model(x, use_cache=True).past_key_values
            assert model(x[:, :3], past_key_values=cache).logits.shape == (2, 3, 61)
            assert model(x[:, :1], past_key_values=cache).logits.shape == (2, 1, 61)


def _spread(name: str) -> torch.nn.Module:
    """Put accelerate's own hooks on a model whose second layer is on another GPU."""
    model = hf_model(small_model(name)).eval()
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
    for part, gpu in zip(parts, (0, 0, 1, 1, 1), strict=True):
        module = model.get_submodule(part)
        for inner in module.modules():
            for key, weight in inner.named_parameters(recurse=False):
                setattr(inner, key, Parameter(torch.empty_like(weight, device=f"cuda:{gpu}")))
        hook = AlignDevicesHook(f"cuda:{gpu}", skip_keys=["past_key_values"])
        hook.init_hook = lambda module: module  # the weights are there
        add_hook_to_module(module, hook)
    return model
