"""The reference itself, against decoding slot by slot; against transformers: hf/test_stock.py."""

import math

import pytest
import torch
from torch import Tensor

from pltmoe.config import ModelConfig
from pltmoe.model.reference import (
    ReferencePLT,
    apply_rope,
    load_balancing_loss,
    rope_angles,
    router_loss,
)
from tests.unit.model.cases import ALL, small_model


def random_reference(model: ModelConfig) -> ReferencePLT:
    torch.manual_seed(0)
    reference = ReferencePLT(model).double()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0, 0.3).add_(1.0 if parameter.dim() == 1 else 0.0)
        for bias in reference.buffers():
            bias.normal_(0, 0.1)
    return reference


def decode_slot_by_slot(reference: ReferencePLT, tokens: list[int]) -> list[Tensor]:
    """All L loops of slot i before slot i + 1 begins: cross-loop parallelism in one pass per slot.

    Written from the paper's description with explicit caches and lists, one slot at a time; it
    shares only weights and norms with the reference, no masks and no shift.
    """
    m = reference.m
    angles = rope_angles(m, len(tokens), torch.device("cpu"))
    keys = [[[] for _ in range(m.num_layers)] for _ in range(m.num_loops)]
    values = [[[] for _ in range(m.num_layers)] for _ in range(m.num_loops)]
    previous = [torch.zeros(m.hidden_size, dtype=torch.float64) for _ in range(m.num_loops)]
    chosen: dict[int, list[int]] = {}  # of each layer, at this slot
    all_logits = []
    for slot, token in enumerate(tokens):
        embedding = reference.model.embed_tokens.weight[token]
        outputs: list[Tensor] = []
        for loop in range(m.num_loops):
            if loop == 0:
                h = embedding
            elif m.cross_loop_shift:
                h = m.emb_scale * embedding + m.hidden_scale * previous[loop - 1]
            else:
                h = outputs[-1]
            for index, layer in enumerate(reference.model.layers):
                attention, x = layer.self_attn, layer.input_layernorm(h)
                q = attention.q_proj(x).view(m.num_attention_heads, m.head_dim)
                k = attention.k_proj(x).view(m.num_kv_heads, m.head_dim)
                v = attention.v_proj(x).view(m.num_kv_heads, m.head_dim)
                q, k = attention.q_norm(q), attention.k_norm(k)
                q, k = (apply_rope(t.unsqueeze(1), angles[slot]).squeeze(1) for t in (q, k))
                keys[loop][index].append(k)
                values[loop][index].append(v)
                y = torch.zeros(m.num_attention_heads, m.head_dim, dtype=torch.float64)
                for head in range(m.num_attention_heads):
                    group = head // (m.num_attention_heads // m.num_kv_heads)

                    def look(loop_of_kv: int, last: int | None) -> Tensor:
                        past_k = [t[group] for t in keys[loop_of_kv][index]]  # noqa: B023
                        past_v = [t[group] for t in values[loop_of_kv][index]]  # noqa: B023
                        past_k, past_v = past_k[-(last or 0) :], past_v[-(last or 0) :]
                        score = torch.stack([q[head] @ t for t in past_k])  # noqa: B023
                        weight = (score / m.head_dim**0.5).softmax(0)
                        return weight @ torch.stack(past_v)

                    if loop == 0 or not m.share_first_loop_kv:
                        y[head] = look(loop, None)
                    elif not m.gated_swa:
                        y[head] = look(0, None)
                    else:
                        gate = attention.plt_gate
                        g = torch.sigmoid(gate.weight[head] @ q[head] + gate.bias[head])
                        y[head] = g * look(loop, m.window_keys) + (1 - g) * look(0, None)
                h = h + attention.o_proj(y.flatten())
                x = layer.post_attention_layernorm(h)
                if m.is_moe:
                    scores = layer.mlp.gate(x).softmax(-1)
                    if loop == 0 or m.moe_loop_routing == "independent":
                        bias = getattr(layer.mlp.gate, "e_score_correction_bias", 0.0)
                        order = sorted(range(len(scores)), key=(scores + bias).tolist().__getitem__)
                        chosen[index] = order[-(m.moe_top_k or 0) :]
                    total = sum(scores[e] for e in chosen[index])
                    h = h + sum(scores[e] / total * layer.mlp.experts[e](x) for e in chosen[index])
                else:
                    h = h + layer.mlp(x)
            outputs.append(h)
        previous = [reference.model.norm(h) if m.normalize_per_loop else h for h in outputs]
        all_logits.append(reference.lm_head(reference.model.norm(outputs[-1])))
    return all_logits


