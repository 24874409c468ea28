"""With one loop the model is transformers' own Qwen3: same weights, same logits, same gradients.

transformers keeps norms and router scores of Qwen3 in float32 whatever the dtype, and its fused
experts know no float64, so both run in float32 and the bound is float32's: rounding of 6e-8 per
operation, through two layers of a small model with logits up to 3.
"""

import pytest
import torch

from tests.unit.hf.models import pair, small_model, stock_model

BOUND = 1e-5


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
