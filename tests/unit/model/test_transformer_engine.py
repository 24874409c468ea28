"""Layers of Transformer Engine hold the same model as local ones: weights, shards, attributes.

Its modules can be built on a CPU, where only their check for a GPU stands in the way; they compute
on a GPU only (tests/gpu/test_model.py). What is around them: tests/unit/test_virtual_gpu.py.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt.gpt_model import GPTModel

from pltmoe.config import ModelConfig
from pltmoe.engines.sharded_state import model_state
from pltmoe.errors import ConfigError
from pltmoe.model import megatron_config
from pltmoe.model.first_micro_batch import begin_step, keep_flags_down
from pltmoe.model.initialize import global_name
from pltmoe.runtime import devices
from pltmoe.train.benchmark.megatron_gpt import gpt_layer_spec, load_gpt
from tests.single_process import build_model
from tests.unit.model.cases import ALL, small_model

NAMES = ["row1_vanilla", "row5_plt2", "shared_routing_plt3", "dense_row6_plt3", "tied"]
ATTRIBUTES = ("tensor_model_parallel", "partition_dim", "allreduce", "sequence_parallel")


@pytest.fixture
def build_te(groups: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return build_model for Transformer Engine's layers; on a machine without GPU on the CPU."""
    pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
    original = megatron_config.TransformerConfig

    def built(build: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            if not torch.cuda.is_available():
                patch.setattr(torch.cuda, "is_available", lambda: True)
                patch.setattr(
                    megatron_config,
                    "TransformerConfig",
                    lambda **fields: original(**fields, use_cpu_initialization=True),
                )
            return build()

    def build(model: ModelConfig) -> Any:
        return built(lambda: build_model(model, groups, torch.bfloat16, "transformer_engine"))

    build.built = built  # type: ignore[attr-defined]
    return build


def shards(plt: Any, groups: Any) -> dict[Any, ShardedTensor]:
    state = model_state(plt, groups)
    apply_factories(state)
    found = list(nested_values(state))
    assert all(isinstance(part, ShardedTensor) for part in found), "plain tensors only"
    return {(part.key, part.global_offset): part for part in found}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_shards_are_those_of_local_layers(
    name: str, groups: Any, build_te: Any
) -> None:
    model = small_model(**ALL[name])
    local, te = build_model(model, groups, torch.bfloat16), build_te(model)
    ours, theirs = (
        {global_name(plt, name): p for name, p in plt.named_parameters()} for plt in (local, te)
    )
    assert ours.keys() == theirs.keys()
    for key, parameter in ours.items():
        assert torch.equal(parameter, theirs[key]), key
        for attribute in ATTRIBUTES:
            values = (getattr(p, attribute, None) for p in (parameter, theirs[key]))
            assert len(set(values)) == 1, (key, attribute)
    expected, found = shards(local, groups), shards(te, groups)
    assert expected.keys() == found.keys()
    for key, part in expected.items():
        other = found[key]
        assert (part.global_shape, part.local_shape) == (other.global_shape, other.local_shape)
        assert (part.replica_id, part.dtype) == (other.replica_id, other.dtype)
        assert torch.equal(part.data, other.data), key


def test_each_branch_has_its_own_window(build_te: Any) -> None:
    """Transformer Engine counts the keys to the left, without the query's own."""
    model = small_model(**ALL["row5_plt2"])
    plt = build_te(model)
    assert plt.config.moe_permute_fusion and plt.config.moe_grouped_gemm
    assert plt.config.moe_router_fusion and plt.config.apply_rope_fusion
    for layer in plt.layers:
        attention = layer.self_attention
        assert attention.core_attention.window_size == (-1, 0)
        assert attention.local_attention.window_size == (model.window_keys - 1, 0)


def test_megatrons_own_model_takes_our_weights(groups: Any, build_te: Any) -> None:
    """tools/benchmark_train.py: its norms are fused into linear layers, with the same weights."""
    model = small_model(**ALL["row1_vanilla"])
    ours = build_te(model)
    gpt = build_te.built(
        lambda: GPTModel(
            ours.config, gpt_layer_spec(model, is_te=True), vocab_size=model.vocab_size,
            max_sequence_length=16, share_embeddings_and_output_weights=False,
            position_embedding_type="rope", pg_collection=groups,
        )
    )  # fmt: skip
    load_gpt(gpt, ours)
    layer = gpt.decoder.layers[1]
    norm = ours.layers[1].input_layernorm.weight
    assert torch.equal(layer.self_attention.linear_qkv.layer_norm_weight, norm)
    assert torch.equal(
        layer.mlp.experts.linear_fc1.weight3, ours.layers[1].mlp.experts.linear_fc1.weight3
    )


@pytest.mark.parametrize("fp8", [None, "hybrid"])
@pytest.mark.parametrize("fused", [False, True])
def test_flags_at_the_beginning_of_a_step(fused: bool, fp8: Any, build_te: Any) -> None:
    """Fused: loop 1 must not overwrite the gradients of later loops, and FP8 copies must go."""
    plt = build_te(small_model(**ALL["row5_plt2"]))
    plt.config.gradient_accumulation_fusion, plt.config.fp8 = fused, fp8
    linear = [m for m in plt.modules() if hasattr(m, "is_first_microbatch")]
    assert len(linear) == 2 * 4  # QKV, output, experts' two products
    for module in linear:
        module.is_first_microbatch = not fused and not fp8
        module._fp8_workspaces["weight"] = "of the step before"
    wrapper = SimpleNamespace(config=plt.config, set_is_first_microbatch=None)
    keep_flags_down(wrapper)
    begin_step(plt)
    assert {m.is_first_microbatch for m in linear} == {not fused}
    assert {len(m._fp8_workspaces) for m in linear} == {0 if fused and fp8 else 1}
    assert (wrapper.set_is_first_microbatch is not None) == fused


def test_who_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = devices.transformer_impl("local", torch.bfloat16)
    assert str(asked) == "torch (train.transformer_impl is local)"
    monkeypatch.setattr(devices, "_installed", lambda module: False)
    assert "Transformer Engine is not installed" in str(
        devices.transformer_impl("auto", torch.bfloat16)
    )
    with pytest.raises(ConfigError, match="but Transformer Engine is not installed: use local, or"):
        devices.transformer_impl("transformer_engine", torch.bfloat16)
    monkeypatch.setattr(devices, "_installed", lambda module: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "and there is none" in str(devices.transformer_impl("auto", torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "in float64" in str(devices.transformer_impl("auto", torch.float64))
    assert "rounds fp32 products to TF32" in str(devices.transformer_impl("auto", torch.float32))

    def broken(name: str) -> None:
        raise OSError("libnccl.so.2: cannot open")

    monkeypatch.setattr(devices.importlib, "import_module", broken)
    assert "cannot be loaded (libnccl.so.2: cannot open)" in str(
        devices.transformer_impl("auto", torch.bfloat16)
    )
    monkeypatch.setattr(devices.importlib, "import_module", lambda name: None)
    assert devices.transformer_impl("auto", torch.bfloat16).choice == "TE"
