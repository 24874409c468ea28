"""The looped router and its statistics against the reference's record of every router call."""

from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

from pltmoe.model.loop_stats import LoopStats, collect_loop_stats, loop_metrics
from pltmoe.model.reference import ReferencePLT, load_balancing_loss
from pltmoe.model.router import LoopRouter
from tests.single_process import build_model
from tests.state_dicts import megatron_to_hf
from tests.unit.model.cases import ALL, small_model


def run_both(build: Callable[..., Any], **changes: Any) -> tuple[Any, Any, Any]:
    model = small_model(**{**ALL["row6_plt3"], **changes})
    plt = build(model)
    reference = ReferencePLT(model).double()
    state = {k: v for k, v in plt.state_dict().items() if isinstance(v, torch.Tensor)}
    reference.load_state_dict(megatron_to_hf(state, model))
    tokens = torch.randint(0, model.vocab_size, (2, 16), generator=torch.Generator().manual_seed(6))
    plt(tokens)
    return model, plt, reference(tokens)


def test_statistics_name_loops_and_layers_from_one(build: Callable[..., Any]) -> None:
    model, plt, expected = run_both(build)
    metrics = loop_metrics(collect_loop_stats(plt.layers))
    first = {r.layer: r.experts for r in expected.routers if r.loop == 1}
    for record in expected.routers:
        where = f"loop_{record.loop}/layer_{record.layer:02d}"
        counts = torch.bincount(record.experts.flatten(), minlength=model.num_experts).double()
        assert abs(metrics[f"moe/load_imbalance/{where}"] - counts.max() / counts.mean()) < 1e-5
        loss = load_balancing_loss(record, model)
        assert abs(metrics[f"moe/aux_loss/{where}"] - loss) < 1e-5
        z = record.logits.logsumexp(-1).square().mean()
        assert abs(metrics[f"moe/z_loss/{where}"] - z) < 1e-4
        if record.loop > 1:
            same = (record.experts[:, :, None] == first[record.layer][:, None, :]).any(-1)
            share = same.double().mean()
            assert abs(metrics[f"moe/expert_overlap/{where}"] - share) < 1e-5
            assert 0 < metrics[f"plt/gate_mean/{where}"] < 1
    assert "moe/expert_overlap/loop_1" not in metrics
    assert "plt/gate_mean/loop_1" not in metrics
    per_layer = [metrics[f"moe/aux_loss/loop_2/layer_{n:02d}"] for n in (1, 2)]
    assert abs(metrics["moe/aux_loss/loop_2"] - sum(per_layer) / 2) < 1e-9


def test_statistics_of_shared_routing(build: Callable[..., Any]) -> None:
    """Balance is loop 1's; the overlap says what later loops would have chosen themselves."""
    model, plt, expected = run_both(
        build, moe_loop_routing="shared", moe_expert_bias_update_rate=1e-3
    )
    metrics = loop_metrics(collect_loop_stats(plt.layers))
    assert not {n for n in metrics if n.startswith(("moe/load", "moe/aux")) and "loop_1" not in n}
    assert "moe/aux_loss/loop_1/layer_02" in metrics
    for record in expected.routers:
        where = f"loop_{record.loop}/layer_{record.layer:02d}"
        z = record.logits.logsumexp(-1).square().mean()
        assert abs(metrics[f"moe/z_loss/{where}"] - z) < 1e-4
        bias = plt.layers[record.layer - 1].mlp.router.expert_bias
        own = (record.logits.softmax(-1) + bias).topk(model.moe_top_k).indices
        share = (record.experts[:, :, None] == own[:, None, :]).any(-1).double().mean()
        if record.loop > 1:
            assert abs(metrics[f"moe/expert_overlap/{where}"] - share) < 1e-5
            assert share < 0.95


