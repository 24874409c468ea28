"""The Hugging Face model equals the reference (the specification): logits and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from pltmoe.hf import modeling_plt_moe
from pltmoe.model.reference import language_model_loss
from tests.launch import Ranks
from tests.unit.hf.models import (
    MODELS,
    hf_model,
    pair,
    random_reference,
    small_model,
    stacked,
    stock_model,
    tokens,
)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_equal_the_reference(name, attention, monkeypatch):
    monkeypatch.setattr(modeling_plt_moe, "WINDOW_CHUNK", 4)  # several pieces, as in long texts
    m = small_model(name)
    reference, model = pair(m, attn_implementation=attention)
    x = tokens()
    expected = reference(x)
    out = model(x, labels=x)
    assert (out.logits - expected.logits).abs().max() < 1e-10
    loss = language_model_loss(expected.logits[:, :-1], x[:, 1:])
    assert abs(out.loss - loss) < 1e-10
    loss.backward()
    out.loss.backward()
    found, expected = (
        {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in of}
        for of in (model.named_parameters(), reference.named_parameters())
    )
    torch.testing.assert_close(found, stacked(m, expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["plt3_normed", "loop2", "dense_plt2", "plt3_shared_routing"])
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    """Loop 1's keys and values leave the checkpointed region and come back in later loops."""
    _, model = pair(small_model(name))
    model.config.output_router_logits = True
    x = tokens()
    model.train()
    model(x, labels=x, use_cache=False).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    out = model(x, labels=x)
    assert out.past_key_values is None
    out.loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            assert (parameter.grad - expected[name]).abs().max() < 1e-12, name


def test_labels_that_are_left_out_and_summed_loss():
    _, model = pair(small_model("plt2"))
    x = tokens()
    labels = x.clone()
    labels[:, :5] = -100
    out = model(x, labels=labels)
    rows = F.cross_entropy(out.logits[:, 4:-1].flatten(0, 1), x[:, 5:].flatten(), reduction="none")
    assert torch.allclose(out.loss, rows.mean())
    summed = model(x, labels=labels, num_items_in_batch=torch.tensor(10)).loss
    assert torch.allclose(summed, rows.sum() / 10)
    moved = F.pad(labels[:, 1:], (0, 1), value=-100)
    assert torch.allclose(model(x, labels=labels, shift_labels=moved).loss, out.loss)
    assert model(x, labels=labels, shift_labels=moved.flip(0)).loss != out.loss


def test_logits_to_keep():
    _, model = pair(small_model("plt2"))
    x = tokens()
    everything = model(x).logits
    assert torch.allclose(model(x, logits_to_keep=1).logits, everything[:, -1:])
    picked = torch.tensor([2, 5])
    assert torch.allclose(model(x, logits_to_keep=picked).logits, everything[:, picked])


def test_hidden_states_of_every_loop():
    m = small_model("plt3")
    reference, model = pair(m)
    x = tokens()
    states = model(x, output_hidden_states=True).hidden_states
    assert len(states) == m.num_loops * (m.num_layers + 1)
    for loop, h in enumerate(reference(x).loop_hidden[:-1], start=1):
        assert torch.allclose(states[loop * (m.num_layers + 1) - 1], h)
    assert torch.allclose(model.lm_head(states[-1]), model(x).logits)
    assert model(x).hidden_states is None


def test_packed_documents_do_not_see_each_other():
    """Position 0 begins a document, as transformers' data collators pack them."""
    _, model = pair(small_model("plt3_normed"))
    a, b = tokens(1, 6, seed=2), tokens(1, 7, seed=3)
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None]
    packed = model(torch.cat([a, b], 1), position_ids=positions).logits
    apart = torch.cat([model(a).logits, model(b).logits], 1)
    assert (packed - apart).abs().max() < 1e-10


def test_layers_may_be_spread_over_devices():
    """In a process where the CPU does not stand in for CUDA."""
    with Ranks(1, megatron=False) as ranks:
        ranks.run("tests.unit.hf.spread_cases:run_on_two_gpus")


def test_half_precision_runs_and_keeps_the_expert_bias_wide():
    m = small_model("plt2_expert_bias")
    model = hf_model(m, dtype=torch.bfloat16)
    out = model(tokens(), use_cache=True, logits_to_keep=1)
    assert out.logits.dtype == torch.bfloat16
    decoded = model(tokens(s=1), past_key_values=out.past_key_values)  # all loops at once
    assert decoded.logits.dtype == out.past_key_values.last_hidden[0].dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["plt3_normed", "plt3_shared_routing"])
@torch.no_grad()
def test_experts_run_in_grouped_products(name, monkeypatch):
    """transformers' default, where torch has them; in float32, where both are exact to rounding."""
    m = small_model(name, moe_ffn_hidden_size=16)
    model = hf_model(m).eval()
    model.load_state_dict(stacked(m, random_reference(m, dtype=torch.float32).state_dict()))
    calls, product = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *x, **y: calls.append(1) or product(*x, **y))
    grouped = model(tokens()).logits
    assert len(calls) == 2 * m.num_layers * m.num_loops
    model.set_experts_implementation("eager")
    one_by_one = model(tokens()).logits
    assert len(calls) == 2 * m.num_layers * m.num_loops
    torch.testing.assert_close(grouped, one_by_one, rtol=1e-5, atol=1e-5)


