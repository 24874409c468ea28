"""With one loop the model is transformers' own Qwen3: same weights, same logits, same gradients.

transformers keeps norms and router scores of Qwen3 in float32 whatever the dtype, and its fused
experts know no float64, so both run in float32 and the bound is float32's: rounding of 6e-8 per
operation, through two layers of a small model with logits up to 3.
"""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pltmoe.hf.fields import to_hf_fields
from tests.unit.hf.models import pair, small_model

BOUND = 1e-5


def stock_model(m, weights):
    """Return transformers' model with per-expert weights fused as transformers 5 keeps them."""
    moe = m.is_moe
    config = (Qwen3MoeConfig if moe else Qwen3Config)(**to_hf_fields(m))
    model = (Qwen3MoeForCausalLM if moe else Qwen3ForCausalLM)(config)
    state = dict(weights)
    for layer in range(m.num_layers if moe else 0):
        prefix = f"model.layers.{layer}.mlp.experts."
        parts = {
            name: torch.stack(
                [state.pop(f"{prefix}{e}.{name}.weight") for e in range(m.num_experts)]
            )
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        state[prefix + "gate_up_proj"] = torch.cat([parts["gate_proj"], parts["up_proj"]], 1)
        state[prefix + "down_proj"] = parts["down_proj"]
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", ["vanilla", "dense_vanilla"])
def test_one_loop_equals_transformers_own_model(name, kv_heads):
    m = small_model(name, num_kv_heads=kv_heads)
    reference, model = pair(m)
    model.float()
    stock = stock_model(m, reference.state_dict())
    x = torch.randint(0, m.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    ours, theirs = model(x, labels=x), stock(x, labels=x)
    for logits in (ours.logits, reference(x).logits):
        assert (logits - theirs.logits).abs().max() < BOUND
    assert abs(ours.loss - theirs.loss) < BOUND
    ours.loss.backward()
    theirs.loss.backward()
    for parameter in ("model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"):
        a, b = model.get_parameter(parameter).grad, stock.get_parameter(parameter).grad
        assert (a - b).abs().max() < BOUND, parameter
