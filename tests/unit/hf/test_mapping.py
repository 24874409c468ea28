"""The name table: both directions, exact, and clear about what does not fit."""

import pytest
import torch

from pltmoe.config import model_from_dict
from pltmoe.errors import ConversionError
from pltmoe.hf.mapping import join_qkv, rows, split_qkv
from pltmoe.model.reference import ReferencePLT
from tests.state_dicts import hf_to_megatron, megatron_to_hf
from tests.unit.hf.models import MODELS, small_model


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_again_is_exact(name):
    """The reference carries the Hugging Face names, so its state dict is the other side."""
    m = small_model(name)
    hf = ReferencePLT(m).state_dict()
    if m.tied_embeddings:
        hf.pop("lm_head.weight")
    megatron = hf_to_megatron(hf, m)
    assert set(megatron) == {row.megatron for row in rows(m)}
    back = megatron_to_hf(megatron, m)
    assert set(back) == set(hf)
    for key, tensor in hf.items():
        assert torch.equal(back[key], tensor), key


def test_qkv_rows_lie_per_group():
    """2 groups, 2 query heads each, head size 1: q q k v | q q k v (Megatron's layout)."""
    q, k, v = (torch.tensor(rows)[:, None] for rows in ([1, 2, 3, 4], [10, 20], [100, 200]))
    assert join_qkv(q, k, v, groups=2).flatten().tolist() == [1, 2, 10, 100, 3, 4, 20, 200]
    for part, again in zip((q, k, v), split_qkv(join_qkv(q, k, v, 2), 2, 1), strict=True):
        assert torch.equal(part, again)


def test_gate_rows_come_first():
    m = small_model("dense_vanilla")
    hf = ReferencePLT(m).state_dict()
    fused = hf_to_megatron(hf, m)["layers.0.mlp.linear_fc1.weight"]
    assert torch.equal(fused[: m.ffn_hidden_size], hf["model.layers.0.mlp.gate_proj.weight"])


def test_tied_head_is_dropped():
    m = small_model("tied")
    assert "output_layer.weight" not in hf_to_megatron(ReferencePLT(m).state_dict(), m)


def test_unknown_tensor_is_named():
    m = small_model("plt2")
    hf = ReferencePLT(m).state_dict() | {"model.layers.0.surprise": torch.zeros(1)}
    with pytest.raises(ConversionError, match="unknown.*model.layers.0.surprise"):
        hf_to_megatron(hf, m)


def test_missing_tensor_is_named():
    m = small_model("plt2")
    megatron = hf_to_megatron(ReferencePLT(m).state_dict(), m)
    del megatron["layers.1.self_attention.plt_gate.bias"]
    with pytest.raises(ConversionError, match="missing: layers.1.self_attention.plt_gate.bias"):
        megatron_to_hf(megatron, m)
    assert "model.layers.1.self_attn.plt_gate.bias" not in megatron_to_hf(megatron, m, partial=True)


def test_half_a_fused_tensor_is_an_error_even_when_partial():
    m = small_model("plt2")
    hf = ReferencePLT(m).state_dict()
    del hf["model.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(ConversionError, match="Hugging Face tensor missing: model.layers.0"):
        hf_to_megatron(hf, m, partial=True)


@pytest.mark.parametrize("convert", [hf_to_megatron, megatron_to_hf])
def test_wrong_shape_says_both(convert):
    m = small_model("plt2")
    tensors = ReferencePLT(m).state_dict()
    if convert is megatron_to_hf:
        tensors = hf_to_megatron(tensors, m)
    other = model_from_dict(m.model_dump() | {"vocab_size": m.vocab_size + 1})
    with pytest.raises(ConversionError, match=r"shape \[\d+, 16\].*says \[\d+, 16\]"):
        convert(tensors, other)
