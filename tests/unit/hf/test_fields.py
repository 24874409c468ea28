"""The configuration in both languages, and what is not ours is refused."""

import json

import pytest
from transformers import Qwen3MoeConfig

from pltmoe.errors import ConversionError
from pltmoe.hf.configuration_plt_moe import PLTMoEConfig
from pltmoe.hf.fields import LOOP_FIELDS, from_hf_fields, hf_model_type, to_hf_fields
from tests.unit.hf.models import MODELS, small_model


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_again(name, tmp_path):
    """Also through a file written by transformers."""
    m = small_model(name)
    fields = to_hf_fields(m, 128, model_type="plt_moe")
    assert from_hf_fields(fields) == m
    PLTMoEConfig(**fields).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert from_hf_fields(stored) == m
    assert PLTMoEConfig.from_pretrained(tmp_path).to_dict() == PLTMoEConfig(**fields).to_dict() | {
        "transformers_version": stored["transformers_version"]
    }


def test_the_contract_of_the_names():
    fields = to_hf_fields(small_model("plt3_normed", window_keys=64), 128)
    assert fields["model_type"] == "plt_moe"
    assert fields["architectures"] == ["PLTMoEForCausalLM"]
    assert fields["plt_num_loops"] == 3
    assert fields["plt_window_size"] == [63, 0], "64 keys including the current token"
    assert fields["plt_normalize_per_loop"] is True
    assert (fields["plt_emb_scale"], fields["plt_hidden_scale"]) == (0.7, 0.3)
    assert fields["plt_gate_use_hidden_states"] is False
    # the last one is how `transformers serve` finds the class
    auto_classes = {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForDecision"}
    assert set(fields["auto_map"]) == auto_classes


@pytest.mark.parametrize(
    ("name", "changes", "kind"),
    [
        ("vanilla", {}, "qwen3_moe"),
        ("dense_vanilla", {}, "qwen3"),
        ("vanilla", {"qk_norm": False}, "plt_moe"),
        ("vanilla", {"moe_expert_bias_update_rate": 0.1}, "plt_moe"),
        ("loop2", {}, "plt_moe"),
    ],
)
def test_stock_models_where_they_compute_the_same(name, changes, kind):
    m = small_model(name, **changes)
    assert hf_model_type(m) == kind
    fields = to_hf_fields(m)
    custom = [key for key in fields if key.startswith("plt_") or key in ("auto_map", "use_qk_norm")]
    assert bool(custom) == (kind == "plt_moe")
    assert from_hf_fields(fields).model_dump(exclude={"window_keys"}) == m.model_dump(
        exclude={"window_keys"}
    )


@pytest.mark.parametrize(("name", "kind"), [("plt2", "plt_moe"), ("vanilla", "qwen3_moe")])
def test_a_new_field_of_the_model_is_not_lost(name, kind, monkeypatch):
    """As long as this file does not know it; a stock model never will."""
    monkeypatch.delitem(LOOP_FIELDS, "qk_norm")
    monkeypatch.setattr("pltmoe.hf.fields.hf_model_type", lambda m: kind)
    with pytest.raises(
        ConversionError, match=rf"model.qk_norm \(False\) has no place .* a {kind}:"
    ):
        to_hf_fields(small_model(name, qk_norm=False))


def test_a_configuration_that_transformers_wrote():
    """Field names of today's transformers are understood, not only our own."""
    stored = json.loads(Qwen3MoeConfig(**to_hf_fields(small_model("vanilla"))).to_json_string())
    assert from_hf_fields(stored) == small_model("vanilla", window_keys=64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' can be converted"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "default rope_type"),
        ({"rope_parameters": {"type": "yarn", "rope_theta": 1.0}}, "default rope_type"),
        ({"partial_rotary_factor": 0.5}, "without options .*'partial_rotary_factor': 0.5"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; it must be a section"),
        ({"layer_types": ["sliding_attention"]}, "only full_attention can be"),
        ({"plt_window_size": 64}, r"plt_window_size is 64; only \[left, 0\]"),
        ({"plt_window_size": [63, 1]}, r"plt_window_size is \[63, 1\]"),
        ({"plt_window_size": None}, "plt_window_size is None"),
        ({"plt_other": 2}, "plt_other is 2; only None"),
        ({"rope_parameters": {}}, "field missing: rope_parameters.rope_theta"),
        ({"num_hidden_layers": 0}, "num_layers"),
        ({"num_key_value_heads": 3}, "multiple of model.num_kv_heads"),
    ],
)
def test_what_cannot_be_converted_is_named(changes, message):
    with pytest.raises(ConversionError, match=message):
        from_hf_fields(to_hf_fields(small_model("plt2")) | changes)


def test_a_missing_field_is_named():
    fields = to_hf_fields(small_model("plt2"))
    del fields["plt_num_loops"]
    with pytest.raises(ConversionError, match="config.json: field missing: plt_num_loops"):
        from_hf_fields(fields)


def test_exports_of_before_shared_routing_are_read():
    fields = to_hf_fields(small_model("plt2"))
    del fields["plt_loop_routing"]
    assert from_hf_fields(fields) == small_model("plt2")
    assert PLTMoEConfig(**fields).plt_loop_routing == "independent"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plt_window_size": [64, 1]}, r"plt_window_size \(\[64, 1\]\)"),
        ({"plt_share_first_loop_kv": False}, "plt_gated_swa needs plt_share_first_loop_kv"),
        ({"plt_cross_loop_shift": False, "plt_hidden_scale": 0.5}, "plt_hidden_scale"),
        ({"plt_num_loops": 0}, "plt_num_loops"),
        ({"plt_other": 2}, "plt_other is not known to this version"),
        ({"num_experts": 0}, "needs intermediate_size"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"plt_loop_routing": "some"}, r"plt_loop_routing \(some\) must be independent or shared"),
        (
            {"plt_loop_routing": "shared", "num_experts": 0, "intermediate_size": 8},
            "needs num_experts: a dense model has none to choose",
        ),
    ],
)
def test_the_configuration_refuses_contradictions(changes, message):
    fields = to_hf_fields(small_model("plt2"))
    with pytest.raises(ValueError, match=message):
        PLTMoEConfig(**(fields | changes))


def test_a_model_with_one_loop_has_no_gates():
    assert not PLTMoEConfig(plt_num_loops=1).plt_gated_swa
