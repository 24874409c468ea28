"""Exported folders, also stock ones, become the same model; broken ones are refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pltmoe.config.counts import count_parameters
from pltmoe.errors import ConversionError, EngineError
from pltmoe.inference.cache import StaticCache
from pltmoe.inference.engine import Engine, check_fp8
from pltmoe.inference.experts import dequantize
from pltmoe.inference.model import PLTDecoder
from pltmoe.inference.prefill import prefill
from pltmoe.inference.sampling import SamplingOptions
from pltmoe.inference.weights import describe_folder, load_weights, random_weights
from tests.unit.hf.models import pair, random_reference, small_model, stock_model, tokens
from tests.unit.inference.folders import MAX_SLOTS, write_folder
from tests.unit.inference.models import NAMES, model, weights_of


@torch.no_grad()
def last_logits(weights, prompts):
    decoder = PLTDecoder(weights, MAX_SLOTS)
    cache = StaticCache(weights.model, len(prompts), 40, "cpu", weights.dtype)
    return prefill(decoder, cache, prompts)


@pytest.mark.parametrize("name", ["plt3_normed", "plt2_expert_bias", "tied", "clp", "dense_plt2"])
@torch.no_grad()
def test_an_exported_folder_computes_what_transformers_computes_from_it(name, tmp_path):
    write_folder(tmp_path, model(name), stop_id=7)
    about = describe_folder(tmp_path)
    assert (about.max_slots, about.stop_ids, about.dtype) == (MAX_SLOTS, (7,), torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).double().eval()
    x = tokens(2, 20)
    found = last_logits(load_weights(tmp_path, dtype=torch.float64), x.tolist())
    assert (found - theirs(x).logits[:, -1]).abs().max() < 1e-10
    greedy = Engine.load(tmp_path, "cpu", torch.float64).generate(
        x.tolist(), SamplingOptions(max_new_tokens=9)
    )
    ids = theirs.generate(x, max_new_tokens=9, do_sample=False, eos_token_id=7, pad_token_id=7)
    for text, row in zip(greedy, ids[:, 20:].tolist(), strict=True):
        assert text.tokens == row[: len(text.tokens)]
        assert len(text.tokens) == 9 or row[len(text.tokens)] == 7


@pytest.mark.parametrize("name", ["vanilla", "dense_vanilla"])
@torch.no_grad()
def test_a_stock_qwen3_folder(name, tmp_path):
    """As transformers itself saves it; it computes norms in float32, hence the bound."""
    reference, _ = pair(small_model(name))
    stock = stock_model(reference.m, reference.state_dict())
    stock.save_pretrained(tmp_path)
    assert describe_folder(tmp_path).model.num_loops == 1
    x = tokens(2, 20)
    found = last_logits(load_weights(tmp_path), x.tolist())
    assert (found - stock(x).logits[:, -1]).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_random_weights_have_every_parameter(name):
    m = model(name)
    weights = random_weights(m, "cpu", torch.float32)
    biases = m.num_layers * m.num_experts if m.moe_expert_bias_update_rate else 0
    assert weights.num_bytes() == 4 * (count_parameters(m).total + biases)
    assert torch.isfinite(last_logits(weights, [[1, 2, 3]])).all()


def test_routers_stay_wide():
    """bf16 logits would choose other experts than training did."""
    layer = random_weights(model("plt2"), "cpu", torch.bfloat16).layers[0]
    assert layer.router_ed.dtype == torch.float32
    assert layer.gate_up_efd.dtype == torch.bfloat16


@torch.no_grad()
def test_experts_in_fp8_compute_what_their_rounded_weights_compute():
    """Prefill and decoding use the factors of the rows; FP8 itself is 3 bits of mantissa."""
    m = model("plt2")
    state = random_reference(m).state_dict()
    exact, rounded = (weights_of(m, state) for _ in range(2))
    packed = weights_of(m, state, fp8=True)
    assert packed.num_bytes() < 0.7 * exact.num_bytes()
    assert random_weights(m, "cpu", torch.float64, fp8=True).num_bytes() == packed.num_bytes()
    for layer, fp8 in zip(rounded.layers, packed.layers, strict=True):
        layer.gate_up_efd = dequantize(fp8.gate_up_efd, fp8.gate_up_scale_ef, torch.float64)
        layer.down_edf = dequantize(fp8.down_edf, fp8.down_scale_ed, torch.float64)
    logits = []
    for weights in (exact, rounded, packed):
        decoder = PLTDecoder(weights, MAX_SLOTS)
        cache = StaticCache(m, 2, 40, "cpu", torch.float64)
        first = prefill(decoder, cache, tokens(2, 20).tolist())
        logits.append(torch.stack([first, decoder.step(torch.tensor([1, 2]), cache)]))
    assert (logits[1] - logits[2]).abs().max() < 1e-12
    # Of all logits together: a token whose router is undecided may go to another expert.
    assert 0 < (logits[0] - logits[2]).norm() < 0.2 * logits[0].norm()


def test_fp8_is_refused_where_it_is_not():
    with pytest.raises(EngineError, match="FP8 is for the weights of experts"):
        check_fp8(model("dense_plt2"), torch.device("cuda"))
    with pytest.raises(EngineError, match="FP8 weights need a GPU of compute capability"):
        check_fp8(model("plt2"), torch.device("cpu"))


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path, model("plt2"))
    return tmp_path


def test_refused_by_name(folder):
    with pytest.raises(ConversionError, match="holds no exported model"):
        load_weights(folder / "nowhere")
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    kept = folder / "kept"
    shutil.move(shard, kept)
    with pytest.raises(ConversionError, match=f"{shard.name}: cannot be read .No such file"):
        load_weights(folder)
    shard.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(ConversionError, match="safetensors: cannot be read"):
        load_weights(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ConversionError, match="index.json: cannot be read"):
        load_weights(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ConversionError, match="neither .* nor model.safetensors"):
        load_weights(folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ConversionError, match="safetensors: cannot be read"):
        load_weights(folder)


def test_tensors_that_do_not_fit_the_configuration(folder):
    state = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    (folder / "model.safetensors.index.json").unlink()

    def refused(message, **changes):
        save_file(state | changes, folder / "model.safetensors")
        with pytest.raises(ConversionError, match=message):
            load_weights(folder)

    refused(r"norm.weight has shape \[5\], but the model configuration says \[16\]",
            **{"model.norm.weight": torch.ones(5)})  # fmt: skip
    refused("tensor unknown to the model configuration", extra=torch.ones(2))
    del state["model.norm.weight"]
    refused("tensor missing: model.norm.weight")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"dtype": "int8"}))
    with pytest.raises(ConversionError, match="is not a floating point type of torch"):
        load_weights(folder)
