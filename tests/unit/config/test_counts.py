"""Parameters, FLOPs and KV-cache bytes: the paper's numbers, and the real model counted."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pltmoe.config import ModelConfig, load_config, model_from_dict
from pltmoe.config.counts import count_parameters, flops_per_token, kv_cache_bytes
from pltmoe.model.reference import MLP, ReferencePLT
from tests.configs import DENSE, LOOP_ROWS, MOE
from tests.repository import CONFIGS

OPTIONS = {
    "plain": {},
    "tied": {"tied_embeddings": True},
    "no qk norm": {"qk_norm": False},
    "multi-head": {"num_kv_heads": 4},
}
GATE_ON_HIDDEN = LOOP_ROWS["5 plt2"] | {"gate_use_hidden_states": True}


def of_file(name: str) -> ModelConfig:
    return load_config(CONFIGS / name).model


@pytest.mark.parametrize(
    ("file", "total", "active"),
    [
        ("plt_1.7b_40b.yaml", 39.19, 1.741),
        ("vanilla_2.5b_60b.yaml", 58.65, 2.477),
        ("ablation_680m_13b/row1_vanilla.yaml", 13.14, 0.686),
        ("ablation_680m_13b/row5_plt2.yaml", 13.14, 0.686),
        ("plt_dense_1.2b.yaml", 1.21, 1.208),
        ("vanilla_dense_1.2b.yaml", 1.21, 1.208),
        ("plt_moe_1b_7b.yaml", 6.85, 1.210),
        ("vanilla_moe_1b_7b.yaml", 6.85, 1.210),
    ],
)
def test_counts_of_the_papers_models(file: str, total: float, active: float):
    count = count_parameters(of_file(file))
    assert round(count.total / 1e9, 2) == total
    assert round(count.active / 1e9, 3) == active


@pytest.mark.parametrize("body", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("row", [*LOOP_ROWS, "gate on hidden"])
def test_counted_parameters_are_those_of_the_model(row: str, option: str, body: dict):
    loops = LOOP_ROWS.get(row, GATE_ON_HIDDEN)
    m = model_from_dict(body | OPTIONS[option] | loops)
    with torch.device("meta"):
        model = ReferencePLT(m)
    count = count_parameters(m)
    assert count.total == sum(p.numel() for p in model.parameters())
    expert = sum(p.numel() for p in MLP(m.hidden_size, m.moe_ffn_hidden_size or 1).parameters())
    idle = m.num_layers * (m.num_experts - m.moe_top_k) * expert if m.is_moe else 0
    assert count.active == count.total - idle


def counted_flops(m: ModelConfig, slots: int) -> int:
    """Forward FLOPs of the reference, as torch counts every matrix product it really does."""
    torch.manual_seed(0)
    model = ReferencePLT(m)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(m.vocab_size, (1, slots)))
    return counter.get_total_flops()


def hidden_by_masks(m: ModelConfig, slots: int) -> int:
    """FLOPs that the reference spends on masked scores: it computes all s x s of them.

    Masks are written out here, on purpose not with the code that is tested.
    """

    def keys(window: int) -> int:
        return sum(min(query + 1, window) for query in range(slots))

    per_key = 2 * 2 * m.num_layers * m.num_attention_heads * m.head_dim  # Q K and P V
    hidden = m.num_loops * (slots * slots - keys(slots))
    if m.gated_swa:
        hidden += (m.num_loops - 1) * (slots * slots - keys(m.window_keys))
    return per_key * hidden


@pytest.mark.parametrize("body", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("slots", [7, 2], ids=["longer than the window", "shorter"])
@pytest.mark.parametrize("row", [*LOOP_ROWS, "gate on hidden"])
def test_flops_are_what_the_reference_multiplies(row: str, slots: int, body: dict):
    m = model_from_dict(body | LOOP_ROWS.get(row, GATE_ON_HIDDEN))
    expected = (counted_flops(m, slots) - hidden_by_masks(m, slots)) / slots
    assert flops_per_token(m, slots) == pytest.approx(3 * expected, rel=1e-12)


def test_kv_cache_of_the_papers_table():
    """Table 1: n d, L n d, + CLP L n d, shared n d, PLT n d + (L-1) w d (d: K and V of a slot)."""
    n = 4096
    m = {r: of_file(f"ablation_680m_13b/row{r}.yaml") for r in (
        "1_vanilla", "2_loop2", "3_clp", "4_shared_kv", "5_plt2", "6_plt3")}  # fmt: skip
    slot = 16 * 2 * 4 * 128 * 2  # layers, K and V, KV heads, head size, bytes of bf16
    hidden = 1536 * 2  # one vector of the last slot per later loop, for the shift
    assert kv_cache_bytes(m["1_vanilla"], n) == n * slot
    assert kv_cache_bytes(m["2_loop2"], n) == 2 * n * slot
    assert kv_cache_bytes(m["3_clp"], n) == 2 * n * slot + hidden
    assert kv_cache_bytes(m["4_shared_kv"], n) == n * slot + hidden
    assert kv_cache_bytes(m["5_plt2"], n) == (n + 64) * slot + hidden
    assert kv_cache_bytes(m["6_plt3"], n) == (n + 2 * 64) * slot + 2 * hidden
    assert kv_cache_bytes(m["5_plt2"], 10) == 2 * 10 * slot + hidden, "the window is not full yet"
    assert kv_cache_bytes(m["1_vanilla"], n, bytes_per_element=4) == 2 * n * slot