def test_float32_is_not_rounded_by_transformer_engine(
    groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which Megatron's router takes where it can be imported, and which rounds it to TF32."""
    monkeypatch.setattr(moe_utils, "te_general_gemm", lambda *a, **k: pytest.fail("rounded"))
    plt = build_model(small_model(**ALL["row5_plt2"]), groups=groups, dtype=torch.float32)
    router = plt.layers[0].mlp.router
    x = torch.randn(3, 2, router.weight.size(1), requires_grad=True)
    logits = router.gating(x)
    logits.sum().backward()
    expected = (x.double() @ router.weight.double().T).detach()
    torch.testing.assert_close(logits.double(), expected, rtol=1e-6, atol=1e-6)
    router.bfloat16()
    with pytest.raises(pytest.fail.Exception, match="rounded"):
        router.gating(x.bfloat16())  # whose products are exact in it


def test_weights_are_those_of_megatrons_own_choice() -> None:
    """Which is what Transformer Engine's fused kernel computes; gradients, too, in float32."""
    router, found = SimpleNamespace(topk=3, expert_bias=None, config=SimpleNamespace()), []
    router._best = MethodType(LoopRouter._best, router)
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    for fused in (False, True):
        x = logits.clone().requires_grad_()
        router.config.moe_router_fusion = False
        if fused:
            probs, chosen = topk_routing_with_score_function(x, 3)
        else:
            probs, chosen = LoopRouter._choose(router, x, x.softmax(-1))
        found.append((probs, chosen, *torch.autograd.grad(probs.square().sum(), x)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["shared_routing_plt3", "row5_plt2"])
def test_rows_padded_for_fp8_change_nothing(
    name: str, build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dispatcher adds rows to its map in place; later loops must not take them for chosen."""
    monkeypatch.setattr(token_dispatcher, "get_align_size_for_quantization", lambda config: 16)
    model = small_model(**ALL[name])
    tokens = torch.randint(0, model.vocab_size, (2, 16), generator=torch.Generator().manual_seed(6))
    found, rows = [], []
    for padded in (False, True):
        plt = build(model)
        plt.config.moe_router_padding_for_quantization = padded
        experts = plt.layers[0].mlp.experts
        experts.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[1].tolist()))
        logits = plt(tokens)
        logits.square().sum().backward()
        gradients = [p.grad if p.grad is not None else p.main_grad for p in plt.parameters()]
        found.append([logits.detach(), *gradients])
    loops = model.num_loops
    assert all(n % 16 == 0 for counts in rows[loops:] for n in counts)
    assert any(n % 16 for counts in rows[:loops] for n in counts)
    for plain, with_rows in zip(*found, strict=True):
        torch.testing.assert_close(plain, with_rows, rtol=1e-10, atol=1e-12)


def test_statistics_add_up_and_reset(build: Callable[..., Any]) -> None:
    model, plt, _ = run_both(build)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    plt(tokens)
    counts = collect_loop_stats(plt.layers)["expert_counts"]
    assert (counts.sum(-1) == (32 + 8) * model.moe_top_k).all()
    plt.eval()
    plt(tokens)
    plt.train()
    with torch.no_grad():
        plt(tokens)
    assert torch.equal(collect_loop_stats(plt.layers)["expert_counts"], counts)
    plt.begin_step(watch=False)
    plt(tokens)
    assert not any(stat.any() for stat in collect_loop_stats(plt.layers).values())


@pytest.mark.parametrize(("routing", "loops"), [("independent", (1, 2, 3)), ("shared", (1,))])
def test_expert_bias_counts_tokens_of_the_loops_that_choose(
    routing: str, loops: tuple[int, ...], build: Callable[..., Any]
) -> None:
    model, plt, expected = run_both(
        build, moe_loop_routing=routing, moe_expert_bias_update_rate=1e-3
    )
    for number, layer in enumerate(plt.layers, start=1):
        counts = sum(
            torch.bincount(r.experts.flatten(), minlength=model.num_experts)
            for r in expected.routers
            if r.layer == number and r.loop in loops
        )
        assert torch.equal(layer.mlp.router.local_tokens_per_expert.long(), counts)
        assert counts.sum() == len(loops) * 32 * model.moe_top_k


def test_expert_bias_moves_towards_balance(build: Callable[..., Any]) -> None:
    """Megatron's finalize_model_grads updates the bias once per step, from all loops' counts."""
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias

    model, plt, _ = run_both(build, moe_expert_bias_update_rate=1e-3)
    router = plt.layers[0].mlp.router
    before, counts = router.expert_bias.clone(), router.local_tokens_per_expert.clone()
    _update_router_expert_bias([plt], plt.config)
    moved = router.expert_bias - before
    assert torch.allclose(moved, 1e-3 * torch.sign(counts.mean() - counts))
    assert router.expert_bias.dtype == torch.float32


def test_losses_are_means_over_the_calls_of_all_ranks() -> None:
    """Two micro batches, each seen by two ranks that add their shares of it."""
    stats = LoopStats(small_model(**ALL["row2_loop2"]), torch.device("cpu"))
    map_te = torch.eye(6, dtype=torch.bool)
    for share in (0.5, 0.5, 1.5, 1.5):
        losses = torch.tensor(share), torch.tensor(4 * share)
        stats.add_routing(2, *losses, map_te, map_te, ranks=2)
    layers = torch.nn.ModuleList([torch.nn.Module()])
    layers[0].stats = stats
    found = loop_metrics(collect_loop_stats(layers))
    assert found["moe/aux_loss/loop_2"] == pytest.approx(2.0)
    assert found["moe/z_loss/loop_2"] == pytest.approx(8.0)
