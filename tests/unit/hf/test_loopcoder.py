"""LoopCoder-v2's layout -> ours, against a few lines written from its description alone.

The real weights are 15 GB; here is a random model with exactly their names and fields.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pltmoe.errors import ConversionError
from pltmoe.hf.fields import from_hf_fields
from pltmoe.hf.loopcoder import convert_loopcoder
from pltmoe.inference.weights import describe_folder
from tests.repository import run_tool

FIELDS = {
    "architectures": ["IQuestPLTCoderForCausalLM"], "model_type": "iquestpltcoder",
    "vocab_size": 47, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu",
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "rope_scaling": None, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": [2, 3], "torch_dtype": "float64",
    "plt_num_loops": 2, "plt_window_size": [4, 0], "plt_normalize_per_loop": True,
    "plt_emb_scale": 0.707, "plt_hidden_scale": 0.053, "plt_gate_use_hidden_states": True,
}  # fmt: skip
VARIANTS = {
    "released": {},
    "three_loops": {"plt_num_loops": 3},
    "gate_on_query": {"plt_gate_use_hidden_states": False},
    "plain_sum": {"plt_normalize_per_loop": False, "plt_emb_scale": None, "plt_hidden_scale": None},
    "real_window": {"plt_window_size": [64, 0]},
}


def random_weights(c):
    d, f, h, g, k = (c[x] for x in ("hidden_size", "intermediate_size", "num_attention_heads",
                                    "num_key_value_heads", "head_dim"))  # fmt: skip
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,)}
    shapes["lm_head.weight"] = (c["vocab_size"], d)
    for i in range(c["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,),
            "self_attn.q_proj.weight": (h * k, d), "self_attn.k_proj.weight": (g * k, d),
            "self_attn.v_proj.weight": (g * k, d), "self_attn.o_proj.weight": (d, h * k),
            "mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d),
            "mlp.down_proj.weight": (d, f), "self_attn.plt_gate.bias": (h,),
            "self_attn.plt_gate.weight": (h, d if c["plt_gate_use_hidden_states"] else k),
        }  # fmt: skip
        if c["plt_gate_use_hidden_states"]:
            layer["self_attn.plt_gate.gate_norm.weight"] = (d,)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    torch.manual_seed(0)
    return {
        name: 0.3 * torch.randn(shape, dtype=torch.float64) + ("norm" in name)
        for name, shape in shapes.items()
    }


def described_model(w, c, ids):
    """Return logits [s, v] of one sequence: the description of LoopCoder-v2, written down."""

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * w[name]

    def rope(x):  # [heads, s, k], halves rotated
        half = c["head_dim"] // 2
        speed = 1.0 / c["rope_theta"] ** (torch.arange(half, dtype=torch.float32) / half)
        angle = (torch.arange(len(ids), dtype=torch.float32)[:, None] * speed).repeat(1, 2)
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * angle.cos().double() + turned * angle.sin().double()

    def attend(q, k, v, window):
        distance = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
        k, v = (x.repeat_interleave(q.size(0) // x.size(0), 0) for x in (k, v))
        scores = q @ k.mT / c["head_dim"] ** 0.5
        hidden = (distance < 0) | (distance > window)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v

    def heads(x):
        return x.unflatten(-1, (-1, c["head_dim"])).transpose(0, 1)

    embedded = h = w["model.embed_tokens.weight"][ids]
    shared = {}
    for loop in range(c["plt_num_loops"]):
        if loop > 0:
            h = norm(h, "model.norm.weight") if c["plt_normalize_per_loop"] else h
            a, b = c["plt_emb_scale"] or 1.0, c["plt_hidden_scale"] or 1.0
            h = a * embedded + b * torch.cat([torch.zeros_like(h[:1]), h[:-1]])
        for i in range(c["num_hidden_layers"]):
            at = f"model.layers.{i}."
            x = norm(h, at + "input_layernorm.weight")
            q, k, v = (heads(x @ w[f"{at}self_attn.{n}_proj.weight"].T) for n in "qkv")
            q, k = rope(q), rope(k)
            if loop == 0:
                shared[i] = (k, v)
                y = attend(q, k, v, len(ids))
            else:
                gate = at + "self_attn.plt_gate."
                if c["plt_gate_use_hidden_states"]:
                    logit = norm(h, gate + "gate_norm.weight") @ w[gate + "weight"].T
                else:
                    logit = torch.einsum("hsk,hk->sh", q, w[gate + "weight"])
                g = torch.sigmoid(logit + w[gate + "bias"]).T[..., None]
                y = g * attend(q, *shared[i], len(ids))
                y = y + (1 - g) * attend(q, k, v, c["plt_window_size"][0])
            h = h + y.transpose(0, 1).flatten(1) @ w[at + "self_attn.o_proj.weight"].T
            x = norm(h, at + "post_attention_layernorm.weight")
            up = F.silu(x @ w[at + "mlp.gate_proj.weight"].T) * (x @ w[at + "mlp.up_proj.weight"].T)
            h = h + up @ w[at + "mlp.down_proj.weight"].T
    return norm(h, "model.norm.weight") @ w["lm_head.weight"].T


def write_folder(folder, fields, weights=None):
    folder.mkdir()
    weights = random_weights(fields) if weights is None else weights
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_other.py").write_text("raise SystemExit\n")
    return weights


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_converted_weights_compute_what_is_described(name, tmp_path):
    """float64; angles are float32 on both sides. Decoding: one pass per token, the same tokens."""
    fields = FIELDS | VARIANTS[name]
    weights = write_folder(tmp_path / "theirs", fields)
    convert_loopcoder(tmp_path / "theirs", tmp_path / "ours", progress=False)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", trust_remote_code=True, dtype=torch.float64
    )
    ids = torch.randint(4, 47, (1, 90 if name == "real_window" else 30))
    expected = described_model(weights, fields, ids[0])
    assert (model(ids).logits[0] - expected).abs().max() < 1e-10
    rows = []
    model.model.layers[0].register_forward_hook(lambda _, args, out: rows.append(args[0].size(1)))
    out = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    again = described_model(weights, fields, out[0])
    assert torch.equal(again[ids.size(1) - 1 : -1].argmax(-1), out[0, ids.size(1) :])
    assert rows[-7:] == [fields["plt_num_loops"]] * 7


def test_what_is_written(tmp_path):
    weights = write_folder(tmp_path / "theirs", FIELDS)
    convert_loopcoder(tmp_path / "theirs", tmp_path / "ours", 20_000, progress=False)
    files = {path.name for path in (tmp_path / "ours").iterdir()}
    assert files >= {"config.json", "tokenizer.json", "modeling_plt_moe.py", "README.md"}
    assert "modeling_other.py" not in files and "model.safetensors" not in files
    found = {}
    for path in (tmp_path / "ours").glob("model-*.safetensors"):
        found |= load_file(path)
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        is_gate = name.endswith((".plt_gate.weight", ".plt_gate.bias"))
        assert torch.equal(found[name], -tensor if is_gate else tensor), name
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["plt_window_size"] == [4, 0] and config["plt_gate_norm"] is True
    assert config["eos_token_id"] == [2, 3] and config["dtype"] == "float64"
    with pytest.raises(ConversionError, match="plt_gate_norm is True; only False can be converted"):
        from_hf_fields(config)  # our training has no gate norm
    with pytest.raises(ConversionError, match="transformers runs the folder .tools/generate.py"):
        describe_folder(tmp_path / "ours")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["IQuestLoopCoderForCausalLM"]}, "V1-Loop. runs its loops without the"),
        ({"architectures": ["LlamaForCausalLM"]}, "only IQuestPLTCoderForCausalLM has this layout"),
        ({"rope_scaling": {"type": "yarn"}}, "only the default rope_type can be converted"),
        ({"mlp_bias": True}, "mlp_bias is True; our model has none"),
        ({"rope_theta": None}, "field missing: rope_parameters.rope_theta"),
        ({"num_key_value_heads": 3}, "must be a multiple of model.num_kv_heads"),
        ({"num_attention_heads": 0, "head_dim": None}, "no head_dim, hidden_size 24, num_att"),
        ({"vocab_size": "many"}, "vocab_size: Input should be a valid integer"),
        ({"plt_window_size": [4.5, 0]}, r"plt_window_size is \[4.5, 0\]; only \[left, 0\]"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None, no number"),
        ({"plt_cross_loop_shift": False}, "plt_cross_loop_shift is False; this layout is not"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is .* not known"),
        ({"tie_word_embeddings": True}, "lm_head.weight is not model.embed_tokens.weight, but"),
        ({"hidden_size": 32}, r"has shape \[47, 24\], but config.json says \[47, 32\]"),
        ({"plt_gate_use_hidden_states": False}, "unknown to the model configuration"),
    ],
)
def test_what_cannot_be_converted_is_named(changes, message, tmp_path):
    weights = random_weights(FIELDS)
    write_folder(tmp_path / "theirs", FIELDS | changes, weights)
    with pytest.raises(ConversionError, match=message):
        convert_loopcoder(tmp_path / "theirs", tmp_path / "ours", progress=False)
    assert not (tmp_path / "ours").exists()


def test_with_one_loop_it_is_a_plain_decoder(tmp_path):
    """The released R = 1 keeps the fields of what is between loops; they mean nothing there."""
    fields = FIELDS | {"plt_num_loops": 1}
    weights = {name: x for name, x in random_weights(fields).items() if "plt_gate" not in name}
    write_folder(tmp_path / "theirs", fields, weights)
    convert_loopcoder(tmp_path / "theirs", tmp_path / "ours", progress=False)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", trust_remote_code=True, dtype=torch.float64
    )
    ids = torch.randint(4, 47, (1, 30))
    assert (model(ids).logits[0] - described_model(weights, fields, ids[0])).abs().max() < 1e-10


def test_missing_fields_and_tensors_are_named(tmp_path):
    weights = random_weights(FIELDS)
    lacking = {name: x for name, x in weights.items() if "gate_norm" not in name}
    write_folder(tmp_path / "tensors", FIELDS, lacking)
    with pytest.raises(ConversionError, match="tensor missing: model.layers.0.*gate_norm"):
        convert_loopcoder(tmp_path / "tensors", tmp_path / "ours", progress=False)
    write_folder(tmp_path / "fields", FIELDS, weights)
    for lacking in ("plt_window_size", "plt_gate_use_hidden_states", "plt_hidden_scale"):
        without = {name: value for name, value in FIELDS.items() if name != lacking}
        (tmp_path / "fields" / "config.json").write_text(json.dumps(without))
        with pytest.raises(ConversionError, match=f"field missing: {lacking}"):
            convert_loopcoder(tmp_path / "fields", tmp_path / "ours", progress=False)
    (tmp_path / "fields" / "config.json").write_text("{")
    with pytest.raises(ConversionError, match="config.json: cannot be read"):
        convert_loopcoder(tmp_path / "fields", tmp_path / "ours", progress=False)


def test_the_tool_knows_the_layout(tmp_path):
    write_folder(tmp_path / "theirs", FIELDS)
    folders = ("--model", tmp_path / "theirs", "--output", tmp_path / "ours")
    refused = run_tool("convert_from_hf.py", *folders, "--dtype", "bfloat16").stderr
    assert "a Hugging Face folder as it is: leave out" in refused
    assert "PLT-2, one pass per token" in run_tool("convert_from_hf.py", *folders).stdout
    assert Path(tmp_path / "ours" / "config.json").is_file()
    fields = FIELDS | {"architectures": ["Qwen3ForCausalLM"]}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(fields))
    said = run_tool("convert_from_hf.py", *folders).stderr
    assert "give --config, the run that will start from these" in said