def test_expert_bias_decides_the_choice_but_not_the_weights():
    m = small_model("plt2_expert_bias")
    _, model = pair(m)
    gate = model.model.layers[0].mlp.gate
    x = torch.randn(5, m.hidden_size, dtype=torch.float64)
    gate.e_score_correction_bias.copy_(torch.tensor([0.0, 8.0, 9.0, 0.0]))
    experts, weights, _ = gate(x)
    assert experts.tolist() == [[2, 1]] * 5
    scores = (x @ gate.weight.T).softmax(-1)[:, [2, 1]]
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True))


def test_refusals_say_what_to_do():
    _, model = pair(small_model("plt2"))
    x = tokens()
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        model(x, output_attentions=True)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(
        ValueError, match=r"attention_mask has shape \[2, 5\]; expected \[batch, 13"
    ):
        model(x, attention_mask=torch.ones(2, 5))
    hole = torch.ones(2, 13, dtype=torch.long)
    hole[0, :2] = hole[1, 11:] = 0
    model(x, attention_mask=hole)
    hole[1, 12] = 1
    with pytest.raises(ValueError, match="has padding between tokens of a row, .* pad on the left"):
        model(x, attention_mask=hole)
    with pytest.raises(ValueError, match="does not support|flash"):
        hf_model(small_model("plt2"), attn_implementation="flash_attention_2")


def test_the_balancing_loss_of_one_loop_is_that_of_qwen3_moe():
    m = small_model("vanilla", moe_aux_loss_coeff=0.3)
    reference, model = pair(m)
    stock = stock_model(m, reference.state_dict()).double()
    x, mask = tokens(), torch.ones(2, 13, dtype=torch.long)
    mask[1, :5] = 0
    labels = x.clone()
    labels[1, :6] = -100  # what a slot of padding says is anybody's
    asked = {"attention_mask": mask, "labels": labels, "output_router_logits": True}
    out, expected = model(x, **asked), stock(x, **asked)
    assert len(out.router_logits) == len(expected.router_logits) == 2
    # Qwen3-MoE computes norms and router scores in float32.
    assert out.aux_loss.item() == pytest.approx(expected.aux_loss.item(), abs=1e-5)
    assert out.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    assert model(x, attention_mask=mask, labels=labels).loss < out.loss - 0.3


@pytest.mark.parametrize("name", ["loop2", "plt3_normed", "plt3_shared_routing", "dense_plt2"])
def test_router_logits_of_every_loop_and_the_balancing_loss_of_those_that_choose(name):
    m = small_model(name, **({} if name == "dense_plt2" else {"moe_aux_loss_coeff": 0.3}))
    reference, model = pair(m)
    model.config.output_router_logits = True
    x = tokens()
    out = model(x, labels=x)
    if not m.is_moe:
        assert out.router_logits is out.aux_loss is None
        return
    records = reference(x).routers
    torch.testing.assert_close(out.router_logits, tuple(r.logits for r in records))
    torch.testing.assert_close(model(x, logits_to_keep=1).router_logits, out.router_logits)
    chosen = torch.cat([r.logits for r in records if r.loop <= m.choosing_loops])
    share = torch.zeros_like(chosen).scatter(1, chosen.topk(2).indices, 1.0).mean(0)
    aux_loss = 4 * (share * chosen.softmax(-1).mean(0)).sum()
    assert out.aux_loss.item() == pytest.approx(aux_loss.item(), abs=1e-6)
    tokens_only = model(x, labels=x, output_router_logits=False)
    assert tokens_only.aux_loss is None
    assert (out.loss - tokens_only.loss).item() == pytest.approx(0.3 * aux_loss.item(), abs=1e-6)
    step = model(x[:, -1:], past_key_values=model(x[:, :-1]).past_key_values)
    assert (step.logits - out.logits[:, -1:]).abs().max() < 1e-10
    last = [logits.view(2, 13, -1)[:, -1] for logits in out.router_logits]
    torch.testing.assert_close(step.router_logits, tuple(last))
    mask = torch.ones(2, 13)
    mask[0, :3] = 0  # none of it among the new slots
    past = model(x[:, :-4], attention_mask=mask[:, :-4]).past_key_values
    step = model(x[:, -4:], attention_mask=mask, past_key_values=past)
    assert torch.equal(step.aux_loss, model._balancing_loss(step.router_logits, None))


@torch.no_grad()
def test_shared_routing_survives_scores_of_zero():
    """A later loop may find all of loop 1's experts so unlikely that their scores are 0."""
    router = hf_model(small_model("loop2_shared_routing")).model.layers[0].mlp.gate
    router.weight.zero_()
    router.weight[:, 0] = torch.tensor([0.0, 200.0, 0.0, 1.0])
    x = torch.eye(16)[:1]
    _, weights, _ = router(x, torch.tensor([[2, 3]]))
    assert weights[0].tolist() == pytest.approx([0.26894, 0.73106], abs=1e-5)