@pytest.mark.parametrize(
    "name",
    ["row1_vanilla", "row2_loop2", "row3_clp", "row4_shared_kv", "row5_plt2", "row6_plt3"]
    + ["norm_and_scales", "dense_row5_plt2", "expert_bias", "shared_routing_loop2"]
    + ["shared_routing_plt2", "shared_routing_plt3"],
)
@torch.no_grad()
def test_equals_decoding_slot_by_slot(name: str) -> None:
    model = small_model(**ALL[name])
    reference = random_reference(model)
    tokens = torch.randint(0, model.vocab_size, (11,), generator=torch.Generator().manual_seed(1))
    expected = decode_slot_by_slot(reference, tokens.tolist())
    assert (reference(tokens[None]).logits[0] - torch.stack(expected)).abs().max() < 1e-10


@torch.no_grad()
def test_gate_multiplies_the_local_window() -> None:
    """g = 1 leaves only the window: with one key, later loops attend to their own slot alone."""
    model = small_model(**{**ALL["row5_plt2"], "window_keys": 1})
    reference = random_reference(model)
    for layer in reference.model.layers:
        layer.self_attn.plt_gate.bias.fill_(1e4)  # g = 1
    borrowed: list[Tensor] = []

    def forget_the_past(module, args, kwargs=None):  # type: ignore[no-untyped-def]
        x, angles, loop, first_kv = args
        if loop > 1:
            borrowed.append(first_kv[0])
            first_kv = tuple(torch.randn_like(t) for t in first_kv)
        return x, angles, loop, first_kv

    tokens = torch.randint(0, model.vocab_size, (1, 9), generator=torch.Generator().manual_seed(1))
    expected = reference(tokens).logits
    for layer in reference.model.layers:
        layer.self_attn.register_forward_pre_hook(forget_the_past)
    assert (reference(tokens).logits - expected).abs().max() < 1e-12
    assert len(borrowed) == model.num_layers
    for layer in reference.model.layers:
        layer.self_attn.plt_gate.bias.fill_(-1e4)  # g = 0: now only loop 1's K and V count
    assert (reference(tokens).logits - expected).abs().max() > 1e-3


@torch.no_grad()
def test_shared_routing_uses_the_experts_of_loop_1() -> None:
    """Of the same slot, not of the one that the shift brings; independent loops choose others."""
    model = small_model(**ALL["shared_routing_plt3"])
    reference = random_reference(model)
    tokens = torch.randint(0, model.vocab_size, (2, 15), generator=torch.Generator().manual_seed(1))
    routers = reference(tokens).routers
    assert [(r.loop, r.layer) for r in routers] == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]
    for record in routers[2:]:
        assert torch.equal(record.experts, routers[record.layer - 1].experts)
        assert not torch.equal(record.logits, routers[record.layer - 1].logits)
    independent = ReferencePLT(model.model_copy(update={"moe_loop_routing": "independent"}))
    independent.double().load_state_dict(reference.state_dict())
    own = independent(tokens).routers
    assert torch.equal(own[0].experts, routers[0].experts)
    assert not torch.equal(own[2].experts.sort(-1).values, routers[2].experts.sort(-1).values)


@torch.no_grad()
def test_shared_routing_survives_scores_of_zero() -> None:
    """Loop 2 may find all of loop 1's experts so unlikely that their scores are 0 in float32."""
    router = random_reference(small_model(**ALL["shared_routing_plt2"])).float().model.layers[0]
    x = torch.zeros(1, 24)
    x[0, 0] = 1.0
    router.mlp.gate.weight.zero_()
    router.mlp.gate.weight[:, 0] = torch.tensor([0.0, 200.0, 0.0, 1.0, 0.0, 0.0])
    _, experts, weights = router.mlp.gate.choose(x, torch.tensor([[2, 3]]))
    assert experts.tolist() == [[2, 3]]
    assert weights[0].tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)], rel=1e-6)


def test_only_loop_1_is_balanced_when_it_alone_chooses() -> None:
    """The auxiliary loss is loop 1's with the whole coefficient; the z loss averages all loops."""
    model = small_model(**ALL["shared_routing_plt3"])
    reference = random_reference(model)
    tokens = torch.randint(0, model.vocab_size, (2, 15), generator=torch.Generator().manual_seed(1))
    out = reference(tokens)
    balance = sum(load_balancing_loss(record, model) for record in out.routers[:2])
    z = sum(record.logits.logsumexp(-1).square().mean() for record in out.routers) / 3
    expected = model.moe_aux_loss_coeff * balance + model.moe_z_loss_coeff * z
    assert torch.allclose(router_loss(out, model), expected, rtol=1e-12)
